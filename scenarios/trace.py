"""TRACE: eight tasks for aligned language models, from stance detection to simplification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clbench.errors import UserError
from clbench.text.encoding import Example, Task
from clbench.text.instruction_files import read_items
from clbench.text.instructions import Instructions, Part
from clbench.text.parting import PartedInstructions, few_answers
from clbench.types import LOCATION, Split

#: The tasks in their order, what scores each, and how often each is gone through.
TASKS: Sequence[tuple[str, str, int]] = (
    ("C-STANCE", "strict_match", 5),
    ("FOMC", "strict_match", 3),
    ("MeetingBank", "rouge_l", 7),
    ("Py150", "edit_similarity", 5),
    ("ScienceQA", "first_character", 3),
    ("NumGLUE-cm", "strict_match", 5),
    ("NumGLUE-ds", "strict_match", 5),
    ("20Minuten", "sari", 7),
)


@dataclass(kw_only=True)
class Trace(PartedInstructions):
    """TRACE's tasks in its file layout, its order, its number of passes and its scores.

    Source: github.com/BeyonderXX/TRACE (Wang et al. 2023, arXiv 2310.06762).
    Licence: each dataset has its own; see its makers.
    Sizes: 5000 examples to learn from and 2000 to be scored on in each task, or 500 of a smaller
    edition; eval.json is not read.
    Splits: TUNE has other tasks, where `experiences` asks for no more than half of them; else a
    part of each task's training examples.

    Attributes:
        root: Folder with <task>/{train,test}.json, lists of {prompt, answer}.
        published_passes: Go through each task as often as published (5, 3, 7, 5, 3, 5, 5, 7), for
            each epoch of the scenario. The passes of a task are shuffled together.

    Differs from TRACE: ROUGE-L is rouge_score's with stemming, not that of the package `rouge`;
    answers are greedy, where TRACE samples at temperature 0.1; spaces around an answer do not
    count. Scores are fractions. General ability is what `general` says, not TRACE's benchmarks.
    """

    root: Path | None = field(default=None, metadata=LOCATION)
    published_passes: bool = True

    def check(self, split: Split) -> None:
        if self.root is None or not self.root.is_dir():
            raise UserError(
                f"scenario.root={self.root} is no folder. Name the one that holds C-STANCE, FOMC "
                "and the other tasks of TRACE."
            )
        super().check(split)

    def files(self) -> list[Path]:
        return [path for name, _, _ in TASKS for path in self._files(name)]

    def whole(self) -> Instructions:
        parts = []
        for name, score, passes in TASKS:
            train, test = (self._examples(path) for path in self._files(name))
            task = Task(name, score, few_answers(train) if score == "strict_match" else ())
            parts.append(Part(task, train, test, passes if self.published_passes else 1))
        return Instructions(parts, ordered=True)

    def _files(self, name: str) -> list[Path]:
        folder = (self.root or Path()) / name
        return [folder / "train.json", folder / "test.json"]

    def _examples(self, path: Path) -> list[Example]:
        return [Example("", i.text("prompt"), (i.text("answer"),)) for i in read_items(path)]
