"""CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clbench.datasets import LibraryImages, Name


@dataclass(kw_only=True)
class SplitCIFAR10(LibraryImages):
    """CIFAR-10: ten classes, 32x32 colour; by default 5 experiences of 2 classes.

    Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; as
    torchvision's `CIFAR10` reads it: <data_dir>/cifar-10-batches-py/, verified by MD5.
    Licence: none stated.
    Sizes: 50,000 training and 10,000 test images.
    Splits: TUNE and EVALUATE by `clbench.division.divide`: with all classes, TUNE has 10,000 of
    the training images (8,000 to learn from, 2,000 for testing), EVALUATE the other 40,000 and
    all test images; `tuning_fraction=0` gives EVALUATE all 50,000, as in the literature.
    The YAML's budget is that of Buzzega et al. 2020 (DER, arXiv 2004.07211): ResNet-18, 50
    epochs, batches of 32, crops and mirror images.
    """

    dataset: ClassVar[Name] = "cifar10"
