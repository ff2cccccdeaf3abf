"""Batch-norm adaptation against training mode, the mixtures' ends, and statistics by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.samples import Batch
from strategies.bn_adapt import BNAdapt
from strategies.source import Source

Make = Callable[..., Any]


def answers(strategy: Any, batches: list[Batch]) -> list[Tensor]:
    return [strategy.adapt(batch) for batch in batches]


def test_batch_statistics_are_those_of_training_mode(drift: Make) -> None:
    bench = drift()
    strategy = bench.prepare(BNAdapt())
    reference = copy.deepcopy(bench.prepare(Source()).model).train()
    for index in range(3):
        for batch in bench.arriving(index):
            with torch.no_grad():
                assert torch.equal(strategy.adapt(batch), reference(batch.inputs))
            assert torch.equal(strategy.predict(batch), strategy.adapt(batch))


def test_the_ends_of_the_mixture_are_the_source_and_the_batch(drift: Make) -> None:
    bench = drift()
    source, batch, none, all_of_it = (
        bench.prepare(s)
        for s in (
            Source(),
            BNAdapt(),
            BNAdapt(statistics="alpha", alpha=0.0),
            BNAdapt(statistics="alpha", alpha=1.0),
        )
    )
    arriving = bench.arriving(1)
    torch.testing.assert_close(answers(none, arriving), answers(source, arriving))
    torch.testing.assert_close(answers(all_of_it, arriving), answers(batch, arriving))


def test_a_prior_is_a_share_that_depends_on_the_size_of_the_batch(drift: Make) -> None:
    bench = drift()
    prior = bench.prepare(BNAdapt(statistics="prior", prior=30.0))
    for size in (1, 10):
        alpha = bench.prepare(BNAdapt(statistics="alpha", alpha=size / (size + 30)))
        batch = bench.arriving(1, size)[0]
        assert torch.equal(prior.adapt(batch), alpha.adapt(batch))


class Two(nn.Module):
    """Two batch norms in a row, so that what the second one sees depends on the first's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.two(self.one(x).square()).relu().mean((2, 3)))
        return out


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel."""
    columns = x.transpose(0, 1).flatten(1)
    return columns.mean(1), columns.var(1)


def test_moving_statistics_by_hand(drift: Make) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Two()
    bench = drift(model)
    strategy = bench.prepare(BNAdapt(statistics="ema", momentum=0.3))
    mean, variance, eps = torch.zeros(3), torch.ones(3), 1e-5
    second = mean.clone(), variance.clone()
    for batch in bench.arriving(1):
        x = batch.inputs
        outputs = strategy.adapt(batch)
        m, v = moments(x)
        mean, variance = 0.7 * mean + 0.3 * m, 0.7 * variance + 0.3 * v
        # While statistics are taken, the first norm divides by the batch.
        biased = x.transpose(0, 1).flatten(1).var(1, correction=0)
        divided = (x - m.view(3, 1, 1)) / (biased.view(3, 1, 1) + eps).sqrt()
        found = moments(divided.square())
        second = 0.7 * second[0] + 0.3 * found[0], 0.7 * second[1] + 0.3 * found[1]
        torch.testing.assert_close(strategy.model.one.running_mean, mean)
        torch.testing.assert_close(strategy.model.one.running_var, variance)
        torch.testing.assert_close(strategy.model.two.running_mean, second[0])
        torch.testing.assert_close(strategy.model.two.running_var, second[1])
        hand = (x - mean.view(3, 1, 1)) / (variance.view(3, 1, 1) + eps).sqrt()
        hand = (hand.square() - second[0].view(3, 1, 1)) / (second[1].view(3, 1, 1) + eps).sqrt()
        torch.testing.assert_close(outputs, model.head(hand.relu().mean((2, 3))))
        assert torch.equal(strategy.predict(batch), outputs)


@pytest.mark.parametrize("statistics", ["batch", "alpha", "prior", "ema"])
def test_nothing_is_trained(drift: Make, statistics: str) -> None:
    bench = drift()
    strategy = bench.prepare(BNAdapt(statistics=statistics))  # type: ignore[arg-type]
    before = copy.deepcopy(dict(strategy.model.named_parameters()))
    outputs = strategy.adapt(bench.arriving(0)[0])
    assert not outputs.requires_grad
    assert not any(p.requires_grad for p in strategy.model.parameters())
    after = dict(strategy.model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("statistics", ["batch", "alpha", "ema"])
def test_a_model_without_batch_norm_is_refused(drift: Make, statistics: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    with pytest.raises(UserError, match="no batch norm"):
        drift(model).prepare(BNAdapt(statistics=statistics))  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"alpha": 1.1}, {"prior": -1.0}, {"momentum": -0.1}])
def test_ranges(option: dict[str, float]) -> None:
    with pytest.raises(UserError, match="out of range"):
        BNAdapt(**option)  # type: ignore[arg-type]
