"""Corrupted rendered characters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clbench import glyph_datasets
from clbench.classification import Images
from clbench.corrupted import CorruptedImages
from clbench.glyph_catalogue import Pool, faces
from clbench.types import Split, require


@dataclass(kw_only=True)
class GlyphsC(CorruptedImages):
    """Characters of all scripts under common corruptions, 32x32 colour.

    Source: see `scenarios.glyphs`; corrupted by `clbench.corruptions` with CIFAR-10-C's
    constants.
    Licence: see `scenarios.glyphs`.
    Sizes: `train_per_class` images of each of `n_classes` characters train the source model,
    `test_per_class` are corrupted.
    Splits: TUNE has a fifth of the corrupted images and the four extra corruptions.

    Attributes:
        n_classes: Characters.
        train_per_class: Clean training images of each.
        test_per_class: Test images of each, to be corrupted.
        image_size: Side in pixels.
    """

    n_classes: int = 50
    train_per_class: int = 100
    test_per_class: int = 50
    image_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "n_classes", "train_per_class", "test_per_class", at_least=1)
        require(self, "image_size", at_least=8)

    def check(self, split: Split) -> None:
        super().check(split)
        faces()

    def clean(self) -> Images:
        available = glyph_datasets.known(self.cache_dir)
        characters = glyph_datasets.chosen(available, Pool.EVALUATION, self.n_classes)
        counts = self.train_per_class, self.test_per_class
        drawn_by = available.faces_of(characters)
        return glyph_datasets.made(characters, drawn_by, counts, self.image_size, self.cache_dir)

    def fingerprint(self) -> Mapping[str, Any]:
        options = [self.n_classes, self.train_per_class, self.test_per_class, self.image_size]
        return {**glyph_datasets.fingerprint(), "glyphs": options}
