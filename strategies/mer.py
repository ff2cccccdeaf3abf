"""MER: replay, and now and then most of the way back to older weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clbench.training import Wrapper
from clbench.types import LABELLED, Context, Setting, require


@dataclass(kw_only=True)
class MER(Wrapper):
    """Meta-experience replay: the base's steps, interpolated with earlier weights by Reptile.

    Paper: Abbes, Subbaraj, Riemer, Islah, Thérien, Tabaru, Kingetsu, Chandar and Rish 2025,
    "Revisiting Replay and Gradient Alignment for Continual Pre-Training of Large Language
    Models", arXiv 2508.01908; the idea: Riemer et al. 2019, arXiv 1810.11910; Reptile: Nichol,
    Achiam and Schulman 2018, arXiv 1803.02999.

    Equation: every `interval` steps of the base, θ ← θ_old + epsilon (θ − θ_old), then θ_old ← θ.
    To second order this adds to the loss a reward for gradients of different steps, old samples
    among them, that point the same way. Steps are counted over the whole stream, wherever
    experiences begin; what is evaluated are the weights as they are, in the middle of an interval
    too.

    Attributes:
        base: The method that takes the steps; replay in the paper. How much of a batch is
            replayed is the scenario's: memory_batch_size / (memory_batch_size + batch_size).
        interval: k, steps between interpolations.
        epsilon: Part of the way that is kept, in [0, 1]; 1: the base alone.

    **Differs from the paper:** samples lie in memory, not on disk; the learning rate has the
    base's schedule. The released arguments are interval=500 and epsilon=0.01, which taken
    literally undo 99 % of every 500 steps; in the released loop the optimizer's own copy of the
    weights may overwrite that at the next step (our reading of it, not tried). The defaults here
    are ours. Only parameters are interpolated: running statistics and the optimizer's moments
    go on as they are.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    interval: int = 50
    epsilon: float = 0.3

    def __post_init__(self) -> None:
        require(self, "interval", at_least=1)
        require(self, "epsilon", at_least=0, at_most=1)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.steps = 0
        self.old_weights = [p.detach().clone() for p in self.model.parameters()]

    def update(self, loss: Tensor) -> None:
        super().update(loss)
        self.steps += 1
        if self.steps % self.interval == 0:
            self.interpolate()

    @torch.no_grad()
    def interpolate(self) -> None:
        """Back towards the weights of the last interpolation, which these become."""
        weights = [p.detach() for p in self.model.parameters()]
        if self.epsilon < 1:
            torch._foreach_lerp_(self.old_weights, weights, self.epsilon)
            torch._foreach_copy_(weights, self.old_weights)
