"""Whose statistics a normalisation layer divides by, and which of its parameters adapt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from clbench.errors import UserError

M = TypeVar("M", bound=nn.Module)
#: timm's batch, layer and group norms, those with an activation included, are subclasses of these.
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model, each once, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def stored_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model that has some, each with stored statistics.

    Raises:
        UserError: If it has none, or one without.
    """
    found = batch_norms(model)
    if not found:
        raise UserError(
            "The model has no batch norm, and this method changes nothing else. Choose a backbone "
            "with batch norms or another strategy."
        )
    if any(norm.running_mean is None for norm in found):
        raise UserError(
            "A batch norm of the model has no stored statistics, and this method changes what "
            "they are used for. Choose a backbone that keeps them or another strategy."
        )
    return found


def affine_parameters(model: nn.Module, frozen: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Scales and shifts of the normalisation layers: batch, layer, group, instance, RMS.

    Args:
        model: May be prepared by the functions below or not.
        frozen: Parts that are left out, as a path or a piece of one: "layer4", "blocks.11".

    Returns:
        By the name that `model.named_parameters` gives them; shared ones once.

    Raises:
        UserError: If there are none.
    """
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, _NORMS) and not any(_inside(path, part) for part in frozen):
            prefix = f"{path}." if path else ""
            found |= {prefix + name: p for name, p in module.named_parameters(recurse=False)}
    if not found:
        left = f" outside of {', '.join(frozen)}" if frozen else ""
        raise UserError(
            f"The model has no scales and shifts of normalisation layers{left}, and this method "
            "adapts nothing else. Choose a backbone with such layers or another strategy."
        )
    return found


def train_only(model: nn.Module, parameters: Collection[nn.Parameter]) -> list[nn.Parameter]:
    """Freezes all parameters of a model but these.

    Returns:
        The parameters, as an optimizer takes them.
    """
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return list(parameters)


def normalise_by_batch(model: nn.Module) -> None:
    """From now on batch norms divide by the statistics of the batch, in both modes.

    The stored ones are dropped, as TENT's code does (Wang et al. 2021, arXiv 2006.10726).
    PyTorch refuses a batch that gives a channel a single value: one sample behind a global
    pooling.

    Args:
        model: Changed in place.
    """
    for norm in batch_norms(model):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def replace_batch_norms(model: nn.Module, make: Callable[[_BatchNorm], M]) -> list[M]:
    """Puts another module in the place of each batch norm.

    Args:
        model: Changed in place.
        make: The other module; a batch norm that serves in several places gets one.

    Returns:
        What was made, in the order of the modules.

    Raises:
        UserError: If the model has no batch norm, or one without stored statistics.
    """
    made = {norm: make(norm) for norm in stored_batch_norms(model)}
    for parent, name, child in list(_places(model)):
        setattr(parent, name, made[child])
    return list(made.values())


class MixedBatchNorm(nn.Module):
    """A batch norm that divides by a mixture of its stored and the batch's statistics.

    μ = (1 − alpha) μ_stored + alpha μ_batch, and σ² likewise, in both modes; nothing is stored.
    With `prior`, alpha = n / (n + prior) for a batch of n samples: the stored statistics count
    like `prior` samples (Schneider et al. 2020, arXiv 2006.16971; MEMO, Zhang et al. 2022, arXiv
    2110.09506, whose code has prior = 16). Statistics are constants to the gradient, as there.

    **Differs from the source:** σ²_batch is the mean squared deviation, as batch norm divides by
    in training, so that alpha = 1 is exactly that; the published codes take the unbiased one.

    Args:
        layer: With stored statistics; becomes a part of this one.
        alpha: Share of the batch, in [0, 1].
        prior: In samples; given instead of alpha.
    """

    def __init__(
        self, layer: _BatchNorm, alpha: float | None = None, prior: float | None = None
    ) -> None:
        super().__init__()
        if (alpha is None) == (prior is None):
            raise ValueError("give alpha or prior")
        self.layer, self.alpha, self.prior = layer.eval(), alpha, prior

    def train(self, mode: bool = True) -> MixedBatchNorm:
        super().train(mode)
        self.layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same shape."""
        alpha = self.alpha
        if alpha is None:
            assert self.prior is not None
            alpha = len(x) / (len(x) + self.prior)
        with torch.no_grad():
            mean, variance = _mixture(self.layer, x, alpha)
        out: Tensor = functional_call(
            self.layer, {"running_mean": mean, "running_var": variance}, (x,)
        )
        return out


class MovingBatchNorm(nn.Module):
    """RoTTA's robust batch norm (Yuan et al. 2023, arXiv 2303.13899).

    In training mode the stored statistics move, μ ← (1 − momentum) μ + momentum μ_batch, and σ²
    likewise with the mean squared deviation of the batch; the batch is divided by the moved ones,
    through which the gradient flows as far as they are the batch's. In evaluation mode it is
    divided by the stored ones.

    Args:
        layer: With stored statistics; becomes a part of this one, which moves them.
        momentum: Share of the batch, in [0, 1].
    """

    def __init__(self, layer: _BatchNorm, momentum: float = 0.05) -> None:
        super().__init__()
        self.layer, self.momentum = layer.eval(), momentum
        self.training = False

    def train(self, mode: bool = True) -> MovingBatchNorm:
        super().train(mode)
        self.layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same shape."""
        layer = self.layer
        out: Tensor
        if not self.training:
            out = layer(x)
            return out
        mean, variance = _mixture(layer, x, self.momentum)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean.detach())
        layer.running_var.copy_(variance.detach())
        shape = (1, -1, *[1] * (x.dim() - 2))
        normalised = (x - mean.view(shape)) * (variance + layer.eps).rsqrt().view(shape)
        # The layer has what comes behind: scale, shift, and in timm's also an activation.
        zero = torch.zeros_like(mean)
        nothing = {"running_mean": zero, "running_var": zero + (1 - layer.eps)}
        out = functional_call(layer, nothing, (normalised.to(x.dtype),))
        return out


def _mixture(layer: _BatchNorm, x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, in fp32."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    over = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x.float(), over, correction=0)
    mean = torch.lerp(layer.running_mean, mean, alpha)
    return mean, torch.lerp(layer.running_var, variance, alpha)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, _BatchNorm]]:
    """Every place where a batch norm serves: parent, name, itself."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm):
                yield parent, name, child


def _inside(path: str, part: str) -> bool:
    """Whether the names of `part` come one after another in `path`."""
    return f".{part}." in f".{path}."
