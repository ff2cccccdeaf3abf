"""Rotated images: each experience turns all images by its own angle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.domains import domain_order
from clbench.types import Split, require
from clbench.views import View, ViewedDomains


@dataclass(kw_only=True)
class Rotated(ViewedDomains):
    """All classes in every experience, images turned; `rotated_mnist`, `rotated_digits`.

    Source: Lopez-Paz and Ranzato 2017 (GEM), arXiv 1706.08840, on the images of `dataset`: see
    `scenarios.split_mnist`, `scenarios.digits`.
    Licence: the dataset's.
    Sizes: the dataset's in each experience; digits: 1,348 training and 449 test images, always
    the same ones.
    Splits: EVALUATE has the angles k * max_angle / n_experiences, k = 0, 1, ..., TUNE those
    halfway between; the seed decides their order. TUNE has `tuning_fraction` of each class's
    training images, a fifth of which it tests on; EVALUATE has the others and all test images.
    Differs from the paper: evenly spaced angles in random order, where GEM draws one in each of
    the even intervals, in ascending order.

    Attributes:
        max_angle: Degrees; this angle itself does not occur.
    """

    max_angle: float = 180.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "max_angle", above=0, at_most=360)

    def views(self, split: Split, seed: int, shape: tuple[int, int, int]) -> Mapping[str, View]:
        between = 0.5 if split is Split.TUNE else 0.0
        order = domain_order(self.n_experiences, seed).tolist()
        angles = [(k + between) * self.max_angle / self.n_experiences for k in order]
        return {f"{angle:.6g}°": rotation(angle, *shape[1:]) for angle in angles}


class Rotation(View):
    """Images turned about their centre, bilinear, black outside.

    Args:
        grid: Where each pixel comes from, [1, H, W, 2], as `grid_sample` takes it.
    """

    def __init__(self, grid: Tensor) -> None:
        self.grid = grid

    def __call__(self, raw: Tensor) -> Tensor:
        # As one image of many channels: where to look is then worked out only once.
        stacked = raw.reshape(1, -1, *raw.shape[2:]).float()
        turned = F.grid_sample(stacked, self.grid, align_corners=False)
        return turned.round_().to(torch.uint8).view_as(raw)

    def to(self, device: torch.device) -> View:
        return Rotation(self.grid.to(device))


def rotation(angle: float, height: int, width: int) -> Rotation:
    """The view that turns images by so many degrees, counter-clockwise."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # affine_grid's coordinates run from -1 to 1 along both sides, however long they are.
    theta = torch.tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    return Rotation(F.affine_grid(theta[None], [1, 1, height, width], align_corners=False))
