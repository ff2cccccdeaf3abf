"""Orders of arrival."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.shifts import correlated, severities


def labels(per_class: int = 50, n_classes: int = 5) -> Tensor:
    return torch.arange(n_classes).repeat(per_class)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def runs(order: Tensor, of: Tensor) -> int:
    """How often the label changes on the way, plus one."""
    there = of[order]
    return int((there[1:] != there[:-1]).sum()) + 1


@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0, 100.0])
def test_every_sample_arrives_once(delta: float) -> None:
    order = correlated(labels(), delta, generator())
    assert order.sort().values.tolist() == list(range(250))


def test_without_any_mixing_one_class_comes_after_another() -> None:
    assert runs(correlated(labels(), 0, generator()), labels()) == 5


def test_a_smaller_delta_mixes_less() -> None:
    changes = [
        sum(runs(correlated(labels(), delta, generator(s)), labels()) for s in range(20)) / 20
        for delta in (0.0, 0.1, 1.0)
    ]
    assert changes[0] < changes[1] < changes[2] <= 25  # at most each class once in each slot


def test_a_large_delta_spreads_every_class_evenly() -> None:
    order = correlated(labels(100, 4), 1e6, generator())
    for slot in labels(100, 4)[order].split(100):
        assert (slot.bincount(minlength=4) - 25).abs().max() <= 3


def test_a_slot_that_has_its_share_gets_no_class_more() -> None:
    # A tiny delta puts each class into one slot; as a class is a share, each slot gets one.
    order = correlated(labels(50, 6), 1e-6, generator())
    assert [len(slot.unique()) for slot in labels(50, 6)[order].split(50)] == [1] * 6


def test_the_generator_decides() -> None:
    one, same, other = (correlated(labels(), 0.1, generator(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match="larger delta"):
        correlated(torch.tensor([0] * 98 + [1, 2]), 1e-6, generator())


@pytest.mark.parametrize(
    ("highest", "expected"), [(1, [1]), (3, [1, 2, 3, 2, 1]), (5, [1, 2, 3, 4, 5, 4, 3, 2, 1])]
)
def test_a_domain_comes_and_goes(highest: int, expected: list[int]) -> None:
    assert severities(highest) == expected
