"""Teachers: copies of a model that follow it slowly, or do not move at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from clbench.types import Context

M = TypeVar("M", bound=nn.Module)


def frozen_copy(model: M) -> M:
    """A copy of a model, buffers and modes included, none of whose weights gets a gradient."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def answer(model: nn.Module, inputs: Tensor, context: Context) -> Tensor:
    """Outputs of a model that is not trained, in fp32 whatever the precision of the run."""
    with context.autocast():
        outputs: Tensor = model(inputs)
    return outputs.float()


def weights_and_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters called weight or bias, by name, in the order of `named_parameters`.

    What the methods after CoTTA train and restore: all of most networks, but not the class token
    and the positions of a transformer.
    """
    parts = ("weight", "bias")
    return {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in parts}


def consistency(student: Tensor, teacher: Tensor, symmetric: bool = False) -> Tensor:
    """Cross-entropy of each of a student's answers with a teacher's, −Σ_k q_k ln p_k.

    Args:
        student: Logits of p, [B, K].
        teacher: Logits of q, [B, K]; constants.
        symmetric: −½ Σ_k q_k ln p_k − ½ Σ_k p_k ln q_k instead.

    Returns:
        [B].
    """
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    loss = -(log_q.exp() * log_p).sum(1)
    if symmetric:
        loss = (loss - (log_p.exp() * log_q).sum(1)) / 2
    return loss


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Moves a teacher's parameters, not its buffers: θ' ← momentum θ' + (1 - momentum) θ.

    Args:
        teacher: Changed in place.
        student: Of the same architecture.
        momentum: In [0, 1]; 1: the teacher stays.
    """
    weights: list[Tensor] = [*teacher.parameters()]
    torch._foreach_lerp_(weights, [*student.parameters()], 1 - momentum)


@torch.no_grad()
def restore_stochastically(
    parameters: Sequence[Tensor],
    origin: Sequence[Tensor],
    probability: float,
    generator: torch.Generator,
) -> None:
    """Puts each number back to its origin with a probability: θ ← M∘θ₀ + (1 - M)∘θ, M ~ B(p).

    Args:
        parameters: Changed in place.
        origin: θ₀, in the same shapes.
        probability: p of each number on its own, in [0, 1].
        generator: On the device of the parameters.
    """
    sizes = [p.numel() for p in parameters]
    drawn = torch.rand(sum(sizes), generator=generator, device=generator.device) < probability
    for parameter, old, mask in zip(parameters, origin, drawn.split(sizes), strict=True):
        torch.where(mask.view_as(parameter), old, parameter, out=parameter)
