"""Batch norms that divide by the statistics of what arrives; nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clbench.adaptation import Adaptation
from clbench.nn.batch_statistics import (
    MixedBatchNorm,
    normalise_by_batch,
    replace_batch_norms,
    stored_batch_norms,
)
from clbench.samples import Batch
from clbench.types import require


@dataclass(kw_only=True)
class BNAdapt(Adaptation):
    """Replaces the source's statistics in batch norms, in one of four ways.

    | statistics | μ, and σ² likewise | source |
    |---|---|---|
    | "batch" | μ_batch | Nado et al. 2020, arXiv 2006.10963 ("BN-1") |
    | "alpha" | (1 − alpha) μ_source + alpha μ_batch | Schneider et al. 2020, arXiv 2006.16971 |
    | "prior" | the same with alpha = n / (n + prior), n samples in the batch | the same; MEMO |
    | "ema" | μ ← (1 − momentum) μ + momentum μ_batch in every batch | as training keeps them |

    One forward pass for each batch; "ema" takes two: one in which each layer divides by the batch
    and moves its statistics, one with the moved statistics, which is scored.

    `predict` divides by the batch that it is asked about where `adapt` does, and by the moved
    statistics with "ema".

    **Differs from the paper:** σ²_batch of "alpha" and "prior" is the mean squared deviation, as
    "batch" has it, where the published codes mix in the unbiased one; see
    `clbench.nn.batch_statistics`. "ema" stores the unbiased one, as training does.

    Attributes:
        statistics: "batch", "alpha", "prior" or "ema".
        alpha: Share of the batch, in [0, 1].
        prior: How many samples the source's statistics count for; Schneider et al. tried 1 to
            1024, MEMO takes 16.
        momentum: Share of a new batch in the moving statistics, in [0, 1].
    """

    statistics: Literal["batch", "alpha", "prior", "ema"] = "batch"
    alpha: float = 0.1
    prior: float = 16.0
    momentum: float = 0.1

    def __post_init__(self) -> None:
        require(self, "alpha", "momentum", at_least=0, at_most=1)
        require(self, "prior", at_least=0)

    def prepare(self) -> None:
        self.model.requires_grad_(False)
        self._norms = stored_batch_norms(self.model)
        if self.statistics == "batch":
            normalise_by_batch(self.model)
        elif self.statistics == "alpha":
            replace_batch_norms(self.model, lambda norm: MixedBatchNorm(norm, alpha=self.alpha))
        elif self.statistics == "prior":
            replace_batch_norms(self.model, lambda norm: MixedBatchNorm(norm, prior=self.prior))
        else:
            for norm in self._norms:
                norm.momentum = self.momentum

    @torch.no_grad()
    def adapt(self, batch: Batch) -> Tensor:
        if self.statistics == "ema":
            self.move(batch)
        return self.predict(batch)

    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs)

    def move(self, batch: Batch) -> None:
        """Moves the stored statistics towards those of a batch."""
        for norm in self._norms:
            norm.train()
        self.forward(batch.inputs)
        for norm in self._norms:
            norm.eval()
