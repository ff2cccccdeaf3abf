"""Blurs, and the smearing and zooming that the weather shares with them."""

import math
from functools import lru_cache

import numpy as np
from scipy import ndimage

from clbench.corruptions.draws import Draws, Floats, Integers
from clbench.corruptions.images import Images, to_uint8, to_unit

_DISK_BORDER = 8


def gaussian_blur(images: Images, _: Draws, sigma: float) -> Images:
    """Gaussian of standard deviation `sigma` pixels, cut off at 4 sigma, borders repeated."""
    return to_uint8(smooth(to_unit(images), sigma))


def defocus_blur(images: Images, _: Draws, radius: float, alias: float) -> Images:
    """Mean over a disk of `radius` pixels whose edge is softened by a Gaussian of sigma `alias`.

    Borders are mirrored about the outermost pixel.
    """
    kernel = _disk(radius, alias)
    reach = len(kernel) // 2
    x, height, width = to_unit(images), *images.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="reflect")
    result = np.zeros_like(x)
    for row, column in np.argwhere(kernel):
        result += kernel[row, column] * padded[..., row : row + height, column : column + width]
    return to_uint8(result)


def glass_blur(images: Images, draws: Draws, sigma: float, shift: int, iterations: int) -> Images:
    """Blur, let pixels copy a neighbour at most `shift` away, blur again.

    The paper speaks of swaps. Its code, run on an array of colours, overwrites the pixel with its
    neighbour and leaves the neighbour alone, and so do the published images.
    """
    flat = to_uint8(smooth(to_unit(images), sigma)).reshape(*images.shape[:2], -1)
    for iteration in range(iterations):
        source = _glass_sources(draws, f"shift {iteration}", shift, *images.shape[2:])
        flat = np.take_along_axis(flat, source[:, None], axis=2)
    return to_uint8(smooth(to_unit(flat.reshape(images.shape)), sigma))


def motion_blur(images: Images, draws: Draws, radius: int, sigma: float) -> Images:
    """Smear along a line of random angle, uniform in ±45 degrees; see `smear`."""
    return smear(images, 90 * draws.uniform("angle") - 45, radius, sigma)


def zoom_blur(images: Images, _: Draws, end: float, step: float) -> Images:
    """Mean of the image and its centre zoomed by 1, 1 + step, ... up to `end`."""
    factors = np.arange(1, end, step)
    x = to_unit(images)
    total = sum((zoom(x, factor) for factor in factors), x)
    # In float32, as in the source: a rounding error mustn't cost flat areas a level.
    return to_uint8((total / (len(factors) + 1)).astype(np.float32))


def smooth(x: Floats, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Floats:
    """Gaussian filter over the last two axes.

    Args:
        x: [..., H, W].
        sigma: Pixels. Next to 0: unchanged.
        mode: Border, in SciPy's words.
        truncate: Half-width of the filter in sigmas.
    """
    sigmas = (0,) * (x.ndim - 2) + (sigma, sigma)
    return np.asarray(ndimage.gaussian_filter(x, sigmas, mode=mode, truncate=truncate))


def smear(images: Images, degrees: Floats, radius: int, sigma: float) -> Images:
    """ImageMagick's motion blur: half a Gaussian laid along a line, borders repeated.

    out(p) = sum_i w_i in(p + round(i (cos a, sin a))), w_i ~ exp(-i² / 2 sigma²), i = 0 ... 2
    radius: one-sided, and twice the radius long.

    Args:
        images: [N, C, H, W].
        degrees: [N], from the axis of columns towards that of rows, which points down.
        radius: Half of the length in pixels.
        sigma: Pixels.

    Returns:
        [N, C, H, W], rounded to 1/257 level, then cut off, as by ImageMagick's 16-bit pixels.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angle = np.radians(degrees)[:, None]
    right = np.ceil(steps * np.cos(angle) - 0.5).astype(np.int64)
    down = np.ceil(steps * np.sin(angle) - 0.5).astype(np.int64)
    height, width = images.shape[2:]
    flat = images.reshape(*images.shape[:2], -1)
    total = np.zeros(flat.shape)
    for step, weight in enumerate(weights / weights.sum()):
        rows = np.clip(np.arange(height) + down[:, step, None], 0, height - 1)
        columns = np.clip(np.arange(width) + right[:, step, None], 0, width - 1)
        source = (rows[:, :, None] * width + columns[:, None, :]).reshape(len(images), 1, -1)
        total += weight * np.take_along_axis(flat, source, axis=2)
    return (np.rint(total * 257) // 257).astype(np.uint8).reshape(images.shape)


def zoom(x: Floats, factor: float) -> Floats:
    """The centre of [..., H, W], enlarged bilinearly to the same size."""
    rows, columns = (_zoom_matrix(size, float(factor)) for size in x.shape[-2:])
    return np.asarray(rows @ x @ columns.T)


@lru_cache(maxsize=256)
def _zoom_matrix(size: int, factor: float) -> Floats:
    """[size, size] that zooms one axis: bilinear interpolation is linear and separable."""
    kept = math.ceil(size / factor)
    first = (size - kept) // 2
    zoomed = ndimage.zoom(np.eye(size)[first : first + kept], (factor, 1), order=1)
    trim = (len(zoomed) - size) // 2
    return np.ascontiguousarray(zoomed[trim : trim + size])


@lru_cache(maxsize=16)
def _disk(radius: float, alias: float) -> Floats:
    """Weights that sum to 1, an odd square without empty borders.

    The Gaussian has 3x3 pixels up to a radius of 8 and 5x5 above.
    """
    border = _DISK_BORDER if radius <= _DISK_BORDER else int(radius)
    axis = np.arange(-border, border + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float32)
    disk /= disk.sum()
    offsets = np.arange(-1, 2) if radius <= _DISK_BORDER else np.arange(-2, 3)
    bell = np.exp(-(offsets**2) / (2 * alias**2))
    bell = (bell / bell.sum()).astype(np.float32)
    for rows in (0, 1):
        disk = ndimage.correlate1d(disk, bell, axis=rows, mode="mirror")
    spare = int(np.flatnonzero(disk.any(axis=0))[0])
    return np.asarray(disk[spare : len(disk) - spare, spare : len(disk) - spare])


def _glass_sources(draws: Draws, purpose: str, shift: int, height: int, width: int) -> Integers:
    """[N, H W]: which pixel each pixel shows after one pass of copies.

    The pass visits rows and columns from the last to the first, with offsets from -shift to
    shift - 1. A pixel that copies one visited before it, later in memory, gets what that one had
    copied. Such chains are followed for all pixels at once by repeated squaring of the map.
    """
    grid = np.arange(height * width).reshape(height, width)
    inner = (slice(None), slice(shift + 1, height - shift + 1), slice(shift + 1, width - shift + 1))
    source = np.repeat(grid[None], draws.count, axis=0)
    offsets = draws.integers(purpose, 2 * shift, 2, *source[inner].shape[1:]) - shift
    source[inner] += offsets[:, 0] * width + offsets[:, 1]
    source = source.reshape(draws.count, -1)
    chain = np.maximum(source, grid.ravel())
    while True:
        further = np.take_along_axis(chain, chain, axis=1)
        if np.array_equal(further, chain):
            return np.take_along_axis(source, chain, axis=1)
        chain = further
