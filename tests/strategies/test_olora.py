"""O-LoRA's penalty by hand, what it does, and its limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from clbench.errors import UserError
from strategies.inc_lora import IncLoRA
from strategies.olora import OLoRA


def test_the_penalty_by_hand(instructions: Callable[..., Any]) -> None:
    """Two earlier rows (1, 2, 0, …), (0, 1, 0, …); A = (3, −1, 0, …), B = (4, 3, 0, …)ᵀ.

    Overlaps 1 and −1: Σ|·| = 2. Norms √10 and 5. The same in each of the 7 layers.
    """
    toy = instructions()
    strategy = toy.prepare(OLoRA(lora_rank=1, lambda1=0.5, lambda2=0.1))
    assert len(strategy._updates) == 7
    assert strategy.penalty().item() == pytest.approx(
        0.1 * sum(u.a.norm().item() for u in strategy._updates), rel=1e-5
    ), "nothing earlier, B = 0"
    for i, update in enumerate(strategy._updates):
        old = torch.zeros(2, update.a.shape[1])
        old[0, 0], old[0, 1], old[1, 1] = 1, 2, 1
        strategy.earlier[i] = old
        with torch.no_grad():
            update.a.zero_()
            update.a[0, 0], update.a[0, 1] = 3, -1
            update.b[0, 0], update.b[1, 0] = 4, 3
    expected = 7 * (0.5 * 2 + 0.1 * (10**0.5 + 5))
    assert strategy.penalty().item() == pytest.approx(expected, rel=1e-6)
    strategy.penalty().backward()
    update = strategy._updates[0]
    # d|A_old Aᵀ|/dA = sign(1)·(1, 2) + sign(−1)·(0, 1); d‖A‖/dA = A/‖A‖.
    slope = 0.5 * torch.tensor([1.0, 1.0]) + 0.1 * torch.tensor([3.0, -1.0]) / 10**0.5
    assert torch.allclose(update.a.grad[0, :2], slope)
    assert torch.allclose(update.b.grad[:2, 0], 0.1 * torch.tensor([0.8, 0.6]))


def test_what_is_kept_are_the_rows_of_every_experience(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=1)
    strategy = toy.prepare(OLoRA(lora_rank=2))
    rows = []
    for index in range(3):
        toy.teach(strategy, index)
        rows.append(strategy._updates[3].a.detach().clone())
        assert torch.equal(strategy.earlier[3], torch.cat(rows))


def test_new_rows_are_orthogonal_to_old_ones_only_where_that_is_asked(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions(epochs=4)

    def overlap(lambda1: float) -> float:
        strategy = toy.learned(OLoRA(lora_rank=2, lambda1=lambda1, lr=0.01), 0, 1)
        kept = [(old[:2], old[2:]) for old in strategy.earlier]
        cosines = [(a @ b.T).abs() / (a.norm(dim=1)[:, None] * b.norm(dim=1)) for a, b in kept]
        return torch.stack(cosines).mean().item()

    assert overlap(1.0) < 0.2 * overlap(0.0)


def test_without_weights_it_is_inc_lora(
    instructions: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    toy = instructions(epochs=2)
    one, other = toy.learned(OLoRA(lambda1=0.0)), toy.learned(IncLoRA())
    assert same_weights(one.model, other.model)
    assert not same_weights(toy.learned(OLoRA()).model, other.model)


def test_negative_weights_are_refused() -> None:
    for name in ("lambda1", "lambda2"):
        with pytest.raises(UserError, match=name):
            replace(OLoRA(), **{name: -1.0})
