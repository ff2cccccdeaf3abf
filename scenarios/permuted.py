"""Permuted pixels: each experience shuffles all images in its own way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clbench.types import Split, derive_seed
from clbench.views import View, ViewedDomains


@dataclass(kw_only=True)
class Permuted(ViewedDomains):
    """All classes in every experience, pixels permuted; `permuted_mnist`, `permuted_digits`.

    Source: Goodfellow et al. 2013, arXiv 1312.6211, and Kirkpatrick et al. 2017 (EWC), arXiv
    1612.00796, on the images of `dataset`: see `scenarios.split_mnist`, `scenarios.digits`.
    Licence: the dataset's.
    Sizes: the dataset's in each experience; digits: 1,348 training and 449 test images, always
    the same ones.
    Splits: the seed draws the permutations, others for TUNE. TUNE has `tuning_fraction` of each
    class's training images, a fifth of which it tests on; EVALUATE has the others and all test
    images.
    Differs from some of the literature: the first experience is permuted, too.
    """

    def views(self, split: Split, seed: int, shape: tuple[int, int, int]) -> Mapping[str, View]:
        pixels = shape[1] * shape[2]
        views: dict[str, View] = {}
        for index in range(self.n_experiences):
            purpose = f"permutation {index} {split.value}"
            generator = torch.Generator().manual_seed(derive_seed(seed, purpose))
            order = torch.randperm(pixels, generator=generator)
            digest = hashlib.sha256(order.numpy().tobytes()).hexdigest()[:8]
            views[f"permutation {digest}"] = Permutation(order)
        return views


class Permutation(View):
    """The pixels in another order, the same in every channel.

    Args:
        order: Which pixel comes first, second, ...: [H * W] int64.
    """

    def __init__(self, order: Tensor) -> None:
        self.order = order

    def __call__(self, raw: Tensor) -> Tensor:
        return raw.flatten(2).index_select(2, self.order).view_as(raw)

    def to(self, device: torch.device) -> View:
        return Permutation(self.order.to(device))
