"""SEFE: RegLoRA's index sets and penalty by hand; what it is without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from strategies.inc_lora import IncLoRA
from strategies.sefe import SEFE, largest


def test_the_largest_entries() -> None:
    product = torch.tensor([[0.1, -5.0, 0.2], [3.0, 0.0, -4.0]])
    assert set(largest(product, 0.5).tolist()) == {1, 3, 5}
    assert largest(product, 0.02).tolist() == [1], "one at least"
    assert len(largest(torch.zeros(100, 10), 0.02)) == 20


def test_index_sets_accumulate_as_counts(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=1)
    strategy = toy.prepare(SEFE(top=0.1))
    expected = [torch.zeros_like(m, dtype=torch.int64) for m in strategy.marks]
    for index in range(3):
        toy.teach(strategy, index)
        for count, update in zip(expected, strategy._updates, strict=True):
            product = (update.b @ update.a).abs().detach()
            count += (
                product
                >= product.flatten().sort(descending=True).values[round(0.1 * product.numel()) - 1]
            )
    assert all(torch.equal(m.long(), c) for m, c in zip(strategy.marks, expected, strict=True))
    assert max(m.max().item() for m in strategy.marks) > 1
    assert strategy.marks[0].sum() == 3 * round(0.1 * strategy.marks[0].numel())


def test_the_penalty_by_hand(instructions: Callable[..., Any]) -> None:
    """B = (1, −2, 0, …)ᵀ, A = (3, 4, 0, …): BA has 3, 4 in its first row, −6, −8 in its second.

    Marked: 4 twice, −6 once: (4 + 4 + 6) / 3 = 14/3 in one layer, 0 in the other six.
    """
    toy = instructions()
    strategy = toy.prepare(SEFE(lora_rank=1, reglora_lambda=10.0))
    for mark in strategy.marks:
        mark[2, 2] = 1
    strategy.marks[0].zero_()
    strategy.marks[0][0, 1], strategy.marks[0][1, 0] = 2, 1
    strategy.before(toy.stream.experiences[1])
    for update in strategy._updates:
        with torch.no_grad():
            update.a.zero_()
            update.a[0, :2] = torch.tensor([3.0, 4.0])
            update.b[:2, 0] = torch.tensor([1.0, -2.0])
    assert strategy.penalty().item() == pytest.approx(10 * (14 / 3) / 7, rel=1e-6)
    strategy.penalty().backward()
    # d/dB: weights 2/3 on |b₀ a₁|, 1/3 on |b₁ a₀|, each 10/7.
    found = strategy._updates[0].b.grad[:3, 0]
    assert torch.allclose(found, 10 / 7 * torch.tensor([2 / 3 * 4, -1 / 3 * 3, 0.0]))


def test_the_first_experience_has_no_penalty(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=1)
    strategy = toy.prepare(SEFE())
    strategy.before(toy.stream.experiences[0])
    assert strategy.penalty() == 0
    strategy.after(toy.stream.experiences[0])
    strategy.before(toy.stream.experiences[1])
    assert strategy.penalty() == 0, "B = 0"
    with torch.no_grad():
        for update in strategy._updates:
            update.b.fill_(0.1)
    assert strategy.penalty() > 0


def test_without_its_two_parts_it_is_inc_lora(
    instructions: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    toy = instructions(epochs=2)
    plain = toy.learned(IncLoRA())
    one = toy.learned(SEFE(style_share=0.0, reglora_lambda=0.0))
    assert same_weights(one.model, plain.model)
    assert not same_weights(toy.learned(SEFE(style_share=0.0)).model, plain.model)
    assert not same_weights(toy.learned(SEFE(reglora_lambda=0.0)).model, plain.model)


def test_marked_entries_move_less(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=4)

    def moved(weight: float) -> float:
        one = toy.learned(SEFE(style_share=0.0, reglora_lambda=weight, top=0.1), 0)
        marks = [m.bool() for m in one.marks]
        toy.teach(one, 1)
        parts = zip(one._updates, marks, strict=True)
        return torch.cat([u.product()[m].detach().abs() for u, m in parts]).mean().item()

    assert moved(2500.0) < 0.5 * moved(0.0)


def test_a_part_of_each_experience_is_rewritten(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=1)
    strategy = toy.learned(SEFE(style_share=0.3), 0, 1)
    # Of the toy's two letters only the choice fits into an answer of one letter.
    assert strategy.facts() == {"rewritten": {"yes_no": 0, "multiple_choice": 24, "sentence": 0}}
    assert sum(toy.steps) == 80, "as many samples as without"
