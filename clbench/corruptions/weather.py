"""Snow and fog."""

import numpy as np

from clbench.corruptions.blur import smear, zoom
from clbench.corruptions.draws import Draws, Floats
from clbench.corruptions.images import Images, luma, to_uint8, to_unit

_WIBBLE = 100.0


def snow(
    images: Images,
    draws: Draws,
    mean: float,
    std: float,
    factor: float,
    threshold: float,
    radius: int,
    sigma: float,
    mix: float,
) -> Images:
    """Flakes falling from above, twice, the second time turned by 180 degrees, on a paler image.

    Flakes are normal noise (`mean`, `std`), its centre zoomed by `factor`, 0 below `threshold`,
    smeared at a random angle in -135 to -45 degrees (`radius`, `sigma`; see `blur.smear`). The
    image becomes mix x + (1 - mix) max(x, 1.5 luma(x) + 0.5).
    """
    flakes = zoom(mean + std * draws.normal("flakes", 1, *images.shape[2:]), factor)
    flakes[flakes < threshold] = 0
    layer = to_unit(smear(to_uint8(flakes), 90 * draws.uniform("angle") - 135, radius, sigma))
    x = to_unit(images)
    pale = mix * x + (1 - mix) * np.maximum(x, 1.5 * luma(x) + 0.5)
    return to_uint8(pale + layer + layer[..., ::-1, ::-1])


def fog(images: Images, draws: Draws, thickness: float, decay: float) -> Images:
    """(x + thickness p) max(x) / (max(x) + thickness), p a `plasma` in [0, 1] cut to the image."""
    height, width = images.shape[2:]
    side = 1 << (max(height, width) - 1).bit_length()
    x = to_unit(images)
    brightest = x.max((1, 2, 3), keepdims=True)
    bank = plasma(draws, side, decay)[:, None, :height, :width]
    return to_uint8((x + thickness * bank) * brightest / (brightest + thickness))


def plasma(draws: Draws, side: int, decay: float) -> Floats:
    """Fractal heights by the diamond-square method on a torus, scaled to [0, 1] for each image.

    Every new point is the mean of its four neighbours plus noise in ±wibble², where wibble starts
    at 100 and is divided by `decay` at each halving of the grid.

    Args:
        draws: Where the noise comes from.
        side: A power of two, at least 2.
        decay: Above 1; larger is smoother.

    Returns:
        [N, side, side].
    """
    noise = 2 * draws.uniform("heights", side, side) - 1
    heights = np.zeros(noise.shape)
    step, wibble = side, _WIBBLE
    while step >= 2:
        old, new = slice(None, None, step), slice(step // 2, None, step)
        wobble = wibble**2 * noise
        corners = heights[:, old, old].copy()
        rows, columns = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 2)
        centres = (rows + np.roll(rows, -1, 2)) / 4 + wobble[:, new, new]
        heights[:, new, new] = centres
        above, left = centres + np.roll(centres, 1, 1), centres + np.roll(centres, 1, 2)
        heights[:, old, new] = (above + columns) / 4 + wobble[:, old, new]
        heights[:, new, old] = (left + rows) / 4 + wobble[:, new, old]
        step, wibble = step // 2, wibble / decay
    heights -= heights.min((1, 2), keepdims=True)
    return np.asarray(heights / heights.max((1, 2), keepdims=True))
