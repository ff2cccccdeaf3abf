"""Articles of clothing, ten classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clbench.datasets import LibraryImages, Name


@dataclass(kw_only=True)
class SplitFashionMNIST(LibraryImages):
    """Fashion-MNIST: ten articles, 28x28 grey; by default 5 experiences of 2 classes.

    Source: Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747; as torchvision's `FashionMNIST` reads
    it: <data_dir>/FashionMNIST/raw/*-ubyte. torchvision does not verify these files, so their
    SHA-256 is part of the run's identity.
    Licence: MIT.
    Sizes: 60,000 training and 10,000 test images.
    Splits: TUNE and EVALUATE by `clbench.division.divide`: with all classes, TUNE has 12,000 of
    the training images (9,600 to learn from, 2,400 for testing), EVALUATE the other 48,000 and
    all test images; `tuning_fraction=0` gives EVALUATE all 60,000, as in the literature.
    """

    dataset: ClassVar[Name] = "fashion_mnist"
