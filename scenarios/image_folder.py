"""Your own images, or any dataset in folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clbench.folders import FolderImages, train_and_test
from clbench.image_files import ImageFiles
from clbench.types import require


@dataclass(kw_only=True)
class ImageFolder(FolderImages):
    """Any root/{train,test}/<class>/*.{jpg,jpeg,png}, e.g. CIFAR-10 as image files.

    Source: the user's files. Their names and sizes are part of a run's identity, the place of the
    folder is not.
    Licence: the user's business.
    Sizes: as many images as there are; decoded once into an array in the cache folder.
    Splits: TUNE and EVALUATE get different classes if there are twice as many as
    `scenario.classes` asks for, else different samples; see `clbench.division.divide`. Without a
    test folder, `test_fraction` of each class's images, always the same ones, are for testing.

    Attributes:
        channels: 3 (RGB) or 1 (luma, ITU-R 601).
        test_fraction: Part of each class that is for testing where there is no test folder.
        train_per_class: Training images of each class at most, the first by file name; 0: all.
        test_per_class: Likewise, for testing.
    """

    channels: Literal[1, 3] = 3
    test_fraction: float = 0.2
    train_per_class: int = 0
    test_per_class: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "test_fraction", above=0, at_most=0.9)
        require(self, "train_per_class", "test_per_class", at_least=0)

    def list_files(self, root: Path) -> ImageFiles:
        files = train_and_test(root, self.test_fraction)
        return files.first_of_each_class(self.train_per_class, self.test_per_class)
