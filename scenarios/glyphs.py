"""Rendered characters: many classes in many faces, made on the spot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clbench import glyph_datasets
from clbench.classification import ClassIncrementalImages, Images, check_experiences
from clbench.domains import DomainIncrementalImages, Domains, domain_order
from clbench.errors import UserError
from clbench.glyph_catalogue import Face, Pool, faces
from clbench.types import LOCATION, Split, require

POOLS = {Split.TUNE: Pool.TUNING, Split.EVALUATE: Pool.EVALUATION}


@dataclass(kw_only=True)
class Glyphs(ClassIncrementalImages):
    """Characters of all scripts and symbols, in colour; by default 10 experiences of 10 classes.

    Source: rendered by `clbench.glyph_images` with the fonts that come with matplotlib (DejaVu,
    STIX): each image another face, weight, size, slant, place and colours.
    Licence: of the fonts: Bitstream Vera and Arev licences, public domain, and SIL OFL 1.1; of
    the images: none needed.
    Sizes: `train_per_class` and `test_per_class` images of each of `n_classes` characters.
    Splits: TUNE and EVALUATE have different characters, and so has a third pool for pre-training
    (`pretraining_images`). Which characters, which images: always the same ones.

    Attributes:
        n_classes: Characters of the stream.
        train_per_class: Training images of each.
        test_per_class: Test images of each.
        image_size: Side in pixels.
        cache_dir: Where rendered images are kept; None: the user's cache folder.
    """

    n_experiences: int = 10
    n_classes: int = 100
    train_per_class: int = 100
    test_per_class: int = 20
    image_size: int = 32
    cache_dir: Path | None = field(default=None, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "n_classes", "train_per_class", "test_per_class", at_least=1)
        require(self, "image_size", at_least=8)

    def images(self, split: Split) -> Images:
        return self._made(POOLS[split], self.n_classes)

    def pretraining_images(self, n_classes: int = 0) -> Images:
        """Characters that are in no stream, to train a model on before it.

        Args:
            n_classes: How many; 0: all there are.
        """
        return self._made(Pool.PRETRAINING, n_classes)

    def check(self, split: Split) -> None:  # noqa: ARG002
        check_experiences(self.n_classes, self.n_experiences)
        faces()

    def fingerprint(self) -> Mapping[str, Any]:
        return glyph_datasets.fingerprint()

    def _made(self, pool: Pool, n_classes: int) -> Images:
        available = glyph_datasets.known(self.cache_dir)
        characters = glyph_datasets.chosen(available, pool, n_classes)
        return glyph_datasets.made(
            characters,
            available.faces_of(characters),
            (self.train_per_class, self.test_per_class),
            self.image_size,
            self.cache_dir,
        )


@dataclass(kw_only=True)
class FontDomains(DomainIncrementalImages):
    """The same characters, each experience in other faces; by default 4 families of faces.

    Source: as `Glyphs`.
    Licence: as `Glyphs`.
    Sizes: `train_per_class` and `test_per_class` images of each of `n_classes` characters in each
    experience.
    Splits: TUNE and EVALUATE have different characters; all of them are drawn by every face. The
    seed orders the experiences.

    Attributes:
        n_experiences: Groups of faces, of equal size: 4 are the families, 16 single faces.
        n_classes: Characters.
        train_per_class: Training images of each in each experience.
        test_per_class: Test images of each in each experience.
        image_size: Side in pixels.
        cache_dir: Where rendered images are kept; None: the user's cache folder.
    """

    n_experiences: int = 4
    n_classes: int = 20
    train_per_class: int = 100
    test_per_class: int = 20
    image_size: int = 32
    cache_dir: Path | None = field(default=None, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "n_classes", "train_per_class", "test_per_class", at_least=1)
        require(self, "image_size", at_least=8)

    def domains(self, split: Split, seed: int) -> Domains:
        available = glyph_datasets.known(self.cache_dir)
        drawn_by = available.faces
        characters = glyph_datasets.chosen(available, POOLS[split], self.n_classes, drawn_by)
        size = len(drawn_by) // self.n_experiences
        groups = [drawn_by[i : i + size] for i in range(0, len(drawn_by), size)]
        order = domain_order(self.n_experiences, seed).tolist()
        counts = self.train_per_class, self.test_per_class
        parts = [
            glyph_datasets.made(
                characters,
                [groups[g]] * len(characters),
                counts,
                self.image_size,
                self.cache_dir,
                seed=g,
            )
            for g in order
        ]
        which = torch.arange(self.n_experiences)
        return Domains(
            glyph_datasets.joined(parts),
            [_title(groups[g], drawn_by) for g in order],
            which.repeat_interleave(len(parts[0].train)),
            which.repeat_interleave(len(parts[0].test)),
        )

    def check(self, split: Split) -> None:  # noqa: ARG002
        count = len(faces())
        if count % self.n_experiences:
            works = [str(n) for n in range(1, count + 1) if count % n == 0]
            raise UserError(
                f"scenario.n_experiences={self.n_experiences} does not divide the {count} faces. "
                f"Use one of {', '.join(works)}."
            )

    def fingerprint(self) -> Mapping[str, Any]:
        return glyph_datasets.fingerprint()


def _title(group: Sequence[Face], everyone: Sequence[Face]) -> str:
    """The family, if the group is just that; else the names of its faces."""
    family = group[0].family
    if list(group) == [face for face in everyone if face.family == family]:
        return family
    return ", ".join(face.name for face in group)
