"""MER against its equation, step by step, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.training import GradientStrategy
from strategies.finetune import Finetune
from strategies.mer import MER
from strategies.replay import Replay


class Counting(Finetune):
    """Adds 1 to every weight in a step."""

    def update(self, loss: Tensor) -> None:  # noqa: ARG002
        with torch.no_grad():
            for p in self.model.parameters():
                p += 1


@pytest.fixture
def one_weight() -> nn.Module:
    """A model for the toy scenario with a weight that is seen, 0 at the start."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 6))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def test_by_hand(bench: Callable[..., Any], one_weight: nn.Module) -> None:
    """interval 3, epsilon 1/2: 1 2 3→1.5; 2.5 3.5 4.5→3; 4 5 6→4.5; then 5.5."""
    toy = bench(one_weight)
    strategy = toy.prepare(MER(base=Counting(), interval=3, epsilon=0.5))
    seen = []
    for _ in range(10):
        strategy.update(torch.zeros(()))
        seen.append(next(strategy.model.parameters()).flatten()[0].item())
    assert seen == [1, 2, 1.5, 2.5, 3.5, 3, 4, 5, 4.5, 5.5]
    assert all((w == 4.5).all() for w in strategy.old_weights)


def test_intervals_run_on_over_experiences(bench: Callable[..., Any]) -> None:
    toy = bench(per_class=10, epochs=1)
    strategy = toy.learned(MER(base=Finetune(), interval=10**6, epsilon=0.0))
    assert strategy.steps == len(toy.steps) > 3


@pytest.mark.parametrize("base", [Finetune(), Replay()], ids=["finetune", "replay"])
def test_with_epsilon_1_it_is_its_base(
    bench: Callable[..., Any],
    same_weights: Callable[..., bool],
    base: GradientStrategy,
) -> None:
    toy = bench(per_class=10, epochs=2)
    one, other = toy.learned(MER(base=base, interval=2, epsilon=1.0)), toy.learned(base)
    assert same_weights(one.model, other.model)
    third = toy.learned(MER(base=base, interval=2, epsilon=0.5))
    assert not same_weights(third.model, other.model)


def test_with_epsilon_0_every_interval_ends_where_it_began(
    bench: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    toy = bench(per_class=10, epochs=2)
    start = toy.prepare(Finetune())
    one = toy.learned(MER(base=Finetune(), interval=1, epsilon=0.0))
    assert same_weights(one.model, start.model)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="epsilon"):
        MER(base=Finetune(), epsilon=1.1)
    with pytest.raises(UserError, match="interval"):
        MER(base=Finetune(), interval=0)
