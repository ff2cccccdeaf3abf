"""Weak and strong views of images, as contrastive learning compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.test_time_augmentation import brightness, contrast, hue, saturation
from clbench.types import Context

#: Pixels to each side that a blur reaches: three times the largest deviation.
_REACH = 6
#: The operation, and by how much its factor may differ from the one that changes nothing.
JITTERS: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = {
    "brightness": (brightness, 1.0, 0.4),
    "contrast": (contrast, 1.0, 0.4),
    "saturation": (saturation, 1.0, 0.4),
    "hue": (hue, 0.0, 0.1),
}


class MoCoViews:
    """The views of MoCo v2 without its crops, each image with random numbers of its own.

    Weak: a mirror image half of the time. Strong, in this order: with probability 0.8
    brightness, contrast and saturation (factors of 0.6 to 1.4) and hue (turned by at most 0.1 of
    a circle) in a random order; with 0.2 grey; with 0.5 a Gaussian blur of 0.1 to 2 pixels; a
    mirror image half of the time.

    Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297;
    without the resized crop as Döbler et al. 2023, arXiv 2211.13081, have it in their code for
    corrupted images ("moco-v2-light").

    **Differs from the source:** nothing is rounded to bytes between the operations, and the blur
    is a Gaussian, cut off at 6 pixels, where Pillow's is three box filters.

    Args:
        context: Lends transform and random numbers.
    """

    def __init__(self, context: Context) -> None:
        self._normalise = context.transform.test
        self._draws = context.generator("contrastive views", torch.device("cpu"))

    def weak(self, raw: Tensor) -> Tensor:
        """Views that change little.

        Args:
            raw: uint8 images [B, C, H, W].

        Returns:
            Model inputs, [B, C, H, W].

        Raises:
            UserError: If the samples are no such images.
        """
        return self._normalise(self._mirrored(_checked(raw)))

    def strong(self, raw: Tensor) -> Tensor:
        """Views that keep little but the content; see `weak`."""
        pixels = _checked(raw).float() / 255
        pixels = self._blurred(self._greyed(self._jittered(pixels)))
        return self._normalise(self._mirrored(pixels) * 255)

    def _chosen(self, count: int, probability: float) -> Tensor:
        """Which of so many images, on the CPU."""
        return (torch.rand(count, generator=self._draws) < probability).nonzero().flatten()

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=self._draws)

    def _jittered(self, pixels: Tensor) -> Tensor:
        rows, device = self._chosen(len(pixels), 0.8), pixels.device
        # Of each image a permutation of the operations.
        order = torch.rand(len(JITTERS), len(rows), generator=self._draws).argsort(0)
        factors = [self._uniform(len(rows), c - r, c + r) for _, c, r in JITTERS.values()]
        for step in order:
            for number, (operation, _, _) in enumerate(JITTERS.values()):
                turn = (step == number).nonzero().flatten()
                some = rows[turn].to(device, non_blocking=True)
                factor = factors[number][turn].to(device, non_blocking=True)
                pixels[some] = operation(pixels[some], factor.view(-1, 1, 1, 1))
        return pixels

    def _greyed(self, pixels: Tensor) -> Tensor:
        rows = self._chosen(len(pixels), 0.2).to(pixels.device, non_blocking=True)
        pixels[rows] = saturation(pixels[rows], pixels.new_zeros(1))
        return pixels

    def _blurred(self, pixels: Tensor) -> Tensor:
        rows = self._chosen(len(pixels), 0.5)
        sigma = self._uniform(len(rows), 0.1, 2.0).to(pixels.device, non_blocking=True)
        rows = rows.to(pixels.device, non_blocking=True)
        pixels[rows] = blur(pixels[rows], sigma)
        return pixels

    def _mirrored(self, images: Tensor) -> Tensor:
        rows = self._chosen(len(images), 0.5).to(images.device, non_blocking=True)
        images = images.clone()
        images[rows] = images[rows].flip(3)
        return images


def blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, each image by a deviation of its own; edges are repeated.

    Args:
        pixels: [B, C, H, W].
        sigma: In pixels, [B], up to 2.
    """
    distance = torch.arange(-_REACH, _REACH + 1, device=pixels.device)
    weights = (-(distance**2) / (2 * sigma[:, None] ** 2)).exp()
    taps = (weights / weights.sum(1, keepdim=True)).T.reshape(len(distance), -1, 1, 1, 1)
    for axis, border in ((3, (_REACH, _REACH, 0, 0)), (2, (0, 0, _REACH, _REACH))):
        padded = F.pad(pixels, border, mode="replicate")
        size = pixels.shape[axis]
        shifted = (padded.narrow(axis, i, size) for i in range(len(distance)))
        out = torch.zeros_like(pixels)
        for tap, part in zip(taps, shifted, strict=True):
            out.addcmul_(tap, part)
        pixels = out
    return pixels


def _checked(raw: Tensor) -> Tensor:
    if raw.ndim == 4 and raw.dtype == torch.uint8:
        return raw
    raise UserError(
        "Weak and strong views are made of images stored as bytes; the samples of this scenario "
        f"are {raw.dtype} {[*raw.shape[1:]]}. Choose a scenario of images, or a strategy that "
        "does not augment."
    )
