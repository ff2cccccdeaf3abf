"""Experience replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.nn.memory import Memory
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import LABELLED, Context, Setting


@dataclass(kw_only=True)
class Replay(GradientStrategy):
    """Trains on the arriving batch and a batch of stored samples together.

    Paper: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning",
    arXiv 1902.10486; class-balanced selection: Chrysakis and Moens 2020, "Online Continual
    Learning from Imbalanced Data".

    Equation: minimise CE over B ∪ B_M, B_M drawn uniformly from the memory, both in one forward
    pass; then offer B to the memory.

    Attributes:
        selection: "reservoir" or "class_balanced".

    **Differs from the paper:** several epochs offer the same sample to the reservoir several
    times, as the suites that train for many epochs do.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    selection: Literal["reservoir", "class_balanced"] = "reservoir"

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.memory = Memory(context.scenario.memory_size, context, self.selection)

    def loss(self, batch: Batch) -> Tensor:
        if not len(self.memory):
            return super().loss(batch)
        recalled = self.memory.draw(self.context.memory_batch_size)
        outputs = self.forward(torch.cat((batch.inputs, recalled.inputs)))
        targets = torch.cat((batch.targets, recalled.targets))
        return self.context.objective.loss(outputs, targets)

    def observe(self, batch: Batch) -> None:
        self.memory.add(batch)

    @property
    def memory_samples(self) -> int:
        return len(self.memory)
