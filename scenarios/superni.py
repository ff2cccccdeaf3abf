"""Super-NaturalInstructions: any of its task files as a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clbench.errors import UserError, did_you_mean
from clbench.text.encoding import Example, Task
from clbench.text.instruction_files import Item, read_items, read_object
from clbench.text.instructions import Instructions, Part
from clbench.text.parting import PartedInstructions, few_answers, parted
from clbench.types import LOCATION, Split, require

#: Of the instances of a task, the part that it is scored on.
TEST_FRACTION = 0.2


@dataclass(kw_only=True)
class SuperNI(PartedInstructions):
    """Task files of Natural Instructions, each an experience.

    A prompt is the definition, positive examples if wanted, and the input. Every answer is scored
    by ROUGE-L, the best over its references, as CITB (arXiv 2310.14510) and Natural Instructions
    do; training teaches the first reference.

    Source: github.com/allenai/natural-instructions (Wang et al. 2022, arXiv 2204.07705), folder
    tasks.
    Licence: Apache 2.0; each task's source has its own.
    Sizes: as many instances as the files of the user hold; a fifth of each is to be scored on.
    Splits: TUNE has other tasks, where `experiences` asks for no more than half of them; else a
    part of each task's training examples.

    Attributes:
        root: Folder with task*.json.
        tasks: Names of task files without .json; empty: all in the folder, by name.
        positive_examples: Shown in every prompt, at most; CITB shows two.
    """

    root: Path | None = field(default=None, metadata=LOCATION)
    tasks: tuple[str, ...] = ()
    positive_examples: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "positive_examples", at_least=0)

    def check(self, split: Split) -> None:
        if self.root is None or not self.root.is_dir():
            raise UserError(
                f"scenario.root={self.root} is no folder. Name the folder tasks of "
                "github.com/allenai/natural-instructions."
            )
        there = [path.stem for path in self.root.glob("*.json")]
        for name in self.tasks:
            if name not in there:
                raise UserError(f"scenario.tasks: no file {name}.json. {did_you_mean(name, there)}")
        if not there:
            raise UserError(f"scenario.root={self.root} holds no task file (*.json).")
        super().check(split)

    def files(self) -> list[Path]:
        root = self.root or Path()
        if self.tasks:
            return [root / f"{name}.json" for name in self.tasks]
        return sorted(root.glob("*.json"))

    def whole(self) -> Instructions:
        parts = [self._part(path) for path in self.files()]
        # Named tasks come in the order in which they are named.
        return Instructions(parts, ordered=bool(self.tasks))

    def _part(self, path: Path) -> Part:
        instruction = self._instruction(read_object(path))
        found = [
            Example(instruction, item.text("input"), item.texts("output"))
            for item in read_items(path, within="Instances")
        ]
        train, test = parted(found, TEST_FRACTION, f"test {path.stem}")
        if not (train and test):
            raise UserError(
                f"{path} has {len(found)} instances, too few to learn and to be scored."
            )
        return Part(Task(path.stem, "rouge_l", few_answers(train)), train, test)

    def _instruction(self, task: Item) -> str:
        lines = ["Definition: " + "\n".join(task.texts("Definition"))]
        shown = task.content.get("Positive Examples", [])
        if not isinstance(shown, list):
            raise task.wrong("Positive Examples", "is no list")
        for number, content in enumerate(shown[: self.positive_examples], 1):
            example = Item(_fields(content), task.path, task.line)
            lines += [
                f"Positive Example {number}-",
                f"Input: {example.text('input')}",
                f"Output: {example.text('output')}",
            ]
        return "\n".join([*lines, "Now complete the following example-"])


def _fields(content: Any) -> dict[str, Any]:
    return dict(content) if isinstance(content, Mapping) else {}
