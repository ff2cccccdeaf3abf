"""A quadratic pull of the weights towards earlier weights, cheap enough for every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Anchor:
    """The penalty ½ Σ_i c_i (θ_i − θ*_i)² + constant over the parameters of a model.

    It is kept as ½‖s∘θ − t‖² with s = √c and t = s∘θ*: a step is one fused multiply-add, a
    norm and a product. (Rounding t is no worse than rounding θ*.) A sum of any number of such
    penalties is one of them: complete the square. So `add` never makes it grow.

    Tensors come in lists, one for each parameter, in the order of `names`.

    Args:
        model: Those of its parameters that require gradients now are pulled, also when they
            are frozen for a while later.

    Attributes:
        names: Of the parameters.
        parameters: The model's own.
        active: Whether there is a penalty yet.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [parameter for _, parameter in named]
        self.active = False
        self._scales = [torch.zeros_like(p) for p in self.parameters]
        self._targets = [torch.zeros_like(p) for p in self.parameters]
        self._residuals = [torch.zeros_like(p) for p in self.parameters]
        self._constant = self.parameters[0].detach().new_zeros(())

    def penalty(self) -> Tensor:
        """The penalty at the present weights, a scalar that can be differentiated once."""
        if not self.active:
            return torch.zeros_like(self._constant)
        pull: Tensor = _Pull.apply(self._residuals, self._scales, self._targets, *self.parameters)
        return pull + self._constant

    @torch.no_grad()
    def without_gradient(self, whole: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """out = whole − c∘(θ − θ*): gradients of a loss less the penalty's, in closed form."""
        if not self.active:
            torch._foreach_copy_(list(out), list(whole))
            return
        _subtract(self._residuals, self._scales, self._targets, self.parameters)
        for w, s, r, o in zip(whole, self._scales, self._residuals, out, strict=True):
            torch.addcmul(w, s, r, value=-1, out=o)

    def curvature(self) -> list[Tensor]:
        """c, the second derivative of the penalty."""
        return list(torch._foreach_mul(self._scales, self._scales))

    @torch.no_grad()
    def move(self, curvature: Sequence[Tensor]) -> None:
        """Forgets the penalty and makes another one, centred on the present weights.

        Args:
            curvature: c of the new penalty, at least 0.
        """
        self.active = True
        self._constant.zero_()
        for s, t, c, p in self._columns(curvature):
            torch.mul(s.copy_(c).sqrt_(), p, out=t).neg_()

    @torch.no_grad()
    def add(self, curvature: Sequence[Tensor]) -> None:
        """Adds the penalty ½ Σ_i c_i (θ_i − β_i)², β being the present weights.

        ½a(θ−α)² + ½c(θ−β)² = ½(a+c)(θ−m)² + ½ac/(a+c)·(α−β)² with m = (aα + cβ)/(a+c).

        Args:
            curvature: c of the additional penalty, at least 0.
        """
        self.active = True
        for s, t, c, p in self._columns(curvature):
            both = s.square().add_(c).sqrt_()
            nonzero = torch.where(both > 0, both, 1)
            distance = torch.addcmul(t, s, p).div_(nonzero)
            self._constant += distance.square_().mul_(c).sum() / 2
            t.mul_(s).addcmul_(c, p, value=-1).div_(nonzero)
            s.copy_(both)

    def in_order(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """Tensors by parameter name as a list in the order of `names`."""
        return [named[name] for name in self.names]

    def state_dict(self) -> dict[str, Any]:
        """The penalty; the parameters belong to the model."""
        return {
            "active": self.active,
            "constant": self._constant,
            "scales": self._scales,
            "targets": self._targets,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active = state["active"]
        self._constant.copy_(state["constant"])
        torch._foreach_copy_(self._scales, state["scales"])
        torch._foreach_copy_(self._targets, state["targets"])

    def _columns(self, curvature: Sequence[Tensor]) -> zip[tuple[Tensor, Tensor, Tensor, Tensor]]:
        return zip(self._scales, self._targets, curvature, self.parameters, strict=True)


class _Pull(torch.autograd.Function):
    """½‖s∘θ − t‖², its residual written into a lasting tensor.

    Autograd's own formulas would read the weights seven times in a step and allocate as often.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residuals: list[Tensor],
        scales: list[Tensor],
        targets: list[Tensor],
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*weights)
        ctx.residuals, ctx.scales = residuals, scales
        _subtract(residuals, scales, targets, weights)
        return torch.stack(torch._foreach_norm(residuals)).square_().sum() / 2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The residuals are right for the present weights only: this raises if they changed.
        _ = ctx.saved_tensors
        gradients = torch._foreach_mul(ctx.scales, ctx.residuals)
        # A look at a number is free on a CPU and saves a pass; a GPU would have to wait.
        if upstream.is_cuda or upstream.item() != 1:
            torch._foreach_mul_(gradients, upstream)
        return (None, None, None, *gradients)


def _subtract(
    out: Sequence[Tensor],
    scales: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> None:
    """out = s∘θ − t; `targets` hold −t, so that this is one operation."""
    for residual, scale, target, weight in zip(out, scales, targets, weights, strict=True):
        torch.addcmul(target, scale, weight, out=residual)
