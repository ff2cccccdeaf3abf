"""The diagonal of the Fisher information of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nn.sample_gradients import Cotangents, mean_gradient_powers
from clbench.samples import Samples
from clbench.types import derive_seed

Fisher = Literal["exact", "empirical", "weighted", "batch"]


def diagonal_fisher(
    model: nn.Module,
    samples: Samples,
    kind: Fisher = "exact",
    *,
    names: Collection[str] | None = None,
    order: Tensor | None = None,
    batch_size: int = 128,
) -> dict[str, Tensor]:
    """One number for each weight: how much the predictive distribution p(y|x) depends on it.

    | kind | estimate | as in |
    |---|---|---|
    | "exact" | E_x Σ_y p(y|x) (∂ log p(y|x) / ∂θ)² | the definition; van de Ven, "all" |
    | "empirical" | E_x (∂ log p(y_x|x) / ∂θ)², y_x the label | van de Ven, "true" |
    | "weighted" | E_x p(y_x|x) (∂ log p(y_x|x) / ∂θ)²: the label's term of "exact" | Mammoth |
    | "batch" | E_batches (∂ mean log p(y_x|x) / ∂θ)² | Avalanche; roughly 1/batch_size as large |

    p is the softmax over all outputs, those of classes still to come included, as the
    cross-entropy trains them. Where a sample has several labels, one for each of its predictions
    (the tokens of an answer), log p(y|x) is the sum over them, and "exact" is estimated: for each
    prediction one label is drawn from p, given the true ones before it, which costs one backward
    pass as the others do. van de Ven 2025, "On the Computation of the Fisher Information in
    Continual Learning", arXiv 2502.11756, compares the estimates.

    Args:
        model: In evaluation mode; its outputs are logits [B, C] or [B, A, C].
        samples: The expectation is over these, with the test-time transform.
        kind: Of the estimate. "exact" takes C backward passes where the others take one.
        names: Parameters; default: those that require gradients.
        order: Positions of the samples to take, [N] int64; default: all.
        batch_size: Samples in a forward pass; part of the definition of "batch" only.

    Returns:
        One tensor for each name, in the shape of the parameter.
    """
    draws = torch.Generator(samples.index.device)
    draws.manual_seed(derive_seed(0, "labels of the Fisher information"))
    cotangents: dict[Fisher, Cotangents] = {
        "exact": partial(_every_label, draws=draws),
        "empirical": _true_label,
        "weighted": _weighted_label,
        "batch": _true_label,
    }
    return mean_gradient_powers(
        model,
        samples,
        cotangents[kind],
        power=2,
        names=names,
        order=order,
        batch_size=batch_size,
        of_batches=kind == "batch",
    )


def fisher_of_answers(
    model: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    samples: Samples,
    order: Tensor,
    batch_size: int,
) -> list[Tensor]:
    """ "batch" of `diagonal_fisher` without labels: y is what the model itself answers.

    What methods of test-time adaptation take for the importance of weights (EATA, Niu et al.
    2022, arXiv 2204.02610); a model with batch statistics has those of each batch.

    Args:
        model: Inputs to logits [B, C].
        parameters: Weights of the model that require gradients.
        samples: The expectation is over these, with the test-time transform.
        order: Positions of the samples to take, [N] int64.
        batch_size: Samples in a batch.

    Returns:
        One tensor for each parameter, in its shape.
    """
    total = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    with torch.enable_grad():
        for batch in samples.batches(order, batch_size):
            outputs = model(batch.inputs)
            loss = F.cross_entropy(outputs, outputs.detach().argmax(1))
            gradients = torch.autograd.grad(loss, [*parameters], materialize_grads=True)
            torch._foreach_addcmul_(total, gradients, gradients)
    torch._foreach_div_(total, -(-len(order) // batch_size))
    return total


def _true_label(outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """∂ log p(y) / ∂h = e_y − p; 0 where there is no label."""
    known = targets >= 0
    chosen = F.one_hot(targets.clamp_min(0), outputs.shape[-1])
    yield (chosen - outputs.softmax(-1)) * known[..., None]


def _weighted_label(outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """√p(y) ∂ log p(y) / ∂h of the label, or of all labels of a sample together."""
    known = targets >= 0
    each = outputs.softmax(-1).gather(-1, targets.clamp_min(0)[..., None])
    share = each.masked_fill(~known[..., None], 1).flatten(1).prod(1)
    (direction,) = _true_label(outputs, targets)
    yield direction * share.sqrt().view(-1, *[1] * (outputs.ndim - 1))


def _every_label(outputs: Tensor, targets: Tensor, draws: torch.Generator) -> Iterator[Tensor]:
    """√p(y) ∂ log p(y) / ∂h, whose square is weighted by p(y); of sequences one draw."""
    p = outputs.softmax(-1)
    if outputs.ndim > 2:
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=draws).view(targets.shape)
        yield from _true_label(outputs, torch.where(targets >= 0, drawn, targets))
        return
    for label in range(outputs.shape[1]):
        v = -p
        v[:, label] += 1
        yield v * p[:, label, None].sqrt()
