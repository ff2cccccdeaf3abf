"""Continual instruction tuning: a language model learns one task after another."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.text import string_tasks
from clbench.text.instructions import Instructions, Part
from clbench.text.string_tasks import StringTask, examples
from clbench.text.taught import TaughtInstructions
from clbench.types import Split, require


@dataclass(kw_only=True)
class StringInstructions(TaughtInstructions):
    """Tasks on short strings, for a model that was taught others before: nothing to fetch.

    A model with random weights is first taught a base mixture (copy, first, last, tail, swap,
    after), once for all seeds; what it keeps of that is its general ability. Then come eight new
    tasks, or four others for tuning; several wordings mean each. An answer is right letter for
    letter.

    Source: made by `clbench.text.string_tasks`.
    Licence: none needed.
    Sizes: with the default options 8 x 600 examples to learn from, 8 x 50 to be scored on; 6 x
    3000 teach the base, 6 x 25 measure what is left of it.
    Splits: TUNE has the tasks rotate, double, subtract, join; EVALUATE reverse, sort, count,
    upper, add, spell, earlier, vowels. They share the model that was taught, and measure what is
    left of the base on different inputs.

    Attributes:
        per_task: Examples of each new task to learn from.
        tests_per_task: Examples of each task to be scored on.
        base_per_task: Examples of each task of the base to be taught.
        base_tests_per_task: Examples of each task of the base to measure general ability.
    """

    per_task: int = 600
    tests_per_task: int = 50
    base_per_task: int = 3000
    base_tests_per_task: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "per_task", "tests_per_task", "base_per_task", at_least=1)
        require(self, "base_tests_per_task", at_least=1)

    def instructions(self, split: Split) -> Instructions:
        new = string_tasks.NEW if split is Split.EVALUATE else string_tasks.TUNING
        base = [
            Part(
                task.task,
                examples(task, Split.EVALUATE, "train", self.base_per_task),
                examples(task, split, "test", self.base_tests_per_task),
            )
            for task in string_tasks.BASE.values()
        ]
        return Instructions([self._part(task, split) for task in new.values()], base)

    def _part(self, task: StringTask, split: Split) -> Part:
        return Part(
            task.task,
            examples(task, split, "train", self.per_task),
            examples(task, split, "test", self.tests_per_task),
        )
