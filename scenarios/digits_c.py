"""Corrupted handwritten digits: test-time adaptation with nothing to fetch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from clbench.classification import Images, channel_statistics
from clbench.corrupted import CorruptedImages
from clbench.datasets import digit_images
from clbench.division import held_out
from clbench.samples import TensorSource

SIDE = 32


@dataclass(kw_only=True)
class DigitsC(CorruptedImages):
    """scikit-learn's handwritten digits under common corruptions, 32x32 grey, 10 classes.

    Source: see `scenarios.digits`; enlarged from 8x8 (bicubic), corrupted by
    `clbench.corruptions` with CIFAR-10-C's constants.
    Licence: CC BY 4.0.
    Sizes: 899 images train the source model, 898 are corrupted; with the default options 575 of
    them arrive in each domain and 144 are held out.
    Splits: TUNE has a fifth of the 898 and the four extra corruptions.
    """

    def clean(self) -> Images:
        small, targets = digit_images()
        large = F.interpolate(small.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
        images = large.round().clamp(0, 255).to(torch.uint8)
        train, test = held_out(targets, 0.5, "digits_c test")
        mean, std = channel_statistics(images[train])
        return Images(
            TensorSource(images[train], targets[train]),
            TensorSource(images[test], targets[test]),
            [str(d) for d in range(10)],
            mean,
            std,
        )

    def fingerprint(self) -> Mapping[str, Any]:
        return {"digits": 1}
