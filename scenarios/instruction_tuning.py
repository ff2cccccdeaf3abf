"""Continual instruction tuning: a language model learns one task after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from clbench import source_model
from clbench.machine import isolated_rng
from clbench.text import string_tasks
from clbench.text.instructions import (
    Instructions,
    InstructionScenario,
    Part,
    rows_sha256,
    text_source,
)
from clbench.text.language_model import LanguageModel
from clbench.text.string_tasks import StringTask, examples
from clbench.types import Split, Stream, require


@dataclass(kw_only=True)
class StringInstructions(InstructionScenario):
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
        base_epochs: Passes over the base; 0: the model keeps its random weights.
        base_lr: Largest learning rate then.
    """

    per_task: int = 600
    tests_per_task: int = 50
    base_per_task: int = 3000
    base_tests_per_task: int = 25
    base_epochs: int = 3
    base_lr: float = 4e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "per_task", "tests_per_task", "base_per_task", at_least=1)
        require(self, "base_tests_per_task", at_least=1)
        require(self, "base_epochs", at_least=0)
        require(self, "base_lr", above=0)

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

    def fresh(self, stream: Stream) -> LanguageModel:
        # Of one seed for all runs: what is taught is made once.
        with isolated_rng(0, "string instructions"):
            model = super().fresh(stream)
        assert stream.source is not None
        if self.base_epochs:
            recipe = source_model.Recipe(epochs=self.base_epochs, batch_size=32, lr=self.base_lr)
            loss = self.objective().loss
            source_model.train(
                model, stream.source, recipe, self._key(stream), self.cache_dir, loss
            )
        return model

    def _key(self, stream: Stream) -> Mapping[str, Any]:
        assert stream.source is not None
        made = self.language_model
        # What is tuned later does not change what is taught now.
        decided = {
            name: value
            for name, value in source_model.described(made).items()
            if not name.startswith(("lora_", "peft_", "tuning", "gradient_", "micro_"))
        }
        tokenizer = text_source(stream.source).tokenizer
        return {
            "language_model": {"name": made.title, **decided},
            "tokenizer": dict(tokenizer.facts()),
            "rows": rows_sha256(stream.source),
        }

    def model_facts(self, model: nn.Module) -> Mapping[str, Any]:
        facts = dict(super().model_facts(model))
        if self.base_epochs:
            facts["source_model_sha256"] = source_model.digest(model)
        return facts
