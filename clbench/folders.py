"""Scenarios whose images are files in folders."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from clbench import image_files
from clbench.classification import Images
from clbench.division import DividedImages, held_out
from clbench.errors import UserError
from clbench.image_files import Entry, ImageFiles, listed
from clbench.types import LOCATION, require

SUFFIXES = (".jpg", ".jpeg", ".png")
TRAIN_AND_TEST = "root/train/<class>/*.jpg and root/test/<class>/*.jpg (or .jpeg, .png)"


@dataclass(kw_only=True)
class FolderImages(DividedImages):
    """Base of the class-incremental scenarios on image files.

    Attributes:
        root: Folder of the dataset.
        cache_dir: Where decoded images are kept; None: the user's cache folder.
        image_size: Side in pixels of the images that the model gets; see `image_files.load`.
        skip_corrupt: Leave files out that can't be decoded, and count them in the result.
    """

    #: Where to get the dataset; empty: it is the user's.
    page: ClassVar[str] = ""

    root: Path | None = field(default=None, metadata=LOCATION)
    cache_dir: Path | None = field(default=None, metadata=LOCATION)
    image_size: int = 0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "image_size", at_least=0)

    @abstractmethod
    def list_files(self, root: Path) -> ImageFiles:
        """The labelled files of the dataset; raises `UserError` if it is not all there."""

    @cached_property
    def files(self) -> ImageFiles:
        """The files as they were when this was first asked for."""
        return self.list_files(chosen(self.root, self.page))

    @property
    def n_classes(self) -> int:
        return len(self.files.class_names)

    @property
    def channels(self) -> int:
        """3 (RGB) or 1 (luma)."""
        return 3

    def whole(self) -> Images:
        return image_files.load(
            self.files, self.image_size, self.channels, self.cache_dir, self.skip_corrupt
        )

    def fingerprint(self) -> Mapping[str, Any]:
        return {"files": self.files.fingerprint}


def chosen(root: Path | None, page: str = "") -> Path:
    """The folder that the user chose.

    Args:
        root: Its path.
        page: Where to get the dataset; empty: it is the user's.

    Raises:
        UserError: If there is none, or it is no folder.
    """
    if root is None:
        raise UserError("scenario.root is not set. Say where the images lie: scenario.root=FOLDER")
    if root.is_dir():
        return root
    get = f"Get the dataset from {page}, unpack it, and set" if page else "Set"
    raise UserError(f"There is no folder {root.absolute()}. {get} scenario.root to its place.")


def class_folders(root: Path, layout: str) -> dict[str, list[str]]:
    """The image files of a folder that has one folder a class.

    Args:
        root: The folder.
        layout: What it should look like, for the message.

    Returns:
        Class names, each with its file names, all in alphabetical order.

    Raises:
        UserError: If the folder or its classes are missing, or a class has no image.
    """
    return {name: image_names(root / name, layout) for name in subfolders(root, layout)}


def train_and_test(root: Path, test_fraction: float) -> ImageFiles:
    """The files of a folder that has a train and perhaps a test folder with a folder a class.

    Args:
        root: The folder.
        test_fraction: Without a test folder, this part of each class's images, always the same
            ones, are for testing.

    Raises:
        UserError: If folders are missing, or the two have different classes.
    """
    train = class_folders(root / "train", TRAIN_AND_TEST)
    names = list(train)
    entries = [
        (f"train/{name}/{file}", label) for label, name in enumerate(names) for file in train[name]
    ]
    if not (root / "test").exists():
        labels = torch.tensor([label for _, label in entries])
        testing = set(held_out(labels, test_fraction, "test")[1].tolist())
        return listed(root, (Entry(*e, i in testing) for i, e in enumerate(entries)), names)
    test = class_folders(root / "test", TRAIN_AND_TEST)
    for here, there, folder in ((train, test, "test"), (test, train, "train")):
        only = sorted(here.keys() - there.keys())
        if only:
            raise UserError(
                f"{root / folder} lacks the class folder {only[0]!r}"
                + (f" and {len(only) - 1} more" if len(only) > 1 else "")
                + f". Expected {TRAIN_AND_TEST}, with the same classes in both."
            )
    learn = [Entry(*entry, False) for entry in entries]
    check = [
        Entry(f"test/{name}/{file}", label, True)
        for label, name in enumerate(names)
        for file in test[name]
    ]
    return listed(root, learn + check, names)


def subfolders(folder: Path, layout: str) -> list[str]:
    """Names of the folders in a folder, hidden ones left out; see `class_folders`."""
    names = sorted(e.name for e in _visible(folder, layout) if e.is_dir())
    if not names:
        raise UserError(f"{folder} has no class folders. Expected {layout}.")
    return names


def image_names(folder: Path, layout: str) -> list[str]:
    """Names of the image files in a folder, hidden ones left out; see `class_folders`."""
    entries = _visible(folder, layout)
    names = sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file())
    if not names:
        raise UserError(
            f"{folder} has no image ({', '.join(SUFFIXES)}). Expected {layout}. "
            "Remove the folder if it is no class."
        )
    return names


def required(path: Path, page: str) -> Path:
    """The same path, if it is there.

    Args:
        path: A file of the dataset that does not come with the images.
        page: Where to get the dataset.

    Raises:
        UserError: If it isn't.
    """
    if path.is_file():
        return path
    raise UserError(
        f"{path} is not there, so scenario.root is not the dataset's own folder, or only a part "
        f"of it was unpacked. Get the whole from {page}."
    )


def _visible(folder: Path, layout: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"Can't read the folder {folder}: {error.strerror}. Expected {layout}."
        ) from error
