"""The 15 common corruptions of CIFAR-10-C and ImageNet-C and their 4 extras, on uint8 batches.

Source: Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations" (1903.12261), and the constants of its released generators. Made afresh with
numpy, SciPy, Pillow and torch: those generators need ImageMagick, OpenCV and scikit-image, and
work on one image at a time.

**Differs from the source**, beside the places that the functions name:

- The random numbers are ours: the distributions agree, single images don't.
- ImageNet-C's files hold the result once more as JPEG of quality 85; here nothing is recompressed.
- One-channel images are accepted. Tints and photos turn into their luma.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from clbench.corruptions import blur, digital, frost, noise, spatter, weather
from clbench.corruptions.constants import CONSTANTS
from clbench.corruptions.draws import Draws
from clbench.corruptions.frost import frost_source
from clbench.corruptions.images import Images
from clbench.errors import UserError, did_you_mean

__all__ = ["CORRUPTIONS", "EXTRA_CORRUPTIONS", "Images", "corrupt", "frost_source"]

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

Family = Literal["cifar", "imagenet"]

_LARGEST_CIFAR = 64
_SMALLEST = 8
# Elements corrupted at once: their float64 copies stay in the processor's cache.
_CHUNK = 1 << 17


def corrupt(
    images: Images,
    name: str,
    severity: int,
    seed: int,
    constants: Family | None = None,
    start: int = 0,
    frost_folder: Path | None = None,
) -> Images:
    """Corrupts every image of a batch, each with random numbers of its own.

    What happens to an image depends on the seed, the name, the severity and the image's position
    in its data set, `start` plus its row; never on the rest of the batch. So any split of a data
    set into batches gives the same images, if every batch says where it starts. Values are clipped
    to [0, 1], multiplied by 255 and cut off, as published.

    The published constants are pixels of 32x32 and of 224x224 images. At other sizes they stay
    these numbers of pixels, so a blur is as wide as at the size that the constants are for.

    Args:
        images: [N, C, H, W] uint8, C 1 or 3 (RGB), H and W at least 8. Left as they are.
        name: One of `CORRUPTIONS` or `EXTRA_CORRUPTIONS`.
        severity: 1 to 5.
        seed: At least 0.
        constants: "cifar" or "imagenet". None: "cifar" where H and W are at most 64.
        start: Position of the first image in its data set.
        frost_folder: Folder of the five published photos. None: procedural textures.

    Returns:
        [N, C, H, W] uint8, contiguous, in new memory.

    Raises:
        UserError: If an argument is out of range, or a photo is missing or too small.
        TypeError, ValueError: If the images have another type or shape.
    """
    known = _corruptions(frost_folder)
    if name not in known:
        raise UserError(f"There is no corruption '{name}'. {did_you_mean(name, known)}")
    if not 1 <= severity <= 5:
        raise UserError(f"severity={severity} of corruption '{name}': give 1 to 5.")
    if seed < 0 or start < 0:
        raise UserError(f"Corruption '{name}' got seed={seed}, start={start}: give 0 or more.")
    _check(images)
    family = constants or ("cifar" if max(images.shape[2:]) <= _LARGEST_CIFAR else "imagenet")
    if family not in CONSTANTS:
        raise UserError(f"constants={family}: {did_you_mean(family, CONSTANTS)}")
    parameters = CONSTANTS[family][name][severity - 1]
    size = max(1, _CHUNK // math.prod(images.shape[1:]))
    result = np.empty(images.shape, np.uint8)
    for first in range(0, len(images), size):
        chunk = images[first : first + size]
        draws = Draws((seed, severity), name, start + first, len(chunk))
        result[first : first + size] = known[name](chunk, draws, *parameters)
    return result


def _corruptions(frost_folder: Path | None) -> dict[str, Callable[..., Images]]:
    """The corruptions by name: (images, draws, *parameters) to images."""
    return {
        "gaussian_noise": noise.gaussian_noise,
        "shot_noise": noise.shot_noise,
        "impulse_noise": noise.impulse_noise,
        "speckle_noise": noise.speckle_noise,
        "gaussian_blur": blur.gaussian_blur,
        "defocus_blur": blur.defocus_blur,
        "glass_blur": blur.glass_blur,
        "motion_blur": blur.motion_blur,
        "zoom_blur": blur.zoom_blur,
        "snow": weather.snow,
        "fog": weather.fog,
        "frost": partial(frost.frost, folder=frost_folder),
        "spatter": spatter.spatter,
        "brightness": digital.brightness,
        "contrast": digital.contrast,
        "saturate": digital.saturate,
        "elastic_transform": digital.elastic_transform,
        "pixelate": digital.pixelate,
        "jpeg_compression": digital.jpeg_compression,
    }


def _check(images: Images) -> None:
    if images.dtype != np.uint8:
        raise TypeError(f"Images must be uint8, not {images.dtype}.")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < _SMALLEST:
        raise ValueError(
            f"Images of shape {[*images.shape]} are not [N, 1 or 3, H, W] with sides of at least "
            f"{_SMALLEST} pixels."
        )
