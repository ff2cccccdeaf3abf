"""Caltech-UCSD Birds-200-2011."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from clbench.errors import UserError
from clbench.folders import FolderImages, required
from clbench.image_files import Entry, ImageFiles, listed


@dataclass(kw_only=True)
class CUB200(FolderImages):
    """200 species of birds; by default 10 experiences of 20.

    Source: Wah et al. 2011, "The Caltech-UCSD Birds-200-2011 Dataset", CNS-TR-2011-001,
    https://www.vision.caltech.edu/datasets/cub_200_2011/, unpacked: CUB_200_2011/images/... with
    images.txt, image_class_labels.txt, train_test_split.txt and classes.txt.
    Licence: for non-commercial research and education; the images are of Flickr users.
    Sizes: 11,788 images, 5,994 to learn from and 5,794 for testing.
    Splits: the published training and test parts; TUNE and EVALUATE by
    `clbench.division.divide`.
    Differs from the literature: PILOT and its relatives learn from 9,430 images and test on
    2,358; images are cut to a centred square and resized to `image_size` once, not augmented by
    random resized crops.
    """

    page: ClassVar[str] = "https://www.vision.caltech.edu/datasets/cub_200_2011/"

    def list_files(self, root: Path) -> ImageFiles:
        images = _table(root / "images.txt", self.page)
        labels = _table(root / "image_class_labels.txt", self.page)
        training = _table(root / "train_test_split.txt", self.page)
        classes = _table(root / "classes.txt", self.page)
        numbers = {number: label for label, number in enumerate(classes)}
        entries = []
        for key, name in images.items():
            if labels.get(key) not in numbers or training.get(key) not in ("0", "1"):
                raise UserError(
                    f"{root}: image {key} ({name}) has no class or no part. Get the dataset again "
                    f"from {self.page}."
                )
            entries.append(Entry(f"images/{name}", numbers[labels[key]], training[key] == "0"))
        # "001.Black_footed_Albatross"
        species = [name.partition(".")[2].replace("_", " ") or name for name in classes.values()]
        return listed(root, entries, species)


def _table(path: Path, page: str) -> dict[str, str]:
    """The lines "key value" of one of the dataset's lists."""
    required(path, page)
    pairs = (line.partition(" ") for line in path.read_text().splitlines() if line.strip())
    return {key: value.strip() for key, _, value in pairs}
