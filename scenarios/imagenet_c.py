"""ImageNet-C: the published folders, or made from the validation images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench import image_files
from clbench.classification import Images
from clbench.corrupted import CorruptedImages
from clbench.division import held_out
from clbench.errors import UserError
from clbench.folders import class_folders
from clbench.image_files import Entry, FileSource, ImageFiles, sized
from clbench.shifts import severities
from clbench.types import LOCATION, Split, require

PAGE = "zenodo.org/records/2235448"
LAYOUT = "<corruption>/<severity>/<wnid>/*.JPEG"
#: What "resize to 256, cut out the central 224" leaves out on each side.
_BORDER = (1 - 224 / 256) / 2
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Listing(NamedTuple):
    """Labelled images by name, in the order of class and name.

    Attributes:
        names: "<wnid>/<file>" of each image.
        labels: Its class, [N] int64.
        classes: wnids in alphabetical order: the order of ImageNet's classes.
    """

    names: Sequence[str]
    labels: Tensor
    classes: Sequence[str]


@dataclass(kw_only=True)
class ImageNetC(CorruptedImages):
    """ImageNet's validation images under common corruptions, 224x224 colour, 1,000 classes.

    Source: Hendrycks & Dietterich 2019, arXiv 1903.12261: zenodo.org/records/2235448, the
    archives unpacked into one folder (`published`); or, without it, made by
    `clbench.corruptions` from the validation images with the published constants.
    Licence: CC BY 4.0 for the published files; ImageNet's terms for the images.
    Sizes: 50,000 validation images. 5,000 of them arrive in each domain (`samples`), always the
    same, 5 of each class, and 1,000 others are held out, one of each class.
    `samples=0 held_out=0 tuning_fraction=0`: all 50,000 arrive, as in the papers of EATA and SAR.
    RobustBench, and most tables of the literature after it, take 5,000 other ones:
    `image_list` reads its list. Never compare results of different images.
    Splits: TUNE has a fifth of the images and the four extra corruptions.

    The model has to come trained: `backbone=resnet50`, another name of timm's with trained
    weights (torchvision's are those with the tag tv_in1k, tv2_in1k or tv), or a weights file, with
    `backbone.load_head=true`. Images are decoded once and then mapped from the cache folder, which
    takes 150 kB for each image and corruption.

    Attributes:
        published: Folder of the published folders <corruption>/<severity>/<wnid>/*.JPEG; None:
            the images are made.
        root: Clean validation images, root/<wnid>/*.JPEG, or without the folders where
            `published` is given; for the accuracy on the source. Needed unless held_out=0.
        train: Clean training images, train/<wnid>/*.JPEG, for methods that look at the source.
            None: there are none, and such methods say so.
        train_samples: Of the training images, always the same; 0: all.
        image_list: Text file that names the images that count, a <wnid>/<file> a line, such as
            RobustBench's imagenet_test_image_ids.txt; None: all.
        image_size: Side in pixels. Images of another shape are cut to their central square, an
            eighth of the shorter side left out, and resized (bicubic).
    """

    published: Path | None = field(default=None, metadata=LOCATION)
    root: Path | None = field(default=None, metadata=LOCATION)
    train: Path | None = field(default=None, metadata=LOCATION)
    train_samples: int = 10_000
    image_list: Path | None = field(default=None, metadata=LOCATION)
    image_size: int = 224
    samples: int = 5000
    held_out: float = 0.02
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "train_samples", at_least=0)
        require(self, "image_size", at_least=8)

    @cached_property
    def listing(self) -> Listing:
        """All images that count, whatever the corruption."""
        folder, layout = self.root, "root/<wnid>/*.JPEG"
        if self.published is not None:
            folder, layout = self._domain(self.chosen(Split.EVALUATE)[0], self.severity), LAYOUT
        if folder is None:
            raise UserError("Set scenario.published=FOLDER, scenario.root=FOLDER, or both.")
        return _listing(folder, layout, self.image_list)

    def check(self, split: Split) -> None:
        super().check(split)
        if self.root is None and (self.published is None or self.held_out):
            raise UserError(
                "scenario.root is not set. Say where the clean validation images lie: "
                "scenario.root=FOLDER. Without them, scenario.published=FOLDER with "
                "scenario.held_out=0 measures online errors only."
            )
        if not self.backbone.starts_trained:
            raise UserError(
                "imagenet_c needs a trained model: backbone=resnet50, or backbone=timm with "
                "backbone.name, backbone.pretrained=true (or backbone.weights=FILE) and "
                "backbone.load_head=true."
            )
        if self.published is not None:
            levels = severities(self.severity) if self.arrival == "gradual" else [self.severity]
            for name in self.chosen(split):
                for severity in {*levels}:
                    self._domain(name, severity)
        _ = self.listing

    def clean(self) -> Images:
        # Without clean images, the corrupted ones stand for their shape and their labels.
        everything = torch.arange(len(self.listing.names))
        if self.root is not None:
            test = FileSource(self._clean_files(everything), self.image_size, _BORDER)
        else:
            name = self.chosen(Split.EVALUATE)[0]
            test = FileSource(self._files(name, self.severity, everything), self.image_size)
        corrupted = "made" if self.published is None else "published"
        facts = {"corrupted": corrupted, "files_sha256": test.files.fingerprint}
        train = FileSource(self._source, self.image_size, _BORDER)
        return Images(train, test, self.listing.classes, _MEAN, _STD, facts)

    def corrupted(
        self, images: Images, positions: Tensor, name: str, severity: int
    ) -> NDArray[np.uint8]:
        if self.published is None:
            return super().corrupted(images, positions, name, severity)
        files = self._files(name, severity, positions)
        return image_files.pixels(files, self.image_size, 3, self.cache_dir)

    def uncorrupted(self, images: Images, positions: Tensor) -> NDArray[np.uint8]:  # noqa: ARG002
        files = self._clean_files(positions)
        return image_files.pixels(files, self.image_size, 3, self.cache_dir, _BORDER)

    def fingerprint(self) -> Mapping[str, Any]:
        names = hashlib.sha256("\n".join(self.listing.names).encode()).hexdigest()
        corrupted = "made" if self.published is None else "published"
        source = None if self.train is None else self._source.fingerprint
        return {"names": names, "corrupted": corrupted, "source": source}

    @cached_property
    def _source(self) -> ImageFiles:
        """The training images that count; none, if no folder has any."""
        if self.train is None:
            return ImageFiles(Path(), (), (), tuple(self.listing.classes))
        found = _listing(self.train, "train/<wnid>/*.JPEG", None)
        if found.classes != self.listing.classes:
            raise UserError(
                f"{self.train} has {len(found.classes)} classes, not the same as the "
                f"{len(self.listing.classes)} of the validation images."
            )
        some = torch.arange(len(found.names))
        if 0 < self.train_samples < len(some):
            share = self.train_samples / len(some)
            some = held_out(found.labels, share, "imagenet_c source")[1]
        return _chosen(self.train, found, some)

    def _domain(self, name: str, severity: int) -> Path:
        """The published folder of a corruption."""
        assert self.published is not None
        folder = self.published / name / str(severity)
        if not folder.is_dir():
            raise UserError(
                f"There is no folder {folder}. Unpack the archives of {PAGE} into "
                f"scenario.published, so that it has {LAYOUT}, or leave scenario.published out "
                "and the images are made."
            )
        return folder

    def _files(self, name: str, severity: int, positions: Tensor) -> ImageFiles:
        """Published files, in the order of the positions."""
        assert self.published is not None
        # The corruption belongs to the names: a cache knows files by these and their sizes.
        return _chosen(self.published, self.listing, positions, f"{name}/{severity}/")

    def _clean_files(self, positions: Tensor) -> ImageFiles:
        assert self.root is not None
        names = self.listing.names
        flat = not (self.root / names[0]).exists() and (self.root / Path(names[0]).name).exists()
        listing = self.listing
        if flat:
            listing = listing._replace(names=[name.rpartition("/")[2] for name in names])
        return _chosen(self.root, listing, positions)


def _listing(folder: Path, layout: str, image_list: Path | None) -> Listing:
    """The images below a folder with a folder a class, those of the list if there is one."""
    found = class_folders(folder, layout)
    classes = list(found)
    names = [f"{wnid}/{file}" for wnid in classes for file in found[wnid]]
    if image_list is not None:
        wanted = _wanted(image_list)
        missing = sorted(wanted - set(names))
        if missing:
            raise UserError(
                f"scenario.image_list={image_list} names {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f", not below {folder}. Its lines should be <wnid>/<file>."
            )
        names = [name for name in names if name in wanted]
    number = {wnid: label for label, wnid in enumerate(classes)}
    labels = torch.tensor([number[name.partition("/")[0]] for name in names], dtype=torch.int64)
    return Listing(names, labels, classes)


def _wanted(image_list: Path) -> set[str]:
    try:
        lines = image_list.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"scenario.image_list={image_list} can't be read: {error}.") from error
    if not lines:
        raise UserError(f"scenario.image_list={image_list} names no image.")
    return set(lines)


def _chosen(root: Path, listing: Listing, positions: Tensor, prefix: str = "") -> ImageFiles:
    """Some of the listed files, in the order of the positions."""
    labels = listing.labels.tolist()
    entries = [Entry(prefix + listing.names[i], labels[i], True) for i in positions.tolist()]
    return sized(root, entries, tuple(listing.classes))
