"""Handwritten digits, ten classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clbench.datasets import LibraryImages, Name


@dataclass(kw_only=True)
class SplitMNIST(LibraryImages):
    """MNIST: ten handwritten digits, 28x28 grey; by default 5 experiences of 2 classes.

    Source: LeCun, Bottou, Bengio and Haffner 1998, "Gradient-Based Learning Applied to Document
    Recognition"; as torchvision's `MNIST` reads it: <data_dir>/MNIST/raw/*-ubyte. torchvision
    does not verify these files, so their SHA-256 is part of the run's identity.
    Licence: CC BY-SA 3.0.
    Sizes: 60,000 training and 10,000 test images.
    Splits: TUNE and EVALUATE by `clbench.division.divide`: with all classes, TUNE has 12,000 of
    the training images (9,600 to learn from, 2,400 for testing), EVALUATE the other 48,000 and
    all test images; `tuning_fraction=0` gives EVALUATE all 60,000, as in the literature.
    """

    dataset: ClassVar[Name] = "mnist"
