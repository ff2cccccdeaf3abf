"""Your own images, or any dataset in folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from clbench.division import held_out
from clbench.errors import UserError
from clbench.folders import FolderImages, class_folders
from clbench.image_files import Entry, ImageFiles, listed
from clbench.types import require

LAYOUT = "root/train/<class>/*.jpg and root/test/<class>/*.jpg (or .jpeg, .png)"


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
    """

    channels: Literal[1, 3] = 3
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "test_fraction", above=0, at_most=0.9)

    def list_files(self, root: Path) -> ImageFiles:
        train = class_folders(root / "train", LAYOUT)
        names = list(train)
        entries = [
            (f"train/{name}/{file}", label)
            for label, name in enumerate(names)
            for file in train[name]
        ]
        if not (root / "test").exists():
            labels = torch.tensor([label for _, label in entries])
            testing = set(held_out(labels, self.test_fraction, "test")[1].tolist())
            return listed(root, (Entry(*e, i in testing) for i, e in enumerate(entries)), names)
        test = class_folders(root / "test", LAYOUT)
        for here, there, folder in ((train, test, "test"), (test, train, "train")):
            only = sorted(here.keys() - there.keys())
            if only:
                raise UserError(
                    f"{root / folder} lacks the class folder {only[0]!r}"
                    + (f" and {len(only) - 1} more" if len(only) > 1 else "")
                    + f". Expected {LAYOUT}, with the same classes in both."
                )
        learn = [Entry(*entry, False) for entry in entries]
        check = [
            Entry(f"test/{name}/{file}", label, True)
            for label, name in enumerate(names)
            for file in test[name]
        ]
        return listed(root, learn + check, names)
