"""Datasets of Hugging Face's library, in a folder or on its hub: images, and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from clbench import cache, huggingface
from clbench.classification import Images
from clbench.division import DividedImages, held_out
from clbench.errors import UserError
from clbench.samples import TensorSource
from clbench.text.encoding import Example, Task
from clbench.text.instruction_files import Item
from clbench.text.instructions import Instructions, Part
from clbench.text.parting import FIELDS, PartedInstructions, few_answers, parted
from clbench.types import LOCATION, Split, require

_VERSION = 1


@dataclass(kw_only=True)
class HuggingFaceImages(DividedImages):
    """Labelled images of a dataset that `datasets` can load, class-incremental.

    Needs the extra `huggingface`. Code of a dataset is never run.

    Source: a folder of the user's (what `save_to_disk` wrote, or files that `datasets` knows), or
    a dataset of the hub by name, of which the commit is part of a run's identity.
    Licence: that of the dataset.
    Sizes: as many images as there are; decoded once into an array in the cache folder.
    Splits: TUNE and EVALUATE get different classes if there are twice as many as
    `scenario.classes` asks for, else different samples; see `clbench.division.divide`. Without a
    split for testing, `test_fraction` of each class's images, always the same ones, are for it.

    Attributes:
        path: The folder, or the name on the hub: owner/name.
        configuration: Which of the dataset's configurations; None: its only or default one.
        revision: Branch, tag or commit of the hub's dataset; None: the newest.
        train_split: Name of the split to learn from.
        test_split: Name of the split to test on; "": "test", if there is one.
        image_column: Column of the images; "": the only one of its type.
        label_column: Column of the labels; "": the only one of type ClassLabel.
        image_size: Side in pixels: centred square, resized; 0: the first image's size.
        channels: 3 (RGB) or 1 (luma, ITU-R 601).
        test_fraction: Part of each class that is for testing where there is no split for it.
        cache_dir: Where decoded images are kept; None: the user's cache folder.
    """

    path: str = field(default="", metadata=LOCATION)
    configuration: str | None = None
    revision: str | None = field(default=None, metadata=LOCATION)
    train_split: str = "train"
    test_split: str = ""
    image_column: str = ""
    label_column: str = ""
    image_size: int = 0
    channels: Literal[1, 3] = 3
    test_fraction: float = 0.2
    cache_dir: Path | None = field(default=None, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "image_size", at_least=0)
        require(self, "test_fraction", above=0, at_most=0.9)

    @cached_property
    def table(self) -> huggingface.Table:
        """The dataset as it was when this was first asked for."""
        if not self.path:
            raise UserError("scenario.path is not set. Give a folder, or owner/name on the hub.")
        return huggingface.opened(self.path, self.configuration, self.revision, self.cache_dir)

    @cached_property
    def parts(self) -> list[Any]:
        """The split to learn from, and the one to test on if there is one."""
        test = self.test_split or ("test" if "test" in self.table.splits else "")
        train = self.table.split(self.train_split, "scenario.train_split")
        return [train, *([self.table.split(test, "scenario.test_split")] if test else [])]

    @cached_property
    def labels(self) -> tuple[list[Any], list[str]]:
        """Labels of the parts, and the names of the classes."""
        return huggingface.labels(self.parts, self._column(self.label_column, "ClassLabel"))

    @property
    def n_classes(self) -> int:
        return len(self.labels[1])

    def whole(self) -> Images:
        (learned, *tested), names = self.labels
        column = self._column(self.image_column, "Image")
        key = {
            **self.fingerprint(),
            "column": column,
            "splits": [self.train_split, self.test_split],
            "options": [self.configuration, self.image_size, self.channels, _VERSION],
        }
        folder = self.cache_dir or cache.default_folder()
        stored = cache.arrays(
            folder,
            "huggingface",
            key,
            lambda: huggingface.images(self.parts, column, self.image_size, self.channels),
        )
        pixels, targets = torch.from_numpy(stored["images"]), torch.from_numpy(learned)
        if tested:
            n = len(targets)
            train = TensorSource(pixels[:n], targets)
            test = TensorSource(pixels[n:], torch.from_numpy(tested[0]))
        else:
            learn, check = held_out(targets, self.test_fraction, "test")
            train = TensorSource(pixels[learn], targets[learn])
            test = TensorSource(pixels[check], targets[check])
        mean, std = stored["mean"].tolist(), stored["std"].tolist()
        return Images(train, test, names, mean, std, {"dataset": dict(self.table.identity)})

    def fingerprint(self) -> Mapping[str, Any]:
        return {"dataset": dict(self.table.identity)}

    def _column(self, name: str, kind: str) -> str:
        option = f"scenario.{'image' if kind == 'Image' else 'label'}_column"
        return huggingface.column(self.parts[0], name, kind, option, self.path)


@dataclass(kw_only=True)
class HuggingFaceText(PartedInstructions):
    """Rows of text of datasets that `datasets` can load, as instructions and answers.

    Needs the extras `huggingface` and `text`. Code of a dataset is never run. A column of type
    ClassLabel is read as the names of its classes, so a dataset for text classification is one
    whose output is its label.

    Source: folders of the user's, or datasets of the hub by name; see `HuggingFaceImages`.
    Licence: that of the datasets.

    Attributes:
        paths: Folders, or names on the hub: each is one experience, unless `by` is set.
        configuration: Which of a dataset's configurations; None: its only or default one.
        revision: Branch, tag or commit of a hub's dataset; None: the newest.
        by: Column whose value tells experiences apart; empty: each dataset is one.
        fields: Names of the columns for instruction, input and output; an empty name: none.
        instruction: What is asked of every row, before what the column says.
        train_split: Name of the split to learn from.
        test_split: Name of the split to be scored on; "": "test", if there is one.
        score: What an answer is scored by: see `clbench.text.scores`.
        test_fraction: Part of each experience that it is scored on, where there is no split.
        keep_order: Experiences come as they are first met, whatever the seed.
    """

    paths: tuple[str, ...] = field(default=(), metadata=LOCATION)
    configuration: str | None = None
    revision: str | None = field(default=None, metadata=LOCATION)
    by: str = ""
    fields: tuple[str, str, str] = FIELDS
    instruction: str = ""
    train_split: str = "train"
    test_split: str = ""
    score: Literal[
        "exact_match", "strict_match", "first_character", "rouge_l", "edit_similarity", "sari"
    ] = "exact_match"
    test_fraction: float = 0.2
    keep_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "test_fraction", above=0, at_most=0.9)

    @cached_property
    def tables(self) -> list[huggingface.Table]:
        """The datasets as they were when this was first asked for."""
        if not self.paths:
            raise UserError(
                "scenario.paths is not set. Give folders, or names on the hub, as in "
                "scenario.paths=[owner/name]."
            )
        return [
            huggingface.opened(path, self.configuration, self.revision, self.cache_dir)
            for path in self.paths
        ]

    def files(self) -> Sequence[Path]:
        return ()

    def fingerprint(self) -> Mapping[str, Any]:
        identities = [dict(table.identity) for table in self.tables]
        return {**super().fingerprint(), "datasets": identities}

    def check(self, split: Split) -> None:
        for table in self.tables:
            table.split(self.train_split, "scenario.train_split")
        super().check(split)

    def whole(self) -> Instructions:
        learned: dict[str, list[Example]] = {}
        asked: dict[str, list[Example]] = {}
        for table in self.tables:
            test = self.test_split or ("test" if "test" in table.splits else "")
            self._read(table, self.train_split, "scenario.train_split", learned)
            if test:
                self._read(table, test, "scenario.test_split", asked)
        parts = [self._part(name, found, asked.get(name)) for name, found in learned.items()]
        return Instructions(parts, ordered=self.keep_order)

    def _read(
        self, table: huggingface.Table, split: str, option: str, told: dict[str, list[Example]]
    ) -> None:
        rows = table.split(split, option)
        for number, row in enumerate(huggingface.texts(rows), 1):
            item = Item(row, Path(table.where), number)
            name = item.text(self.by) if self.by else Path(table.where).name
            told.setdefault(name, []).append(self._example(item))

    def _example(self, item: Item) -> Example:
        asked, read, answered = self.fields
        words = [self.instruction, item.text(asked) if asked else ""]
        instruction = " ".join(filter(None, words))
        return Example(instruction, item.text(read) if read else "", item.texts(answered))

    def _part(self, name: str, found: list[Example], asked: list[Example] | None) -> Part:
        train, test = (found, asked) if asked else parted(found, self.test_fraction, f"test {name}")
        if not (train and test):
            raise UserError(
                f"The experience {name!r} has {len(found)} examples, too few to learn and to be "
                "scored. Add some, or raise scenario.test_fraction."
            )
        return Part(Task(name, self.score, few_answers(train)), train, test)
