"""Instructions of the user's own: a file, or a value of a field, is an experience."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clbench.errors import UserError
from clbench.text.encoding import Example, Task
from clbench.text.instruction_files import read_items
from clbench.text.instructions import Instructions, Part
from clbench.text.parting import FIELDS, PartedInstructions, example_of, few_answers, parted
from clbench.types import LOCATION, Split, require


@dataclass(kw_only=True)
class JSONLines(PartedInstructions):
    """Any files of {instruction, input, output}: JSON lines (.jsonl) or JSON lists (.json).

    `output` may be a list of right answers: training teaches the first, scoring accepts all.

    Source: files of the user.
    Licence: that of the files.

    Attributes:
        paths: Paths, or patterns such as data/*.jsonl; patterns are sorted by name.
        by: Field whose value tells experiences apart; empty: each file is one, by its name.
        fields: Names of the fields for instruction, input and output.
        score: What an answer is scored by: see `clbench.text.scores`.
        test_fraction: Part of each experience that it is scored on.
        keep_order: Experiences come as they are first met in the files, whatever the seed.
    """

    paths: tuple[str, ...] = field(default=(), metadata=LOCATION)
    by: str = ""
    fields: tuple[str, str, str] = FIELDS
    score: Literal[
        "exact_match", "strict_match", "first_character", "rouge_l", "edit_similarity", "sari"
    ] = "exact_match"
    test_fraction: float = 0.2
    keep_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "test_fraction", above=0, at_most=0.9)

    def check(self, split: Split) -> None:
        if not self.files():
            raise UserError(
                "scenario.paths names no file that is there. Set it to paths or patterns, as in "
                "scenario.paths=[data/*.jsonl]."
            )
        super().check(split)

    def files(self) -> list[Path]:
        found: list[Path] = []
        for entry in self.paths:
            path = Path(entry).expanduser()
            magic = any(character in path.name for character in "*?[")
            found += sorted(path.parent.glob(path.name)) if magic else [path]
        return found

    def whole(self) -> Instructions:
        told: dict[str, list[Example]] = {}
        for path in self.files():
            for item in read_items(path):
                name = item.text(self.by) if self.by else path.stem
                told.setdefault(name, []).append(example_of(item, self.fields))
        return Instructions(
            [self._part(name, found) for name, found in told.items()], ordered=self.keep_order
        )

    def _part(self, name: str, found: list[Example]) -> Part:
        train, test = parted(found, self.test_fraction, f"test {name}")
        if not (train and test):
            raise UserError(
                f"The experience {name!r} has {len(found)} examples, too few to learn and to be "
                "scored. Add some, or raise scenario.test_fraction."
            )
        return Part(Task(name, self.score, few_answers(train)), train, test)
