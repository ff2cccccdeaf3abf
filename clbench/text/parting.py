"""Which tasks and examples are for tuning and which for evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from clbench.division import TUNING_TEST_FRACTION, held_out
from clbench.errors import UserError
from clbench.text.encoding import Example, Task
from clbench.text.instruction_files import Item, read_items, sha256
from clbench.text.instructions import Instructions, InstructionScenario, Part
from clbench.types import LOCATION, Split, derive_seed, require

#: Names of the fields of an example, unless a user has others.
FIELDS = ("instruction", "input", "output")


def part_tasks(
    parts: Sequence[Part], split: Split, experiences: int, tuning_fraction: float
) -> tuple[list[Part], str]:
    """One split of some tasks.

    With tasks enough for two (twice `experiences` are there), TUNE and EVALUATE get different
    ones, as many each, drawn once and for all. Else they share tasks and no example: see
    `part_examples`.

    Args:
        parts: All tasks.
        split: Which part of them.
        experiences: Tasks of a split; 0: all.
        tuning_fraction: See `part_examples`.

    Returns:
        The tasks of the split in their old order, and the rule: "disjoint tasks" or "disjoint
        examples".

    Raises:
        UserError: If there are too few.
    """
    wanted = experiences or len(parts)
    if wanted > len(parts):
        raise UserError(
            f"scenario.experiences={experiences}, but there are {len(parts)} tasks. "
            f"Use 1 to {len(parts)}, or 0 for all."
        )
    generator = torch.Generator().manual_seed(derive_seed(0, "division of tasks"))
    order = torch.randperm(len(parts), generator=generator).tolist()
    if 2 * wanted <= len(parts):
        mine = order[:wanted] if split is Split.EVALUATE else order[wanted : 2 * wanted]
        return [parts[i] for i in sorted(mine)], "disjoint tasks"
    chosen = [parts[i] for i in sorted(order[:wanted])]
    return [part_examples(part, split, tuning_fraction) for part in chosen], "disjoint examples"


def part_examples(part: Part, split: Split, tuning_fraction: float) -> Part:
    """One split of the examples of a task.

    TUNE gets `tuning_fraction` of those to learn from, a fifth of which it is tested on; EVALUATE
    gets the others and the whole test.

    Args:
        part: The task.
        split: Which part of its examples.
        tuning_fraction: In [0, 1).

    Raises:
        UserError: If TUNE would have nothing to learn or to be tested on.
    """
    rest, tuning = parted(part.train, tuning_fraction, f"tuning {part.task.name}")
    if split is Split.EVALUATE:
        return replace(part, train=rest)
    train, test = parted(tuning, TUNING_TEST_FRACTION, f"tuning test {part.task.name}")
    if not (train and test):
        raise UserError(
            f"The task {part.task.name} has {len(part.train)} examples to learn from, of which "
            f"scenario.tuning_fraction={tuning_fraction} leaves too few to tune on. Raise it."
        )
    return replace(part, train=train, test=test)


def parted(
    examples: Sequence[Example], fraction: float, purpose: str
) -> tuple[list[Example], list[Example]]:
    """Two parts of some examples, the second with this fraction of them; always the same ones.

    Where answers repeat, each answer has its share in both. Equal prompts stay together, so that
    none is both learned and asked.
    """
    prompts: dict[tuple[str, str], list[int]] = {}
    for position, example in enumerate(examples):
        prompts.setdefault((example.instruction, example.input), []).append(position)
    groups = list(prompts.values())
    answers = [examples[group[0]].outputs[0] for group in groups]
    number = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
    # Answers that are all different are one stratum: a share of each would be all or none.
    few = 2 * len(number) <= len(groups)
    strata = torch.tensor([number[a] if few else 0 for a in answers], dtype=torch.int64)
    kept, taken = held_out(strata, fraction, purpose)
    first, second = (sorted(p for g in part.tolist() for p in groups[g]) for part in (kept, taken))
    return [examples[i] for i in first], [examples[i] for i in second]


def few_answers(examples: Sequence[Example]) -> tuple[str, ...]:
    """The answers that there are, if they are few beside the examples; else none.

    Few: at most 30, and each is given ten times on average.
    """
    answers = sorted({example.outputs[0] for example in examples})
    return tuple(answers) if len(answers) <= min(30, len(examples) // 10) else ()


@dataclass(kw_only=True)
class PartedInstructions(InstructionScenario):
    """Base of the scenarios whose tasks lie in files of the user's.

    Attributes:
        experiences: Tasks of the stream; 0: all.
        tuning_fraction: Part of each task's examples that is for tuning, where the tasks are too
            few for splits without a common one; 0: none.
        general: A file of JSON lines {instruction, input, output}: what the model could do before
            and is to keep. Measured after every experience, never trained on; null: nothing is.
    """

    experiences: int = 0
    tuning_fraction: float = 0.2
    general: Path | None = field(default=None, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "experiences", at_least=0)
        require(self, "tuning_fraction", at_least=0, at_most=0.9)

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """What the tasks are read from."""

    @abstractmethod
    def whole(self) -> Instructions:
        """All tasks with all examples."""

    def instructions(self, split: Split) -> Instructions:
        found = self.whole()
        parts, rule = part_tasks(found.parts, split, self.experiences, self.tuning_fraction)
        facts = {**found.facts, "division": rule}
        return replace(found, parts=parts, base=self.base(), facts=facts)

    def base(self) -> list[Part]:
        """What is measured after every experience."""
        if self.general is None:
            return []
        kept = [example_of(item) for item in read_items(self.general)]
        return [Part(Task("general", labels=few_answers(kept)), [], kept)]

    def fingerprint(self) -> Mapping[str, Any]:
        extra = [self.general] if self.general else []
        return {"files": sha256([*self.files(), *extra])}

    def check(self, split: Split) -> None:
        for path in [*self.files(), *([self.general] if self.general else [])]:
            if not path.is_file():
                raise UserError(f"There is no file {path.absolute()}.")
        if split is Split.TUNE and not self.tuning_fraction and not self.experiences:
            raise UserError(
                "There is nothing to tune on: scenario.tuning_fraction=0 leaves all examples to "
                "split=evaluate. Set scenario.tuning_fraction=0.2."
            )


def example_of(item: Item, names: tuple[str, str, str] = FIELDS) -> Example:
    """An object with an instruction, an input and one output or several.

    Args:
        item: Of a file.
        names: Of these fields.

    Raises:
        UserError: If one is missing or no text.
    """
    instruction, text, output = names
    return Example(item.text(instruction), item.text(text), item.texts(output))
