"""EWC: elastic weight consolidation, a penalty for each experience or one that is carried on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.anchor import Anchor
from clbench.nn.fisher import Fisher, diagonal_fisher
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import LABELLED, Context, Experience, Setting, require


@dataclass(kw_only=True)
class EWC(GradientStrategy):
    """Holds each weight where it was, as firmly as old predictions depended on it.

    Paper: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
    arXiv 1612.00796; "online": Schwarz et al. 2018, "Progress & Compress", arXiv 1805.06370;
    estimates of F: van de Ven 2025, arXiv 2502.11756.

    Equation: minimise CE(h(x), y) + ½ ewc_lambda Σ_i P_i(θ), with for each weight i

    - "separate": P_i = Σ_k F_k,i (θ_i − θ_k,i)², a term for each earlier experience k;
    - "online": P_i = F_i (θ_i − θ_i*)², θ* from the latest experience, F ← gamma F + F_new.

    F is the diagonal Fisher information on the samples of an experience, under the weights θ_k
    at its end.

    Attributes:
        ewc_lambda: Weight of the penalty. It belongs to one `fisher`: what suits "exact" is too
            small for "batch" by about the batch size. SGD diverges once lr·ewc_lambda·ΣF > 2.
        form: "separate" or "online".
        gamma: What one more experience leaves of the old F, in [0, 1]; "online" only.
        fisher: "exact", "empirical", "weighted" or "batch"; see `clbench.nn.fisher`.
        fisher_samples: Samples of each experience that estimate F, drawn at random; 0: all.

    **Differs from the paper:** nothing in the equations of 2017, which leave the estimate open.
    All heads are one: F sees the softmax over all outputs and the penalty holds their weights
    too. The separate terms are kept as the one quadratic they sum to, so memory does not grow
    (two vectors); value and gradient are the same. The paper of 2018 multiplies the penalty by
    gamma once more, as if ewc_lambda were gamma·ewc_lambda. The default is Mammoth's, which
    leaves out the ½ and has "weighted"; van de Ven has 100 with Adam.
    Avalanche leaves out the ½ and has "batch" on batches in stored order (here it is drawn).
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    ewc_lambda: float = 10.0
    form: Literal["separate", "online"] = "separate"
    gamma: float = 1.0
    fisher: Fisher = "exact"
    fisher_samples: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "ewc_lambda", "fisher_samples", at_least=0)
        require(self, "gamma", at_least=0, at_most=1)
        if self.form == "separate" and self.gamma != 1:
            raise UserError(
                f"EWC: gamma={self.gamma} has no meaning with form=separate, where no term "
                "decays. Set gamma=1 or form=online."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.anchor = Anchor(model)

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + self.anchor.penalty()

    def after(self, experience: Experience) -> None:
        assert experience.train is not None
        count, device = len(experience.train), self.context.device
        order = torch.randperm(count, generator=self.context.generator("fisher"), device=device)
        fisher = diagonal_fisher(
            self.model,
            experience.train,
            self.fisher,
            names=self.anchor.names,
            order=order[: self.fisher_samples or count],
            batch_size=self.context.scenario.batch_size if self.fisher == "batch" else 128,
        )
        curvature = [self.ewc_lambda * f for f in self.anchor.in_order(fisher)]
        if self.form == "separate":
            self.anchor.add(curvature)
        else:
            old = self.anchor.curvature()
            self.anchor.move([self.gamma * c + n for c, n in zip(old, curvature, strict=True)])
