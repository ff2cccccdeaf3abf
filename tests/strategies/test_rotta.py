"""RoTTA against its limits and a loop written out."""

from __future__ import annotations

import copy

import pytest
import torch
from drift import Drift
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.batch_statistics import batch_norms
from clbench.nn.category_memory import CategoryMemory
from clbench.nn.test_time_augmentation import CoTTAViews
from clbench.testing import ToyDrift
from strategies.rotta import RoTTA


def test_without_rate_and_momentum_it_is_the_source() -> None:
    drift = Drift()
    rotta = drift.prepare(RoTTA(lr=0.0, statistics_momentum=0.0, update_every=5))
    source = drift.fresh()
    for domain in range(3):
        for batch in drift.batches(domain):
            assert torch.equal(rotta.adapt(batch), source(batch.inputs))


def test_answers_are_given_before_the_batch_is_learned() -> None:
    drift = Drift()
    rotta = drift.prepare(RoTTA(update_every=2, memory_size=8, lr=0.1, nu=0.5))
    first, second = drift.batches()[:2]
    source = drift.fresh()
    assert torch.equal(rotta.adapt(first), source(first.inputs))
    assert not torch.equal(rotta.adapt(second), source(second.inputs))


class Robust(nn.Module):
    """The published batch norm, for training and evaluation."""

    def __init__(self, layer: nn.BatchNorm2d, momentum: float) -> None:
        super().__init__()
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.mean, self.variance = layer.running_mean.clone(), layer.running_var.clone()
        self.weight, self.bias = layer.weight, layer.bias
        self.momentum, self.eps = momentum, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.training:
            mean = (1 - self.momentum) * mean + self.momentum * x.mean((0, 2, 3))
            spread = x.var((0, 2, 3), unbiased=False)
            variance = (1 - self.momentum) * variance + self.momentum * spread
            self.mean, self.variance = mean.detach(), variance.detach()
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (variance.view(shape) + self.eps).sqrt()
        return x * self.weight.view(shape) + self.bias.view(shape)


def published(model: nn.Module, momentum: float) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, Robust(child, momentum))
    return model.requires_grad_(False)


def test_it_is_the_published_loop() -> None:
    """Teacher, student, memory and update written out; updates fall inside of batches."""
    drift = Drift()
    options = {"memory_size": 9, "update_every": 7, "lr": 0.02, "nu": 0.3}
    rotta = drift.prepare(
        RoTTA(optimizer="sgd", statistics_momentum=0.2, **options)  # type: ignore[arg-type]
    )
    student = published(drift.fresh(), 0.2)
    teacher = copy.deepcopy(student)
    norms = [m for m in student.modules() if isinstance(m, Robust)]
    trained = [p.requires_grad_() for m in norms for p in (m.weight, m.bias)]
    optimizer = torch.optim.SGD(trained, 0.02, 0.9)
    memory, seen, updates = CategoryMemory(9, 6), 0, 0
    context = drift.context()
    views = CoTTAViews(context)
    for batch in [b for domain in range(3) for b in drift.batches(domain)[:2]]:
        found = rotta.adapt(batch)
        with torch.no_grad():
            outputs = teacher.eval()(batch.inputs)
        torch.testing.assert_close(found, outputs, rtol=0, atol=5e-4)
        p = outputs.softmax(1)
        entropy = -(p * torch.log(p + 1e-6)).sum(1)
        for i in range(len(batch)):
            memory.add(batch.raw[i : i + 1], [int(p[i].argmax())], [float(entropy[i])])
            seen += 1
            if seen % 7:
                continue
            updates += 1
            raw, ages = memory.content()
            inputs = context.transform.test(raw)
            with torch.no_grad():
                q = teacher.train()(inputs).softmax(1)
            s = student.train()(next(views(inputs, 1)))
            weight = torch.exp(-ages) / (1 + torch.exp(-ages))
            loss = (-(q * F.log_softmax(s, 1)).sum(1) * weight).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for t, u in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.copy_(0.7 * t + 0.3 * u)
    assert updates == 8
    moved = [m for m in teacher.modules() if isinstance(m, Robust)]
    for norm, expected in zip(batch_norms(rotta.teacher), moved, strict=True):
        torch.testing.assert_close(norm.weight, expected.weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(norm.running_mean, expected.mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(norm.running_var, expected.variance, rtol=0, atol=1e-4)


def test_only_scales_and_shifts_learn() -> None:
    drift = Drift()
    rotta = drift.prepare(RoTTA(update_every=5, lr=0.1))
    for batch in drift.batches():
        rotta.adapt(batch)
    source = dict(drift.fresh().named_parameters())
    for name, parameter in rotta.model.named_parameters():
        original = source[name.replace(".layer.", ".")]
        assert torch.equal(parameter, original) != (".layer." in name), name


def test_a_network_without_batch_norms_trains_its_other_norms() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)
            self.head = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.norm(self.conv(x)).mean((2, 3)))
            return logits

    with torch.random.fork_rng():
        torch.manual_seed(0)
        drift = Drift(model=Grouped())
    rotta = drift.prepare(RoTTA(update_every=5))
    rotta.adapt(drift.batches()[0])
    source = drift.fresh()
    assert not torch.equal(
        rotta.model.get_parameter("norm.bias"), source.get_parameter("norm.bias")
    )
    assert torch.equal(rotta.model.get_parameter("head.bias"), source.get_parameter("head.bias"))


def test_a_memory_beyond_the_budget_is_refused() -> None:
    RoTTA().check(ToyDrift(memory_size=64))
    with pytest.raises(UserError, match="memory_size=63 allows fewer"):
        RoTTA().check(ToyDrift(memory_size=63))
