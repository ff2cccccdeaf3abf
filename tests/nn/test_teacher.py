"""Teachers by hand."""

from __future__ import annotations

import math

import torch
from torch import nn

from clbench.nn.teacher import (
    consistency,
    follow,
    frozen_copy,
    restore_stochastically,
    weights_and_biases,
)


class Network(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)


def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network()


def test_a_frozen_copy_is_a_copy() -> None:
    model = network().eval()
    copied = frozen_copy(model)
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not copied.norm.training
    with torch.no_grad():
        model.conv.weight.zero_()
        model.norm.running_mean = torch.full((8,), 7.0)
    assert copied.conv.weight.abs().min() > 0
    assert copied.norm.running_mean is not None
    assert torch.equal(copied.norm.running_mean, torch.zeros(8))


def test_consistency_by_hand() -> None:
    """q = (1/2, 1/2), p = (3/4, 1/4): −½ ln ¾ − ½ ln ¼; the reverse is ln 2."""
    student, teacher = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log(), torch.zeros(2, 2)
    forward = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    expected = torch.tensor([forward, math.log(2)])
    torch.testing.assert_close(consistency(student, teacher), expected)
    both = consistency(student, teacher, symmetric=True)
    torch.testing.assert_close(both, (expected + math.log(2)) / 2)


def test_a_teacher_follows_by_hand() -> None:
    """0.75 · 4 + 0.25 · 8 = 5, then 0.75 · 5 + 0.25 · 8 = 5.75; buffers stay."""
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.constant_(student.weight, 8.0)
    nn.init.constant_(teacher.weight, 4.0)
    student.running_mean = torch.ones(3)
    for expected in (5.0, 5.75):
        follow(teacher, student, 0.75)
        assert teacher.weight.tolist() == [expected] * 3
    assert teacher.bias.tolist() == [0.0] * 3
    assert teacher.running_mean is not None
    assert teacher.running_mean.tolist() == [0.0] * 3


def test_momentum_one_stays_and_momentum_zero_copies() -> None:
    student, teacher = network(), network()
    with torch.no_grad():
        student.conv.weight.mul_(1.7)
    before = teacher.conv.weight.clone()
    follow(teacher, student, 1.0)
    assert torch.equal(teacher.conv.weight, before)
    follow(teacher, student, 0.0)
    assert torch.equal(teacher.conv.weight, student.conv.weight)


def test_each_number_is_restored_on_its_own() -> None:
    now, origin = [torch.ones(200, 300), torch.ones(7)], [torch.zeros(200, 300), torch.zeros(7)]
    generator = torch.Generator().manual_seed(0)
    restore_stochastically(now, origin, 0.3, generator)
    n = 200 * 300
    assert set(now[0].unique().tolist()) == {0.0, 1.0}
    assert abs((now[0] == 0).sum() - 0.3 * n) < 4.5 * (0.21 * n) ** 0.5
    for axis in (0, 1):  # neither whole rows nor whole columns
        shares = now[0].mean(axis)
        assert shares.min() > 0.4
        assert shares.max() < 0.95
    again = [torch.ones(200, 300), torch.ones(7)]
    restore_stochastically(again, origin, 0.3, generator)
    assert not torch.equal(again[0], now[0])


def test_probability_one_restores_every_bit_and_zero_none() -> None:
    model, origin = network(), network()
    parameters, source = list(model.parameters()), list(origin.parameters())
    with torch.no_grad():
        for p in parameters:
            p.add_(1.1)
    before = [p.detach().clone() for p in parameters]
    restore_stochastically(parameters, source, 0.0, torch.Generator())
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    restore_stochastically(parameters, source, 1.0, torch.Generator())
    assert all(torch.equal(p, s) for p, s in zip(parameters, source, strict=True))
    assert all(p.requires_grad for p in parameters)


def test_weights_and_biases_leave_out_what_has_another_name() -> None:
    model = network()
    model.register_parameter("token", nn.Parameter(torch.zeros(2)))
    assert list(weights_and_biases(model)) == [
        *("conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"),
    ]
