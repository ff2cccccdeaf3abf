"""ImageNet-R(endition)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from clbench.division import held_out
from clbench.folders import FolderImages, class_folders
from clbench.image_files import Entry, ImageFiles, listed

LAYOUT = "imagenet-r/<wnid>/*.jpg"
TEST_FRACTION = 0.2


@dataclass(kw_only=True)
class ImageNetR(FolderImages):
    """Paintings, toys, sketches... of 200 ImageNet classes; by default 10 experiences of 20.

    Source: Hendrycks et al. 2021, "The Many Faces of Robustness", arXiv 2006.16241,
    https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar, unpacked: <wnid>/*.jpg.
    Licence: MIT for the collection; each image has its own.
    Sizes: 30,000 images; 24,000 to learn from and 6,000 for testing.
    Splits: none are published with it. A fifth of every class is for testing, as in Wang et al.
    2022 (DualPrompt, arXiv 2204.04799), who drew other images. TUNE and EVALUATE by
    `clbench.division.divide`.
    Differs from the literature: images are cut to a centred square and resized to `image_size`
    once; published recipes train on random resized crops.
    """

    page: ClassVar[str] = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"

    def list_files(self, root: Path) -> ImageFiles:
        found = class_folders(root, LAYOUT)
        names = [
            (f"{wnid}/{file}", label)
            for label, (wnid, files) in enumerate(found.items())
            for file in files
        ]
        labels = torch.tensor([label for _, label in names])
        testing = set(held_out(labels, TEST_FRACTION, "test")[1].tolist())
        entries = [Entry(*name, i in testing) for i, name in enumerate(names)]
        return listed(root, entries, list(found))
