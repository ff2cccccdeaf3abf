"""MAS against its closed form on a linear model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.protocol import run
from clbench.testing import ToyScenario
from strategies.finetune import Finetune
from strategies.mas import MAS

Make = Callable[..., Any]


@pytest.fixture
def linear() -> nn.Module:
    """h = Wx + b for the toy scenario."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 6))


def importance(one: Any, strategy: MAS, index: int, size: int = 1) -> list[Tensor]:
    """∂‖Wx + b‖²/∂W = 2 (Wx + b) xᵀ and ∂/∂b = 2 (Wx + b): mean magnitudes.

    Args:
        one: The bench.
        strategy: Its model is linear.
        index: Of the experience.
        size: Samples whose gradients are averaged before the magnitude is taken.
    """
    samples = one.stream.experiences[index].train
    x = samples.take(torch.arange(len(samples))).inputs.flatten(1)
    with torch.no_grad():
        h = 2 * strategy.model(x)
    each = [h[:, :, None] * x[:, None], h]
    return [torch.stack([g.mean(0) for g in e.split(size)]).abs().mean(0) for e in each]


def assert_importance(strategy: MAS, expected: list[Tensor]) -> None:
    curvature = strategy.anchor.curvature()
    for c, omega in zip(curvature, expected, strict=True):
        torch.testing.assert_close(c / (2 * strategy.mas_lambda), omega, rtol=1e-4, atol=1e-6)


def test_after_one_experience(bench: Make, linear: nn.Module) -> None:
    one = bench(linear)
    mas = one.learned(MAS(mas_lambda=0.5), 0)
    assert_importance(mas, importance(one, mas, 0))


@pytest.mark.parametrize(
    ("options", "keep", "take"),
    [
        ({}, 1, 1),
        ({"accumulate": "decay"}, 0.5, 0.5),
        ({"accumulate": "decay", "decay": 0.2}, 0.2, 0.8),
    ],
)
def test_after_two_experiences(
    bench: Make, linear: nn.Module, options: dict[str, Any], keep: float, take: float
) -> None:
    """Sum: Ω₁ + Ω₂. Decay: decay·Ω₁ + (1 − decay)·Ω₂."""
    one = bench(linear)
    mas = one.learned(MAS(lr=0.01, **options), 0)
    first = importance(one, mas, 0)
    one.teach(mas, 1)
    second = importance(one, mas, 1)
    expected = [keep * a + take * b for a, b in zip(first, second, strict=True)]
    assert_importance(mas, expected)


def test_the_loss_has_the_penalty(bench: Make, linear: nn.Module) -> None:
    """λ Σ Ω (θ − θ*)², without a half; θ* is where the latest experience ended."""
    one = bench(linear)
    mas = one.learned(MAS(mas_lambda=0.3, lr=0.01), 0, 1)
    omegas = [c / 0.6 for c in mas.anchor.curvature()]
    with torch.no_grad():
        for p in mas.model.parameters():
            p.add_(0.25)
    batch = one.batch(1, 0, 6)
    plain = mas.context.objective.loss(mas.forward(batch.inputs), batch.targets)
    expected = 0.3 * 0.25**2 * sum(float(o.sum()) for o in omegas)
    assert (mas.loss(batch) - plain).item() == pytest.approx(expected, rel=1e-4)


def test_by_batch_the_signs_cancel_first(bench: Make, linear: nn.Module) -> None:
    """One batch of all samples: the order that is drawn decides nothing."""
    one = bench(linear, batch_size=80)
    mas = one.learned(MAS(gradients="batch"), 0)
    expected = importance(one, mas, 0, size=80)
    assert_importance(mas, expected)
    single = importance(one, mas, 0)
    assert all((a <= b + 1e-6).all() for a, b in zip(expected, single, strict=True))
    assert (expected[0] < single[0] / 2).any()


def test_some_samples_are_enough(bench: Make, linear: nn.Module) -> None:
    """Of one sample W's importance is |2h| |x|ᵀ, of rank one."""
    one = bench(linear)
    mas = one.learned(MAS(importance_samples=1), 0)
    omega = mas.anchor.curvature()[0] / (2 * mas.mas_lambda)
    singular = torch.linalg.svdvals(omega)
    assert singular[0] > 0
    assert singular[1] < 1e-4 * singular[0]


def test_without_a_weight_it_is_fine_tuning_bit_for_bit(
    same_weights: Callable[..., bool],
) -> None:
    plain, none, some = Finetune(), MAS(mas_lambda=0), MAS(mas_lambda=0.1)
    results = [run(ToyScenario(), s, Conditions(threads=1)) for s in (plain, none, some)]
    assert results[0].accuracy_matrix == results[1].accuracy_matrix
    assert same_weights(plain.model, none.model)
    assert not same_weights(plain.model, some.model)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(UserError, match="mas_lambda=-1"):
        MAS(mas_lambda=-1)
    with pytest.raises(UserError, match="decay=2"):
        MAS(decay=2)
