"""Colour, geometry and compression."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from clbench.corruptions.blur import smooth
from clbench.corruptions.draws import Draws, Floats
from clbench.corruptions.images import Images, to_uint8, to_unit


def brightness(images: Images, _: Draws, change: float) -> Images:
    """Adds `change` to the value V = max over channels of HSV; hue and saturation stay.

    At equal hue and saturation the channels are proportional to V, so no hue is needed.
    """
    x = to_unit(images)
    value = x.max(1, keepdims=True)
    lit = np.minimum(value + change, 1)
    return to_uint8(lit * np.divide(x, value, out=np.ones_like(x), where=value > 0))


def contrast(images: Images, _: Draws, factor: float) -> Images:
    """Scales the distance from the mean of each channel of each image by `factor`."""
    x = to_unit(images)
    mean = x.mean((2, 3), keepdims=True)
    return to_uint8((x - mean) * factor + mean)


def saturate(images: Images, _: Draws, factor: float, offset: float) -> Images:
    """HSV's saturation S becomes clip(factor S + offset, 0, 1); hue and value stay.

    V - x is proportional to S at equal hue and value. A grey pixel has no hue; as in the source
    it counts as red. One-channel images stay: they have no saturation.
    """
    if images.shape[1] == 1:
        return images
    x = to_unit(images)
    value = x.max(1, keepdims=True)
    lack = value - x
    range_ = lack.max(1, keepdims=True)
    old = np.divide(range_, value, out=np.zeros_like(value), where=value > 0)
    new = np.clip(factor * old + offset, 0, 1)
    red = np.array([0.0, 1.0, 1.0]).reshape(1, 3, 1, 1)
    return to_uint8(value * (1 - new * np.divide(lack, range_, out=red + lack, where=range_ > 0)))


def pixelate(images: Images, _: Draws, fraction: float) -> Images:
    """Pillow's box filter down to this fraction of each side, and back up."""
    height, width = images.shape[2:]
    small = (int(width * fraction), int(height * fraction))
    box = Image.Resampling.BOX
    return _from_pillow(
        [image.resize(small, box).resize((width, height), box) for image in _to_pillow(images)]
    )


def jpeg_compression(images: Images, _: Draws, quality: int) -> Images:
    """Written and read by Pillow with this quality and its own choice of subsampling."""
    decoded = []
    for image in _to_pillow(images):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        decoded.append(Image.open(file))
    return _from_pillow(decoded)


def elastic_transform(
    images: Images, draws: Draws, alpha: float, sigma: float, affine: float
) -> Images:
    """A random affine map, then a smooth random displacement, both bilinear.

    The map takes three corners of a centred square, with half-side a third of the image's, to
    places up to `affine` pixels away along each axis; beyond the border the image is mirrored
    about its outermost pixels. The displacement is uniform noise in ±1 under a Gaussian of
    `sigma` pixels, cut off at 3 sigma, times `alpha` pixels; mirrored about the image's edge.
    The affine map's coordinates are rounded to 1/32 pixel, as by OpenCV.
    """
    height, width = images.shape[2:]
    centre, half = np.array([width // 2, height // 2]), min(height, width) // 3
    square = centre + half * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = square + affine * (2 * draws.uniform("affine", 3, 2) - 1)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    inverse = np.linalg.solve(np.concatenate([moved, np.ones((draws.count, 3, 1))], 2), square)
    places = np.stack([columns, rows, np.ones_like(rows)], -1).reshape(-1, 3) @ inverse
    places = np.rint(places * 32) / 32
    x = _sample(to_unit(images), places.reshape(-1, height, width, 2), about_pixels=True)
    noise = 2 * draws.uniform("displacement", 2, height, width) - 1
    shift = alpha * smooth(noise, sigma, "reflect", truncate=3.0)
    places = np.stack([columns + shift[:, 0], rows + shift[:, 1]], -1)
    # In float32, as in the source: weights that miss 1 by 1e-16 mustn't cost flat areas a level.
    return to_uint8(_sample(x, places, about_pixels=False).astype(np.float32))


def _sample(x: Floats, places: Floats, about_pixels: bool) -> Floats:
    """Bilinear values of [N, C, H, W] at places [N, H, W, 2] = (column, row).

    Beyond the border the image is mirrored about its outermost pixels (`about_pixels`) or about
    its edge, half a pixel further out.
    """
    size = np.array([x.shape[3], x.shape[2]])
    scaled = places * 2 / (size - 1) - 1 if about_pixels else (places * 2 + 1) / size - 1
    result = F.grid_sample(
        torch.from_numpy(x),
        torch.from_numpy(scaled),
        mode="bilinear",
        padding_mode="reflection",
        align_corners=about_pixels,
    )
    return np.asarray(result.numpy())


def _to_pillow(images: Images) -> list[Image.Image]:
    last = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    return [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in last]


def _from_pillow(images: Sequence[Image.Image]) -> Images:
    stacked = np.stack([np.asarray(image) for image in images])
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
