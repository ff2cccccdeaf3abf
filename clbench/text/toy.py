"""Instruction tasks so small that a whole run takes a fraction of a second."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from clbench.text.decoders import Decoder, Llama
from clbench.text.encoding import Example, Task
from clbench.text.instructions import Instructions, InstructionScenario, Part
from clbench.types import Split, derive_seed

_WORDS = "abcdefghijklmnopqrstuvwxyz"


def _tiny() -> Llama:
    """Random features of the size that trained ones have, so that it learns in a few steps."""
    return Llama(width=48, depth=1, heads=2, inner=48, context_length=64, spread=0.2)


@dataclass(kw_only=True)
class ToyInstructions(InstructionScenario):
    """Three tasks of four questions, each to be answered with one of two letters of the task.

    Nothing is known before the stream and nothing is kept on disk.

    Attributes:
        per_question: Training examples of each question.
    """

    language_model: Decoder = field(default_factory=_tiny)
    template: str = "{instruction}{input}"
    separator: str = ""
    epochs: int = 6
    batch_size: int = 8
    memory_size: int = 16
    per_question: int = 10

    def instructions(self, split: Split) -> Instructions:
        generator = torch.Generator().manual_seed(derive_seed(0, f"toy text {split.value}"))
        letters = [_WORDS[i] for i in torch.randperm(26, generator=generator).tolist()]
        parts = []
        for number in range(3):
            name, *labels = letters[3 * number : 3 * number + 3]
            coins = torch.randperm(4, generator=generator).tolist()
            asked = [
                Example(name, str(question), (labels[coin % 2],))
                for question, coin in enumerate(coins)
            ]
            parts.append(Part(Task(name, labels=tuple(labels)), asked * self.per_question, asked))
        return Instructions(parts)
