"""Spatter: drops of water or mud on the lens."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from clbench.corruptions.blur import smooth
from clbench.corruptions.draws import Draws, Floats, Integers
from clbench.corruptions.images import Images, tint, to_uint8, to_unit

Masks = npt.NDArray[np.bool_]

_WATER = (175, 238, 238)
_MUD = (63, 42, 20)
_MUD_EDGE = 0.8
_EDGE_LOW, _EDGE_HIGH = 50, 150
_FARTHEST = 20.0
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
# Lengths of a step by one, of a diagonal one and of a knight's move (Borgefors 1986).
_STRAIGHT, _DIAGONAL, _KNIGHT = 1.0, 1.4, 2.1969


def spatter(
    images: Images,
    draws: Draws,
    mean: float,
    std: float,
    sigma: float,
    threshold: float,
    mix: float,
    mud: int,
) -> Images:
    """Drops where smoothed normal noise (`mean`, `std`, `sigma`) reaches the threshold.

    Water (`mud` 0) adds pale turquoise, up to `mix` of it, shaded by `_relief`. Mud covers with
    brown where the drops, smoothed with `mix` as sigma, are at least 0.8.
    """
    x = to_unit(images)
    channels = images.shape[1]
    layer = smooth(mean + std * draws.normal("drops", *images.shape[2:]), sigma)
    if mud:
        cover = smooth((layer > threshold).astype(np.float64), mix)[:, None]
        cover[cover < _MUD_EDGE] = 0
        return to_uint8(x * (1 - cover) + tint(*_MUD, channels) * cover)
    layer[layer < threshold] = 0
    # Through int: above 1 the levels wrap round, as in the source.
    drops = (layer * 255).astype(np.int64).astype(np.uint8)
    shade = drops * _relief(drops)
    top = shade.max((1, 2), keepdims=True)
    shade = mix * np.divide(shade, top, out=np.zeros_like(shade), where=top > 0)
    return to_uint8(x + shade[:, None] * tint(*_WATER, channels))


def _relief(drops: Images) -> Floats:
    """Light on drops [N, H, W], in levels: their edges' distance map, equalised and embossed."""
    near = _distance(_edges(drops))
    blurred = ndimage.uniform_filter(near, (1, 3, 3), mode="mirror")
    # Through float32: a flat 20 must not be cut off to 19 because 1/9 is inexact.
    levels = _equalise(blurred.astype(np.float32).astype(np.uint8))
    embossed = ndimage.correlate(levels.astype(np.int64), _EMBOSS[None], mode="mirror")
    light = ndimage.uniform_filter(
        np.clip(embossed, 0, 255).astype(np.float64), (1, 3, 3), mode="mirror"
    )
    return np.asarray(np.rint(light))


def _edges(layer: Images) -> Masks:
    """Canny's edges (1986) of [N, H, W] with L1 gradients, by OpenCV's rules.

    A pixel is a peak if its gradient's size exceeds that of its neighbours along the gradient;
    peaks above 150, and those above 50 connected to them, are edges.
    """
    level = layer.astype(np.int64)
    right, down = _slope(level, 2, 1), _slope(level, 1, 2)
    across, along = abs(right), abs(down)
    size = np.pad(across + along, ((0, 0), (1, 1), (1, 1)))
    height, width = layer.shape[1:]

    def near(row: int, column: int) -> Integers:
        return size[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    here = near(0, 0)
    # The tangents of 22.5 and 67.5 degrees, in units of 2^-15.
    flat = (along << 15) < across * 13573
    steep = (along << 15) > across * (13573 + (1 << 16))
    falling = (right ^ down) < 0
    peak = np.where(
        flat,
        (here > near(0, -1)) & (here >= near(0, 1)),
        np.where(
            steep,
            (here > near(-1, 0)) & (here >= near(1, 0)),
            np.where(
                falling,
                (here > near(-1, 1)) & (here > near(1, -1)),
                (here > near(-1, -1)) & (here > near(1, 1)),
            ),
        ),
    )
    strong, weak = peak & (here > _EDGE_HIGH), peak & (here > _EDGE_LOW)
    within_image = np.array([[[0] * 3] * 3, [[1] * 3] * 3, [[0] * 3] * 3], bool)
    return np.asarray(ndimage.binary_propagation(strong, structure=within_image, mask=weak))


def _slope(level: Integers, along: int, across: int) -> Integers:
    """Sobel's derivative along one axis, smoothed across it; borders repeated."""
    smoothed = ndimage.correlate1d(level, [1, 2, 1], across, mode="nearest")
    return np.asarray(ndimage.correlate1d(smoothed, [-1, 0, 1], along, mode="nearest"))


def _distance(edges: Masks) -> Floats:
    """Distance of each pixel of [N, H, W] to its image's nearest edge, at most 20.

    OpenCV's 5x5 chamfer metric, by letting distances spread until none changes.
    """
    height, width = edges.shape[1:]
    distance = np.full((len(edges), height + 4, width + 4), _FARTHEST)
    inner = distance[:, 2:-2, 2:-2]
    inner[edges] = 0
    steps = [(r, c) for r in range(-2, 3) for c in range(-2, 3) if {abs(r), abs(c)} != {0, 2}]
    lengths = {1: _STRAIGHT, 2: _DIAGONAL, 5: _KNIGHT}
    while True:
        before = inner.copy()
        for row, column in steps:
            if length := lengths.get(row**2 + column**2):
                moved = distance[:, 2 + row : 2 + row + height, 2 + column : 2 + column + width]
                np.minimum(inner, moved + length, out=inner)
        if np.array_equal(before, inner):
            return before


def _equalise(levels: Images) -> Images:
    """Histogram equalisation of each of [N, H, W], by OpenCV's formula; flat images stay."""
    flat = levels.reshape(len(levels), -1)
    offsets = 256 * np.arange(len(levels))[:, None]
    counts = np.bincount((flat + offsets).ravel(), minlength=256 * len(levels)).reshape(-1, 256)
    lowest = np.take_along_axis(counts, (counts > 0).argmax(1)[:, None], axis=1)
    above = flat.shape[1] - lowest
    scaled = (counts.cumsum(1) - lowest) * np.divide(255, above, where=above > 0, out=above * 0.0)
    table = np.where(above > 0, np.clip(np.rint(scaled), 0, 255), np.arange(256))
    return np.take_along_axis(table, flat, axis=1).astype(np.uint8).reshape(levels.shape)
