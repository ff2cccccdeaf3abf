"""In which order samples of shifting domains arrive: the settings of test-time adaptation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clbench.errors import UserError

#: Draws of a correlated order before it is given up.
_DRAWS = 1000


def correlated(labels: Tensor, delta: float, generator: torch.Generator) -> Tensor:
    """An order in which neighbours tend to have the same label.

    Source: Gong et al. 2022, "NOTE: Robust Continual Test-time Adaptation Against Temporal
    Correlation", arXiv 2208.05117, and its code. As many slots as classes; the samples of each
    class are spread over the slots by q ~ Dirichlet(delta), where a slot that already has its
    share N/K of all samples gets none; drawn again until each slot has a few samples. Slots
    arrive one after another; within a slot classes do, in random order. delta = 0: one class
    after another.

    **Differs from the source:** slots must have min(10, N / (4 K)) samples, where its code asks
    for 10 whatever N is.

    Args:
        labels: [N] int64, on the CPU.
        delta: Concentration; small: a slot is nearly one class; large: nearly all are in each.
        generator: On the CPU.

    Returns:
        Positions [N].

    Raises:
        UserError: If no such division was found.
    """
    classes = labels.unique()
    members = [_shuffled((labels == c).nonzero().flatten(), generator) for c in classes]
    if delta == 0:
        return torch.cat([members[i] for i in torch.randperm(len(classes), generator=generator)])
    n, k = len(labels), len(classes)
    least = min(10, n // (4 * k))
    for _ in range(_DRAWS):
        slots = _slots(members, delta, n / k, generator)
        if min(sum(len(part) for part in slot) for slot in slots) >= least:
            return torch.cat(
                [s[i] for s in slots for i in torch.randperm(len(s), generator=generator)]
            )
    raise UserError(
        f"scenario.delta={delta:g} gave {_DRAWS} times a division of {n} samples of {k} classes "
        "with an empty slot. Ask for a larger delta, or for more samples."
    )


def _slots(
    members: Sequence[Tensor], delta: float, share: float, generator: torch.Generator
) -> list[list[Tensor]]:
    """One draw: for each slot the samples of each class."""
    count = len(members)
    slots: list[list[Tensor]] = [[] for _ in range(count)]
    sizes = torch.zeros(count)
    for member in members:
        # Without the full slots before it is normalised: all of a small delta may be in one.
        q = _log_gamma(delta, count, generator).masked_fill(sizes >= share, -torch.inf).softmax(0)
        cuts = q.cumsum(0)[:-1].mul(len(member)).round().long()
        parts = member.tensor_split(cuts)
        for i, part in enumerate(parts):
            slots[i].append(part)
        sizes += torch.tensor([len(part) for part in parts])
    return slots


def _log_gamma(delta: float, count: int, generator: torch.Generator) -> Tensor:
    """Logarithms of Gamma(delta) draws, [count]; normalised, the draws are a Dirichlet's.

    Gamma(delta) = Gamma(delta + 1) · U^(1 / delta), U uniform, does not underflow so.
    """
    concentration = torch.full((count,), delta + 1, dtype=torch.float64)
    # PyTorch's distributions draw from the global generator; this one takes a generator.
    gamma = torch._standard_gamma(concentration, generator)
    uniform = torch.rand(count, dtype=torch.float64, generator=generator)
    return gamma.log() + uniform.log() / delta


def _shuffled(positions: Tensor, generator: torch.Generator) -> Tensor:
    return positions[torch.randperm(len(positions), generator=generator)]


def severities(highest: int) -> list[int]:
    """A domain that comes and goes: 1, 2, ... highest, ... 2, 1."""
    return [*range(1, highest + 1), *range(highest - 1, 0, -1)]
