"""DER and DER++ against their equations and their limits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.state import capture
from strategies.der import DER
from strategies.derpp import DERpp
from strategies.finetune import Finetune

Make = Callable[..., Any]
EITHER = pytest.mark.parametrize("strategy", [DER(alpha=0.7), DERpp(alpha=0.7, beta=0.4)])


@pytest.mark.parametrize("strategy", [DER(alpha=0), DERpp(alpha=0, beta=0)])
def test_without_weights_it_is_fine_tuning(
    bench: Make, same_weights: Callable[..., bool], strategy: DER | DERpp
) -> None:
    one = bench()
    learned = one.learned(strategy)
    assert learned.memory_samples == 30
    assert same_weights(learned.model, one.learned(Finetune()).model)


@EITHER
def test_without_a_memory_it_is_fine_tuning(
    bench: Make, same_weights: Callable[..., bool], strategy: DER | DERpp
) -> None:
    one = bench(memory_size=0)
    assert same_weights(one.learned(strategy).model, one.learned(Finetune()).model)


def started(one: Any, strategy: Any) -> Any:
    """In training, with the first batch in its memory."""
    strategy = one.prepare(strategy)
    strategy.begin(steps=2)
    first = one.batch(0, 0, 10)
    strategy.update(strategy.loss(first))
    strategy.observe(first)
    return strategy


def test_the_loss_of_der_by_hand(bench: Make, normalised: nn.Module) -> None:
    """All ten stored samples are drawn; their order decides nothing."""
    one = bench(normalised, memory_size=10, memory_batch_size=10)
    der = started(one, DER(alpha=0.7))
    batch, memory, twin = one.batch(1, 0, 6), der.memory, copy.deepcopy(der.model)
    stream = twin(batch.inputs)
    stored = twin(der.context.transform.test(memory.raw))
    squares = (stored - memory.extras["logits"]) ** 2
    log_probabilities = stream - stream.exp().sum(1, keepdim=True).log()
    cross_entropy = -log_probabilities[torch.arange(6), batch.targets].mean()
    expected = cross_entropy + 0.7 * squares.sum() / (10 * 6)
    torch.testing.assert_close(der.loss(batch), expected)


def test_the_loss_of_derpp_by_hand(bench: Make, normalised: nn.Module) -> None:
    one = bench(normalised, memory_size=10, memory_batch_size=10)
    derpp = started(one, DERpp(alpha=0.7, beta=0.4))
    batch, memory, twin = one.batch(1, 0, 6), derpp.memory, copy.deepcopy(derpp.model)
    stream = twin(batch.inputs)
    stored = twin(derpp.context.transform.test(memory.raw))
    expected = (
        F.cross_entropy(stream, batch.targets)
        + 0.7 * ((stored - memory.extras["logits"]) ** 2).sum() / (10 * 6)
        + 0.4 * F.cross_entropy(stored, memory.targets)
    )
    torch.testing.assert_close(derpp.loss(batch), expected)


@pytest.mark.parametrize(("strategy", "passes"), [(DER(), 2), (DERpp(), 3)])
def test_every_batch_has_a_forward_pass_of_its_own(
    bench: Make, normalised: nn.Module, strategy: Any, passes: int
) -> None:
    """Batch normalisation sees arriving and stored samples apart, as in the official code."""
    one = bench(normalised, memory_batch_size=4)
    strategy = started(one, strategy)
    sizes: list[int] = []
    strategy.model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    strategy.loss(one.batch(1, 0, 6))
    assert sizes == [6, *[4] * (passes - 1)]


def test_derpp_draws_twice(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench(memory_batch_size=5)
    derpp = started(one, DERpp())
    slots: list[frozenset[int]] = []
    draw = derpp.memory.draw

    def noted(n: int) -> Any:
        recalled = draw(n)
        slots.append(frozenset(recalled.slots.tolist()))
        return recalled

    monkeypatch.setattr(derpp.memory, "draw", noted)
    batch = one.batch(0, 0, 10)
    for _ in range(300):
        derpp.loss(batch)
    dark, labelled = slots[::2], slots[1::2]
    assert len(dark) == len(labelled) == 300
    # Independent draws of 5 out of 10 agree in one of 252 cases, and overlap in 2.5 on average.
    assert sum(map(frozenset.__eq__, dark, labelled)) < 10
    overlap = sum(len(a & b) for a, b in zip(dark, labelled, strict=True)) / 300
    assert overlap == pytest.approx(2.5, abs=4 * (25 / 36 / 300) ** 0.5)


@EITHER
def test_stored_logits_are_those_of_the_step_just_taken(
    bench: Make, normalised: nn.Module, strategy: DER | DERpp
) -> None:
    """Of the forward pass in training mode, before the weights moved; all columns."""
    one = bench(normalised)
    strategy = one.prepare(strategy)
    strategy.begin(steps=1)
    batch = one.batch(0, 0, 10)
    expected = copy.deepcopy(strategy.model)(batch.inputs).detach()
    strategy.update(strategy.loss(batch))
    strategy.observe(batch)
    assert torch.equal(strategy.memory.extras["logits"], expected)
    assert torch.equal(strategy.memory.raw, batch.raw)
    strategy.update(strategy.loss(one.batch(1, 0, 10)))
    assert torch.equal(strategy.memory.extras["logits"], expected)


@EITHER
def test_the_loss_leaves_the_memory_alone(bench: Make, strategy: DER | DERpp) -> None:
    one = bench()
    strategy = started(one, strategy)
    before = capture(strategy)["memory"]
    strategy.loss(one.batch(1, 0, 10))
    after = capture(strategy)["memory"]
    assert torch.equal(before["raw"], after["raw"])
    assert torch.equal(before["extras"]["logits"], after["extras"]["logits"])
    assert before["seen"] == after["seen"] == 10


def test_negative_weights_are_refused() -> None:
    with pytest.raises(UserError, match="alpha"):
        DER(alpha=-0.1)
    with pytest.raises(UserError, match="beta"):
        DERpp(beta=-0.1)
