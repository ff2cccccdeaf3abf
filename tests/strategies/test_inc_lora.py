"""IncLoRA: frozen updates stay active, whether they are kept apart or merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from strategies.inc_lora import IncLoRA


def test_the_weights_are_those_before_plus_every_update(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=1)
    strategy = toy.prepare(IncLoRA(lora_alpha=24.0))
    expected = [u.layer.base_layer.weight.detach().clone() for u in strategy._updates]
    for index in range(3):
        toy.teach(strategy, index)
        for weight, update in zip(expected, strategy._updates, strict=True):
            found = update.layer.base_layer.weight
            assert torch.allclose(found, weight, atol=1e-6), "earlier updates, and no more"
            assert update.b.any()
            weight += 3 * (update.b @ update.a).detach()


def test_the_next_experience_begins_with_the_same_answers(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=1)
    strategy = toy.learned(IncLoRA(), 0)
    rows = toy.batch(0, 0, 6).inputs
    before = strategy.model(rows)
    strategy.before(toy.stream.experiences[1])
    assert torch.allclose(strategy.model(rows), before, atol=1e-5)
    assert not any(u.b.any() for u in strategy._updates)
