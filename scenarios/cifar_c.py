"""CIFAR-10-C and CIFAR-100-C: the published files, or made from any copy of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clbench import datasets, image_files
from clbench.classification import Images
from clbench.corrupted import CorruptedImages
from clbench.errors import UserError
from clbench.folders import chosen, train_and_test
from clbench.image_files import ImageFiles
from clbench.types import LOCATION, Split

#: Images of one severity in a published file.
_PER_SEVERITY = 10_000


@dataclass(kw_only=True)
class CIFARC(CorruptedImages):
    """CIFAR's 32x32 colour images under common corruptions.

    Source: Hendrycks & Dietterich 2019, arXiv 1903.12261: the files CIFAR-10-C of
    zenodo.org/records/2535967, CIFAR-100-C of zenodo.org/records/3555552, or, without
    `published`, made by `clbench.corruptions` with their constants.
    Licence: CC BY 4.0 for the published files.
    Sizes: the 10,000 test images. The literature's protocol, in which all of them arrive:
    `tuning_fraction=0 held_out=0`.
    Splits: TUNE has a fifth of the test images and the four extra corruptions.

    Attributes:
        dataset: "cifar10" or "cifar100".
        data_dir: Folder of the datasets, laid out as torchvision does.
        download: Let torchvision fetch the clean images.
        root: Clean images as files instead: root/{train,test}/<class>/*.
        published: Folder of the published .npy files; None: the images are made.
    """

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    data_dir: Path = field(default=Path("data"), metadata=LOCATION)
    download: bool = field(default=False, metadata=LOCATION)
    root: Path | None = field(default=None, metadata=LOCATION)
    published: Path | None = field(default=None, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root is not None and self.published is not None:
            raise UserError(
                "scenario.published belongs to the dataset of torchvision, whose test images it "
                "has in their order: leave out scenario.root."
            )

    @cached_property
    def files(self) -> ImageFiles:
        """The clean images, where they are files."""
        return train_and_test(chosen(self.root), 0.2)

    def check(self, split: Split) -> None:
        super().check(split)
        if self.root is None:
            datasets.check(self.dataset, self.data_dir, self.download)
        else:
            _ = self.files
        if self.published is not None:
            for name in self.chosen(split):
                _published(self.published, name)

    def clean(self) -> Images:
        if self.root is None:
            images = datasets.load(self.dataset, self.data_dir, self.download)
            if self.published is not None:
                _same_labels(self.published, images.test.targets)
            return images
        return image_files.load(self.files, 32, 3, self.cache_dir, skip_corrupt=False)

    def corrupted(
        self, images: Images, positions: Tensor, name: str, severity: int
    ) -> NDArray[np.uint8]:
        if self.published is None:
            return super().corrupted(images, positions, name, severity)
        rows = positions.numpy() + (severity - 1) * _PER_SEVERITY
        pixels: NDArray[np.uint8] = _published(self.published, name)[rows]
        return pixels.transpose(0, 3, 1, 2)

    def fingerprint(self) -> Mapping[str, Any]:
        if self.root is not None:
            return {"files": self.files.fingerprint}
        clean = datasets.fingerprint(self.dataset, self.data_dir, self.download)
        return {**clean, "corrupted": "made" if self.published is None else "published"}


def _published(folder: Path, name: str) -> NDArray[np.uint8]:
    """A published file, mapped: [50000, 32, 32, 3]."""
    path = folder / f"{name}.npy"
    array: NDArray[np.uint8] = _array(path)
    shape = 5 * _PER_SEVERITY, 32, 32, 3
    if array.shape != shape or array.dtype != np.uint8:
        raise UserError(
            f"{path} holds {array.dtype} {[*array.shape]}, not uint8 {[*shape]} as the published "
            "files."
        )
    return array


def _same_labels(folder: Path, targets: Tensor) -> None:
    """Refuses files that were made of other images, or of these in another order."""
    path = folder / "labels.npy"
    if path.exists() and not np.array_equal(_array(path), np.tile(targets.numpy(), 5)):
        raise UserError(
            f"{path} has other labels than the test images of scenario.dataset in "
            "scenario.data_dir, five times over. CIFAR-10-C belongs to dataset=cifar10, "
            "CIFAR-100-C to dataset=cifar100."
        )


def _array(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read: {error}. Unpack CIFAR-10-C.tar or CIFAR-100-C.tar and set "
            "scenario.published to its folder, or leave it out and the images are made."
        ) from error
    return array
