"""Ridge regression in parts against the closed form on everything at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import Diverged
from clbench.nn.ridge import RidgeRegression, cholesky, held_out_errors


def samples(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs with a mean and correlations, and three classes that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 1 + torch.randn(count, size, generator=generator).cumsum(1)
    return inputs, (inputs[:, 0] > 1).long() + (inputs[:, 1] > 2).long()


def closed_form(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """By the pseudo-inverse of [H; √ridge·I], which never forms HᵀH."""
    inputs = inputs.double()
    size = inputs.shape[1]
    whole = torch.cat((inputs, ridge**0.5 * torch.eye(size, dtype=torch.float64)))
    answers = F.one_hot(targets, 3).double()
    padded = F.pad(answers, (0, 0, 0, size))
    solution: Tensor = torch.linalg.lstsq(whole, padded, driver="gelsd").solution
    return solution


def test_by_hand() -> None:
    """H = (1, 0), (1, 2), classes 0 and 1, ridge 1: (G + I) = ((3, 2), (2, 5))."""
    regression = RidgeRegression(2, 3)
    regression.add(torch.tensor([[1.0, 0], [1, 2]]), torch.tensor([0, 1]))
    assert regression.gram.tolist() == [[2, 2], [2, 4]]
    assert regression.products.tolist() == [[1, 1, 0], [0, 2, 0]]
    expected = torch.tensor([[5, 1, 0], [-2, 4, 0]], dtype=torch.float64) / 11
    torch.testing.assert_close(regression.solve(1.0), expected)


@pytest.mark.parametrize("count", [9, 60])
@pytest.mark.parametrize("ridge", [1e-6, 1.0, 1e4])
def test_parts_in_any_order_give_the_closed_form(count: int, ridge: float) -> None:
    """Fewer samples than inputs, and more."""
    inputs, targets = samples(count, 20)
    regression = RidgeRegression(20, 3)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    for some in order.split(7):
        regression.add(inputs[some], targets[some])
    expected = closed_form(inputs, targets, ridge)
    torch.testing.assert_close(regression.solve(ridge), expected, rtol=1e-4, atol=1e-6)


def test_singular_sums_need_double_precision() -> None:
    """Half as many samples as inputs: in fp32 there is not even a factor."""
    inputs, targets = samples(40, 80)
    regression = RidgeRegression(80, 3)
    regression.add(inputs, targets)
    found, expected = regression.solve(1e-4), closed_form(inputs, targets, 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    gram = inputs.T @ inputs + 1e-4 * torch.eye(80)
    assert torch.linalg.cholesky_ex(gram).info > 0


@pytest.mark.parametrize("count", [12, 20, 50])
def test_errors_on_what_is_held_out_are_those_of_as_many_solutions(count: int) -> None:
    """By the smaller of HHᵀ and HᵀH."""
    inputs, targets = samples(count, 20)
    others, labels = samples(15, 20, seed=1)
    ridges = [1e-4, 1e-2, 1.0, 1e3]
    batches = list(zip(others.split(4), labels.split(4), strict=True))
    found = held_out_errors(inputs, targets, batches, 3, ridges)
    wanted = F.one_hot(labels, 3)
    for error, ridge in zip(found, ridges, strict=True):
        answers = others.double() @ closed_form(inputs, targets, ridge)
        torch.testing.assert_close(error, (answers - wanted).square().sum(), rtol=1e-5, atol=1e-8)


def test_the_ridge_grows_until_there_is_a_factor() -> None:
    """−1 among the eigenvalues: 0.01, 0.1 and 1 are not enough, 10 is."""
    matrix = torch.diag(torch.tensor([4.0, -1.0], dtype=torch.float64))
    factor = cholesky(matrix, 0.01)
    torch.testing.assert_close(factor @ factor.T, matrix + 10 * torch.eye(2, dtype=torch.float64))
    assert matrix.tolist() == [[4, 0], [0, -1]], "the matrix itself stays"


def test_state_comes_back() -> None:
    one, two = RidgeRegression(4, 3), RidgeRegression(4, 3)
    one.add(*samples(30, 4))
    two.add(*samples(10, 4, seed=1))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.solve(0.1), two.solve(0.1))


def test_sums_that_are_not_finite_end_the_run() -> None:
    regression = RidgeRegression(2, 3)
    regression.add(torch.tensor([[torch.inf, 0]]), torch.tensor([0]))
    with pytest.raises(Diverged):
        regression.solve(1.0)
