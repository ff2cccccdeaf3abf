"""CIFAR-100."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clbench.datasets import LibraryImages, Name


@dataclass(kw_only=True)
class SplitCIFAR100(LibraryImages):
    """CIFAR-100: a hundred classes, 32x32 colour; by default 10 experiences of 10 classes.

    Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; as
    torchvision's `CIFAR100` reads it: <data_dir>/cifar-100-python/, verified by MD5.
    Licence: none stated.
    Sizes: 50,000 training and 10,000 test images; the fine labels.
    Splits: TUNE and EVALUATE by `clbench.division.divide`: with all classes, TUNE has 10,000 of
    the training images (8,000 to learn from, 2,000 for testing), EVALUATE the other 40,000 and
    all test images; `tuning_fraction=0` gives EVALUATE all 50,000, as in the literature;
    `classes=50` gives the two splits 50 classes each.
    """

    dataset: ClassVar[Name] = "cifar100"
