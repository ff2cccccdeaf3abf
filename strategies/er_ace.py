"""ER-ACE: experience replay with an asymmetric cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.nn.memory import Memory
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import Context


@dataclass(kw_only=True)
class ERACE(GradientStrategy):
    """Lets arriving samples push against classes of their own batch only.

    Paper: Caccia, Aljundi, Asadi, Tuytelaars, Pineau and Belilovsky 2022, "New Insights on
    Reducing Abrupt Representation Change in Online Continual Learning", arXiv 2104.05025.

    Equation: minimise CE(h(x), y; C) on the arriving batch + CE(h(x'), y') on a batch drawn from
    the memory, a forward pass each. C are the classes that the softmax runs over: those in the
    arriving batch and those that have not come yet. The memory's softmax runs over all.

    **Differs from the paper:** the head is the scenario's (the official code uses cosines times
    10: scenario.head=cosine); the official code takes every class numbered from the largest one
    met upwards for "not yet come", here it is exactly those that no batch has held.
    """

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.memory = Memory(context.scenario.memory_size, context)
        self.met = torch.zeros(context.n_outputs, dtype=torch.bool, device=context.device)

    def loss(self, batch: Batch) -> Tensor:
        objective = self.context.objective
        competing = (~self.met).index_fill(0, batch.targets, True)
        outputs = self.forward(batch.inputs).masked_fill(~competing, -torch.inf)
        loss = objective.loss(outputs, batch.targets)
        if not len(self.memory):
            return loss
        recalled = self.memory.draw(self.context.memory_batch_size)
        return loss + objective.loss(self.forward(recalled.inputs), recalled.targets)

    def observe(self, batch: Batch) -> None:
        self.met.index_fill_(0, batch.targets, True)
        self.memory.add(batch)

    @property
    def memory_samples(self) -> int:
        return len(self.memory)
