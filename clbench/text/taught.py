"""Streams for a language model that is taught other instructions before, once for all runs."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from clbench import source_model
from clbench.machine import isolated_rng
from clbench.text.instructions import InstructionScenario, rows_sha256, text_source
from clbench.text.language_model import LanguageModel
from clbench.types import Stream, require

#: Decides the bits of fresh weights: another name would be another model.
_PURPOSE = "string instructions"


@dataclass(kw_only=True)
class TaughtInstructions(InstructionScenario, ABC):
    """Base of the scenarios whose model is taught `Instructions.base`, where there is one.

    What it keeps of that is its general ability. Attributes:
        base_epochs: Passes over the base; 0: the model keeps the weights that it has.
        base_lr: Largest learning rate then.
    """

    base_epochs: int = 3
    base_lr: float = 4e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "base_epochs", at_least=0)
        require(self, "base_lr", above=0)

    def fresh(self, stream: Stream) -> LanguageModel:
        # Of one seed for all runs: what is taught is made once.
        with isolated_rng(0, _PURPOSE):
            model = super().fresh(stream)
        if self.base_epochs and stream.source is not None:
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
