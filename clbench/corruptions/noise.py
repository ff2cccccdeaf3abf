"""Noise: every element of an image changes on its own."""

from functools import lru_cache

import numpy as np
from scipy import special

from clbench.corruptions.draws import Draws, Floats
from clbench.corruptions.images import Images, to_uint8, to_unit


def gaussian_noise(images: Images, draws: Draws, sigma: float) -> Images:
    """x + sigma n, n standard normal for each element."""
    return to_uint8(to_unit(images) + sigma * draws.normal("noise", *images.shape[1:]))


def speckle_noise(images: Images, draws: Draws, sigma: float) -> Images:
    """x + x sigma n, n standard normal for each element."""
    x = to_unit(images)
    return to_uint8(x + x * sigma * draws.normal("noise", *images.shape[1:]))


def shot_noise(images: Images, draws: Draws, photons: float) -> Images:
    """Poisson(x photons) / photons for each element.

    The smallest count whose distribution function reaches a uniform number: all 256 distribution
    functions lie end to end, each raised by its level, so one sorted search serves a batch.
    """
    steps = _poisson(photons)
    levels = images.astype(np.int64)
    found = np.searchsorted(
        (steps + np.arange(256)[:, None]).ravel(),
        levels + draws.uniform("noise", *images.shape[1:]),
    )
    counts = np.maximum(found - levels * steps.shape[1], 0)
    return to_uint8(counts / photons)


def impulse_noise(images: Images, draws: Draws, fraction: float) -> Images:
    """Salt and pepper: each element becomes 1 or 0, with probability `fraction` / 2 each."""
    chance = draws.uniform("noise", *images.shape[1:])
    salted = np.where(chance < fraction / 2, 255, images)
    pepper = (chance >= fraction / 2) & (chance < fraction)
    return np.where(pepper, 0, salted).astype(np.uint8)


@lru_cache(maxsize=16)
def _poisson(photons: float) -> Floats:
    """P(count <= k) for each of the 256 levels as a row, up to the k where 1 is reached."""
    most = int(special.pdtrik(1 - 2.0**-53, photons)) + 2
    return np.asarray(special.pdtr(np.arange(most), np.arange(256)[:, None] / 255 * photons))
