"""Tiny ImageNet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from clbench.errors import UserError
from clbench.folders import FolderImages, image_names, required, subfolders
from clbench.image_files import Entry, ImageFiles, listed

LAYOUT = "tiny-imagenet-200/train/<wnid>/images/*.JPEG"


@dataclass(kw_only=True)
class TinyImageNet(FolderImages):
    """200 classes of ImageNet at 64x64; by default 10 experiences of 20 classes.

    Source: Le and Yang 2015, "Tiny ImageNet Visual Recognition Challenge", Stanford CS 231N,
    http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked: train/<wnid>/images/*.JPEG,
    val/images/*.JPEG with val/val_annotations.txt, words.txt.
    Licence: none stated; images of ImageNet, for non-commercial research.
    Sizes: 500 training and 50 validation images a class; its test images have no public labels.
    Splits: the validation images are the test part, as in the literature; TUNE and EVALUATE by
    `clbench.division.divide`.
    """

    page: ClassVar[str] = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

    def list_files(self, root: Path) -> ImageFiles:
        annotations = required(root / "val" / "val_annotations.txt", self.page)
        wnids = subfolders(root / "train", LAYOUT)
        entries = [
            Entry(f"train/{wnid}/images/{file}", label, False)
            for label, wnid in enumerate(wnids)
            for file in image_names(root / "train" / wnid / "images", LAYOUT)
        ]
        labels = {wnid: label for label, wnid in enumerate(wnids)}
        for number, line in enumerate(annotations.read_text().splitlines(), 1):
            name, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0]
            if wnid not in labels:
                raise UserError(
                    f"{annotations}, line {number}: {wnid!r} is no folder of {root / 'train'}. "
                    f"Get the dataset again from {self.page}."
                )
            entries.append(Entry(f"val/images/{name}", labels[wnid], True))
        return listed(root, entries, _words(root / "words.txt", wnids))


def _words(path: Path, wnids: list[str]) -> list[str]:
    """The first English name of each class, where the dataset's list of them is there."""
    words = {}
    if path.exists():
        lines = path.read_text().splitlines()
        words = {wnid: text.split(",")[0] for wnid, _, text in (x.partition("\t") for x in lines)}
    return [f"{words[wnid]} ({wnid})" if wnid in words else wnid for wnid in wnids]
