"""A-GEM: averaged gradient episodic memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clbench.nn.memory import Memory
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import LABELLED, Context, Setting


@dataclass(kw_only=True)
class AGEM(GradientStrategy):
    """Steps only where the average loss on the memory does not rise.

    Paper: Chaudhry, Ranzato, Rohrbach and Elhoseiny 2019, "Efficient Lifelong Learning with
    A-GEM", arXiv 1812.00420.

    Equation: g is the gradient on the arriving batch, r the one on a batch drawn from the
    memory. Where gᵀr < 0, step along g - (gᵀr / rᵀr) r, else along g.

    **Differs from the paper:** the memory is one reservoir over the whole stream (known as
    A-GEM-R) and so holds samples of the current experience too; the paper keeps equal parts of
    every earlier one. The projection is of the gradient, before momentum and weight decay.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.memory = Memory(context.scenario.memory_size, context)

    def update(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        self.context.differentiation.backward(loss)
        if len(self.memory):
            parameters = [p for p in self.trainable() if p.grad is not None]
            gradient = [p.grad for p in parameters if p.grad is not None]
            project(gradient, self._reference(parameters))
        self.descend()

    def _reference(self, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
        recalled = self.memory.draw(self.context.memory_batch_size)
        loss = self.context.objective.loss(self.forward(recalled.inputs), recalled.targets)
        return self.context.differentiation.gradients(loss, parameters)

    def observe(self, batch: Batch) -> None:
        self.memory.add(batch)

    @property
    def memory_samples(self) -> int:
        return len(self.memory)


def project(gradient: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """Takes out of a gradient, in place, what points against the reference.

    Args:
        gradient: One tensor per parameter.
        reference: Likewise, the same shapes.
    """
    pairs = list(zip(gradient, reference, strict=True))
    along = torch.stack([(g * r).sum() for g, r in pairs]).sum()
    square = torch.stack([(r * r).sum() for _, r in pairs]).sum()
    # No `if`: a GPU would have to be waited for. A zero reference gives 0/0, not chosen.
    share = torch.where(along < 0, along / square, 0.0)
    for g, r in pairs:
        g.sub_(share * r)
