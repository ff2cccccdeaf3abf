"""Replay against its equation and its limit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from strategies.finetune import Finetune
from strategies.replay import Replay


def test_without_a_memory_it_is_fine_tuning(
    bench: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    one = bench(memory_size=0)
    replay = one.learned(Replay(lr=0.1, momentum=0.9))
    assert same_weights(replay.model, one.learned(Finetune(lr=0.1, momentum=0.9)).model)
    assert replay.memory_samples == 0


def test_the_loss_is_the_cross_entropy_of_both_batches_in_one_pass(
    bench: Callable[..., Any], normalised: nn.Module
) -> None:
    one = bench(normalised, memory_size=10, memory_batch_size=10)
    replay = one.prepare(Replay())
    replay.begin(steps=1)
    replay.observe(one.batch(0, 0, 10))
    batch = one.batch(1, 5, 6)
    twin = copy.deepcopy(replay.model)
    memory = replay.memory
    # All ten are drawn, in some order, which decides neither mean nor normalisation.
    inputs = torch.cat((batch.inputs, replay.context.transform.test(memory.raw)))
    expected = F.cross_entropy(twin(inputs), torch.cat((batch.targets, memory.targets)))
    torch.testing.assert_close(replay.loss(batch), expected)
    apart = copy.deepcopy(normalised).train()
    assert not torch.allclose(apart(batch.inputs), apart(inputs)[:6], atol=1e-3)


@pytest.mark.parametrize("selection", ["reservoir", "class_balanced"])
def test_an_arriving_batch_is_replayed_from_the_next_step_on(
    bench: Callable[..., Any], selection: Any
) -> None:
    one = bench(memory_size=7)
    replay = one.prepare(Replay(selection=selection))
    replay.begin(steps=2)
    batch = one.batch(0, 0, 10)
    alone = F.cross_entropy(replay.model(batch.inputs), batch.targets)
    assert torch.equal(replay.loss(batch), alone)
    assert replay.memory_samples == 0
    replay.observe(batch)
    assert replay.memory_samples == 7
    assert not torch.equal(replay.loss(batch), alone)


def test_as_many_samples_are_replayed_as_the_scenario_says(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for option, expected in ((3, 3), (0, 10)):
        one = bench(memory_batch_size=option, batch_size=10)
        replay = one.prepare(Replay())
        replay.observe(one.batch(0, 0, 30))
        sizes: list[int] = []
        draw = replay.memory.draw

        def counted(n: int, draw: Any = draw, sizes: list[int] = sizes) -> Any:
            recalled = draw(n)
            sizes.append(len(recalled.targets))
            return recalled

        monkeypatch.setattr(replay.memory, "draw", counted)
        replay.loss(one.batch(0, 0, 10))
        assert sizes == [expected]
