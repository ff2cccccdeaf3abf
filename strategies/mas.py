"""MAS: memory aware synapses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.nn.anchor import Anchor
from clbench.nn.sample_gradients import mean_gradient_powers
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import LABELLED, Context, Experience, Setting, require


@dataclass(kw_only=True)
class MAS(GradientStrategy):
    """Holds each weight as firmly as the outputs are sensitive to it. Labels play no part.

    Paper: Aljundi, Babiloni, Elhoseiny, Rohrbach and Tuytelaars 2018, "Memory Aware Synapses:
    Learning what (not) to forget", arXiv 1711.09601; the global form.

    Equation: minimise CE(h(x), y) + mas_lambda Σ_i Ω_i (θ_i − θ_i*)², θ* from the end of the
    latest experience; then Ω_i ← Ω_i + E_x |∂‖h(x)‖² / ∂θ_i| over its samples.

    Attributes:
        mas_lambda: Weight of the penalty. SGD diverges once lr·mas_lambda·Ω > 1.
        gradients: Of each "sample", as in the paper, or the mean gradient of each "batch",
            as Avalanche and FACIL have it: smaller, since signs cancel in a batch.
        accumulate: "sum", as above, or "decay": Ω_i ← decay·Ω_i + (1 − decay)·E_x |...| from the
            second experience on, as Avalanche and FACIL have it.
        decay: What one more experience leaves of the old Ω, in [0, 1]; "decay" only.
        importance_samples: Samples of each experience that estimate Ω, drawn at random; 0: all.

    **Differs from the paper:** nothing in the equations. All heads are one: h has the outputs of
    classes still to come, and the penalty holds their weights too. The official code sums the
    gradients of 200 samples before it takes their magnitude ("batch", with batches of 200);
    FACIL differentiates ‖h‖ in place of ‖h‖² and halves the penalty. The paper's mas_lambda of 1
    goes with a learning rate of 0.0008; the default has about the same product at 0.1.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    mas_lambda: float = 0.01
    gradients: Literal["sample", "batch"] = "sample"
    accumulate: Literal["sum", "decay"] = "sum"
    decay: float = 0.5
    importance_samples: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "mas_lambda", "importance_samples", at_least=0)
        require(self, "decay", at_least=0, at_most=1)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.anchor = Anchor(model)

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + self.anchor.penalty()

    def after(self, experience: Experience) -> None:
        assert experience.train is not None
        count, device = len(experience.train), self.context.device
        order = torch.randperm(count, generator=self.context.generator("importance"), device=device)
        by_batch = self.gradients == "batch"
        importance = mean_gradient_powers(
            self.model,
            experience.train,
            _squared_norm,
            power=1,
            names=self.anchor.names,
            order=order[: self.importance_samples or count],
            batch_size=self.context.scenario.batch_size if by_batch else 128,
            of_batches=by_batch,
        )
        keep = take = 1.0
        if self.accumulate == "decay" and self.anchor.active:
            keep, take = self.decay, 1 - self.decay
        old = self.anchor.curvature()  # 2 mas_lambda Ω
        new = self.anchor.in_order(importance)
        take *= 2 * self.mas_lambda
        self.anchor.move([keep * c + take * omega for c, omega in zip(old, new, strict=True)])


def _squared_norm(outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:  # noqa: ARG001
    """∂‖h‖² / ∂h."""
    yield 2 * outputs
