"""SI: synaptic intelligence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clbench.nn.anchor import Anchor
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import LABELLED, Context, Experience, Setting, require


@dataclass(kw_only=True)
class SI(GradientStrategy):
    """Holds each weight as firmly as its own moves have lowered the loss so far.

    Paper: Zenke, Poole and Ganguli 2017, "Continual Learning Through Synaptic Intelligence",
    arXiv 1703.04200.

    Equation: minimise CE(h(x), y) + si_c Σ_i Ω_i (θ_i − θ_i*)², θ* from the end of the latest
    experience. In every step ω_i ← ω_i − g_i Δθ_i, g being the gradient of the cross-entropy
    alone and Δθ the move that the optimizer makes of the whole gradient. At the end
    Ω_i ← max(0, Ω_i + ω_i / (Δ_i² + xi)), Δ being the move over the whole experience; ω_i ← 0.

    Attributes:
        si_c: Weight of the penalty.
        xi: Damping, in squared weights: bounds Ω where a weight has hardly moved.

    **Differs from the paper:** Ω is kept at 0 or above, as in the official code (a negative Ω
    would push weights away without end); g is the gradient of the whole loss less the closed
    form 2 si_c Ω (θ − θ*) of the penalty's, which saves a backward pass. The defaults are
    Mammoth's, without its clipping of each gradient entry at 1; the official code has c 0.1 and
    ξ 0.1 on permuted MNIST with Adam.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    si_c: float = 0.5
    xi: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "si_c", at_least=0)
        require(self, "xi", above=0)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.anchor = Anchor(model)

    def before(self, experience: Experience) -> None:  # noqa: ARG002
        self._start = [p.detach().clone() for p in self.anchor.parameters]
        self._path = [torch.zeros_like(p) for p in self._start]  # ω
        self._gradients = [torch.zeros_like(p) for p in self._start]
        self._moves = [torch.zeros_like(p) for p in self._start]

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + self.anchor.penalty()

    def update(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        self.context.differentiation.backward(loss)
        weights = self.anchor.parameters
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        with torch.no_grad():
            # Before clipping, which changes gradients in place.
            self.anchor.without_gradient(whole, out=self._gradients)
            torch._foreach_copy_(self._moves, weights)
            self.descend()
            torch._foreach_sub_(self._moves, weights)  # −Δθ
            torch._foreach_addcmul_(self._path, self._gradients, self._moves)

    @torch.no_grad()
    def after(self, experience: Experience) -> None:  # noqa: ARG002
        curvature = self.anchor.curvature()  # 2 si_c Ω
        columns = zip(curvature, self._path, self._start, self.anchor.parameters, strict=True)
        for c, path, start, weight in columns:
            damped = (weight - start).square_().add_(self.xi)
            c.add_(path.div(damped), alpha=2 * self.si_c).clamp_(min=0)
        self.anchor.move(curvature)
