"""MEMO against its limits, deep copies with torch's optimizers, and a step worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from drift import Drift
from torch import Tensor, nn
from torch.nn import functional as F

from strategies.memo import MEMO


class PriorNorm(nn.Module):
    """The batch norm of MEMO's code, but for the variance: the stored statistics count 16."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, variance = x.mean((0, 2, 3)).detach(), x.var((0, 2, 3), unbiased=False).detach()
        mean = 16 / 17 * layer.running_mean + 1 / 17 * mean
        variance = 16 / 17 * layer.running_var + 1 / 17 * variance
        return F.batch_norm(x, mean, variance, layer.weight, layer.bias, False, 0, layer.eps)


def with_prior(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, PriorNorm(child))
    return model


def one_by_one(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x[None]) for x in inputs])


def test_without_rate_it_is_the_source_with_prior_statistics_of_each_image() -> None:
    drift = Drift()
    memo, model = drift.prepare(MEMO(lr=0.0)), with_prior(drift.fresh())
    for domain in range(3):
        batch = drift.batches(domain)[0]
        expected = one_by_one(model, batch.inputs)
        torch.testing.assert_close(memo.adapt(batch), expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(memo.predict(batch), expected, rtol=0, atol=2e-4)


def test_with_an_infinite_prior_too_it_is_the_source() -> None:
    drift = Drift()
    memo, batch = drift.prepare(MEMO(lr=0.0, prior=math.inf)), drift.batches()[0]
    expected = one_by_one(drift.fresh(), batch.inputs)
    torch.testing.assert_close(memo.adapt(batch), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        (MEMO(lr=0.02, copies=5), torch.optim.SGD),
        (MEMO(lr=0.02, copies=5, weight_decay=0.3), torch.optim.SGD),
        (MEMO(lr=1e-3, copies=5, optimizer="adamw", weight_decay=10.0), torch.optim.AdamW),
    ],
    ids=["sgd", "decayed", "adamw"],
)
def test_it_is_the_published_loop(options: MEMO, optimizer: type[torch.optim.Optimizer]) -> None:
    """For each image a fresh copy of the model, a fresh optimizer, one step, one answer."""
    drift = Drift()
    memo, batch = drift.prepare(options), drift.batches()[2]
    copies = drift.prepare(options)._copies(batch.raw, 5)
    found = memo.adapt(batch)
    source = with_prior(drift.fresh())
    answers = []
    for views, image in zip(copies, batch.inputs, strict=True):
        model = copy.deepcopy(source)
        steps = optimizer(model.parameters(), options.lr, weight_decay=options.weight_decay)  # type: ignore[call-arg, arg-type]
        p = model(views).softmax(1).mean(0)
        (-(p * p.log()).sum()).backward()
        steps.step()
        answers.append(one_by_one(model, image[None]))
    expected = torch.cat(answers)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert (found - memo.predict(batch)).abs().max() > 0.05


def test_many_at_once_are_one_at_a_time() -> None:
    """What a GPU does at once is what a CPU does in a loop."""
    drift = Drift()
    memo, batch = drift.prepare(MEMO(lr=0.05, copies=4)), drift.batches()[1]
    copies = memo._copies(batch.raw, 4)
    together = memo.episode(copies, batch.inputs)
    pairs = zip(copies.split(1), batch.inputs.split(1), strict=True)
    alone = torch.cat([memo.episode(*pair) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_an_image_does_not_depend_on_its_company() -> None:
    drift = Drift()
    memo, (one, two) = drift.prepare(MEMO(copies=3)), drift.batches()[:2]
    copies = memo._copies(torch.cat((one.raw, two.raw)), 3)
    inputs = torch.cat((one.inputs, two.inputs))
    answers = memo.episode(copies, inputs)
    backwards = memo.episode(copies.flip(0), inputs.flip(0)).flip(0)
    torch.testing.assert_close(answers, backwards, rtol=0, atol=1e-3)


def test_no_weight_moves() -> None:
    drift = Drift()
    memo = drift.prepare(MEMO(lr=1.0, copies=3))
    before = {k: v.clone() for k, v in memo.model.state_dict().items()}
    memo.adapt(drift.batches()[0])
    assert all(torch.equal(before[k], v) for k, v in memo.model.state_dict().items())


class Linear(nn.Module):
    """Two outputs, w x for the first number of each input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 1.0]).log())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1] * self.weight


def test_one_step_by_hand() -> None:
    """Copies x = 1 and x = 0 of w = (ln 3, 0) say (3/4, 1/4) and (1/2, 1/2); the mean (5/8, 3/8).

    ∂H/∂w_k = ½ p_k (−ln p̄_k + Σ_j p_j ln p̄_j) of the first copy: ∓ 3/32 ln(5/3).
    """
    slope = torch.tensor([-3 / 32, 3 / 32]) * math.log(5 / 3)
    start = torch.tensor([3.0, 1.0]).log()
    copies, image = torch.tensor([[1.0], [0.0]]).view(1, 2, 1, 1, 1), torch.ones(1, 1, 1, 1)
    drift = Drift(model=Linear(), n_outputs=2)
    for options, expected in (
        (MEMO(lr=4.0), start - 4 * slope),
        (MEMO(lr=4.0, weight_decay=0.1), start - 4 * (slope + 0.1 * start)),
        (MEMO(lr=0.5, optimizer="adamw"), start + torch.tensor([0.5, -0.5])),
        (MEMO(lr=0.5, optimizer="adamw", weight_decay=1.0), start / 2 + torch.tensor([0.5, -0.5])),
    ):
        found = drift.prepare(options).episode(copies, image)
        torch.testing.assert_close(found[0], expected)
