"""O-LoRA: new low-rank updates orthogonal to those of earlier experiences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.samples import Batch
from clbench.text.lora import LowRankStrategy
from clbench.types import Context, Experience, require


@dataclass(kw_only=True)
class OLoRA(LowRankStrategy):
    """A new low-rank update for each experience, that reads what earlier ones do not read.

    Paper: Wang, Chen, Ge, Xia, Bao, Zheng, Zhang, Gui and Huang 2023, "Orthogonal Subspace
    Learning for Language Model Continual Learning", Findings of EMNLP, arXiv 2310.14152; code:
    cmnfriend/O-LoRA. Not the initialisation that peft calls "olora" (Büyükakyüz 2024).

    Equation: y = W x + (lora_alpha / lora_rank) Σ_{s≤t} B_s A_s x; in experience t, minimise over
    A_t and B_t

        CE + lambda1 Σ_layers Σ_{s<t} Σ_ij |(A_s A_tᵀ)_ij| + lambda2 Σ_layers (‖A_t‖₂ + ‖B_t‖₂),

    B_t = 0 at its beginning. Norms are Frobenius norms, not squared; sums are not normalised, so
    lambda1 belongs to a rank, a width and a number of layers. Earlier updates are kept as a part
    of W, which computes the same, and their A beside it: lora_rank rows of each layer and
    experience.

    Attributes:
        lambda1: Weight of the overlap with earlier updates.
        lambda2: Weight of the norms of the new one.

    **Differs from the paper:** nothing in the equations. With dropout, earlier updates have none.
    The default are all linear layers; the paper's are queries and values, lora_rank=8,
    lora_alpha=32, lora_dropout=0.1, lr=1e-3, lambda1=0.5, lambda2=0 (for fifteen tasks lambda1=5
    from dbpedia on, lambda2 up to 0.3). Its code adds up the sums in the precision of the run,
    here they are in fp32.
    """

    lambda1: float = 0.5
    lambda2: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "lambda1", "lambda2", at_least=0)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.earlier = [u.a.detach()[:0].clone() for u in self._updates]

    def before(self, experience: Experience) -> None:  # noqa: ARG002
        self.fold()

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + self.penalty()

    def penalty(self) -> Tensor:
        """What is added to the loss, a scalar."""
        total = torch.zeros((), device=self.context.device)
        for old, update in zip(self.earlier, self._updates, strict=True):
            if self.lambda1 and len(old):
                total = total + self.lambda1 * (old @ update.a.T).abs().sum()
            if self.lambda2:
                total = total + self.lambda2 * (update.a.norm() + update.b.norm())
        return total

    def after(self, experience: Experience) -> None:  # noqa: ARG002
        self.earlier = [
            torch.cat((old, update.a.detach()))
            for old, update in zip(self.earlier, self._updates, strict=True)
        ]
