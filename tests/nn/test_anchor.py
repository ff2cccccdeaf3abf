"""The quadratic penalty against arithmetic and against plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from clbench.nn.anchor import Anchor


class Vector(nn.Module):
    """Two parameters: the pull must not depend on how the weights are divided."""

    def __init__(self, one: Sequence[float], two: Sequence[float]) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor(one, dtype=torch.float64))
        self.two = nn.Parameter(torch.tensor([two], dtype=torch.float64))

    def put(self, one: Sequence[float], two: Sequence[float]) -> None:
        with torch.no_grad():
            self.one.copy_(torch.tensor(one))
            self.two.copy_(torch.tensor([two]))


def columns(one: Sequence[float], two: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(one, dtype=torch.float64), torch.tensor([two], dtype=torch.float64)]


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


def test_by_hand() -> None:
    """½(2·(2−1)² + 8·(1+1)² + 0·(5−3)²) = 17, with gradients 2·1, 8·2 and 0."""
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([2, 8], [0]))
    model.put([2, 1], [5])
    assert anchor.penalty().item() == pytest.approx(17)
    torch.testing.assert_close(gradients(anchor.penalty(), model), columns([2, 16], [0]))
    torch.testing.assert_close(anchor.curvature(), columns([2, 8], [0]))


def test_there_is_none_before_the_first() -> None:
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    model.put([9, 9], [9])
    assert not anchor.active
    assert anchor.penalty().item() == 0
    assert not anchor.penalty().requires_grad
    whole, rest = columns([3, 4], [5]), columns([0, 0], [0])
    anchor.without_gradient(whole, out=rest)
    torch.testing.assert_close(rest, whole)


def test_move_forgets_what_was_there() -> None:
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([5, 5], [5]))
    model.put([0, 0], [0])
    anchor.add(columns([1, 1], [1]))
    anchor.move(columns([2, 8], [1]))
    assert anchor.penalty().item() == 0
    model.put([1, 1], [2])
    assert anchor.penalty().item() == pytest.approx(0.5 * (2 + 8 + 4))


def test_a_sum_of_penalties_is_one_penalty() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        sizes = (5,), (2, 3)
        return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]

    model = Vector([0] * 5, [0] * 3)
    model.two = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    anchor = Anchor(model)
    terms: list[tuple[list[Tensor], list[Tensor]]] = []
    for _ in range(4):
        centre, curvature = draw(), [c.square() for c in draw()]
        for c in curvature:
            c.view(-1)[len(terms)] = 0  # a weight that does not matter this time
            c.view(-1)[4] = 0  # one that never does
        with torch.no_grad():
            for p, value in zip(model.parameters(), centre, strict=True):
                p.copy_(value)
        anchor.add(curvature)
        terms.append((centre, curvature))
    with torch.no_grad():
        for p, value in zip(model.parameters(), draw(), strict=True):
            p.copy_(value)
    explicit = sum(
        (c * (p - m).square()).sum() / 2
        for centre, curvature in terms
        for c, p, m in zip(curvature, model.parameters(), centre, strict=True)
    )
    assert isinstance(explicit, Tensor)
    torch.testing.assert_close(anchor.penalty(), explicit)
    found = gradients(anchor.penalty(), model)
    torch.testing.assert_close(found, gradients(explicit, model))


def test_a_factor_reaches_the_gradient() -> None:
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([2, 8], [0]))
    model.put([2, 1], [5])
    (model.one.sum() + 3 * anchor.penalty()).backward()
    assert model.one.grad is not None
    torch.testing.assert_close(model.one.grad, columns([7, 49], [0])[0])


def test_a_gradient_without_the_penalty_s_share() -> None:
    """The whole gradient is left as it is."""
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([2, 8], [1]))
    model.put([2, 1], [5])
    whole, rest = columns([3, 4], [5]), columns([0, 0], [0])
    anchor.without_gradient(whole, out=rest)
    torch.testing.assert_close(rest, columns([3 - 2, 4 - 16], [5 - 2]))
    torch.testing.assert_close(whole, columns([3, 4], [5]))


def test_two_penalties_before_one_backward_pass() -> None:
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([2, 8], [1]))
    model.put([2, 1], [5])
    found = gradients(anchor.penalty() + anchor.penalty(), model)
    torch.testing.assert_close(found, columns([4, 32], [4]))


def test_weights_that_change_before_the_backward_pass_are_an_error() -> None:
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([2, 8], [1]))
    value = anchor.penalty()
    model.put([2, 1], [5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(value, model)


def test_a_frozen_parameter_gets_no_gradient_and_counts_nevertheless() -> None:
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([2, 8], [4]))
    model.put([2, 1], [5])
    model.one.requires_grad_(False)
    value = anchor.penalty()
    value.backward()
    assert value.item() == pytest.approx(17 + 8)
    assert model.one.grad is None
    assert model.two.grad is not None
    assert model.two.grad.tolist() == [[8.0]]


def test_what_is_frozen_from_the_start_is_left_alone() -> None:
    model = Vector([1, -1], [3])
    model.one.requires_grad_(False)
    anchor = Anchor(model)
    assert anchor.names == ["two"]
    named = {"one": torch.ones(2), "two": torch.ones(1, 1)}
    assert anchor.in_order(named) == [named["two"]]


def test_a_copy_pulls_its_own_model() -> None:
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([2, 8], [1]))
    other_model, other = copy.deepcopy((model, anchor))
    model.put([2, 1], [5])
    assert anchor.penalty().item() == pytest.approx(19)
    assert other.penalty().item() == 0
    other_model.put([1, -1], [5])
    assert other.penalty().item() == pytest.approx(2)


def test_saved_and_loaded() -> None:
    model = Vector([1, -1], [3])
    anchor = Anchor(model)
    anchor.move(columns([2, 8], [1]))
    model.put([4, 4], [4])
    anchor.add(columns([1, 0], [1]))
    other = Anchor(model)
    other.load_state_dict(copy.deepcopy(anchor.state_dict()))
    model.put([2, 1], [5])
    assert other.active
    assert torch.equal(other.penalty(), anchor.penalty())
    assert all(map(torch.equal, other.curvature(), anchor.curvature()))
