"""The diagonal Fisher information against closed forms of a linear softmax classifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nn.fisher import Fisher, diagonal_fisher, fisher_of_answers
from clbench.nn.transforms import Identity
from clbench.samples import Samples, TensorSource


def linear(inputs: Tensor, targets: Tensor, weight: Tensor) -> tuple[nn.Linear, Samples]:
    model = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.zero_()
    source = TensorSource(inputs.double(), targets)
    return model.eval(), Samples(source, torch.arange(len(inputs)), Identity())


def drawn(seed: int = 0) -> tuple[nn.Linear, Samples, Tensor, Tensor]:
    """A linear model of 4 classes with 7 samples; its inputs and its residuals e_y − p."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (7,), generator=generator)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    model, samples = linear(inputs, targets, weight)
    residuals = F.one_hot(targets, 4) - (inputs @ weight.T).softmax(1)
    return model, samples, inputs, residuals


def test_exact() -> None:
    """Σ_y p_y (δ_yc − p_c)² x_j² = p_c (1 − p_c) x_j²; the bias reads a 1."""
    model, samples, inputs, _ = drawn()
    p = model(inputs).detach().softmax(1)
    found = diagonal_fisher(model, samples, "exact", batch_size=3)
    torch.testing.assert_close(found["weight"], (p * (1 - p)).T @ inputs.square() / 7)
    torch.testing.assert_close(found["bias"], (p * (1 - p)).mean(0))


def test_empirical() -> None:
    """(δ_yc − p_c)² x_j² for the label y."""
    model, samples, inputs, residuals = drawn()
    found = diagonal_fisher(model, samples, "empirical", batch_size=3)
    torch.testing.assert_close(found["weight"], residuals.square().T @ inputs.square() / 7)
    torch.testing.assert_close(found["bias"], residuals.square().mean(0))


def test_weighted() -> None:
    """p_y (δ_yc − p_c)² x_j² for the label y; over all labels these add up to "exact"."""
    model, samples, inputs, residuals = drawn()
    p = model(inputs).detach().softmax(1)[torch.arange(7), samples.targets, None]
    found = diagonal_fisher(model, samples, "weighted", batch_size=3)
    torch.testing.assert_close(found["weight"], (p * residuals.square()).T @ inputs.square() / 7)
    torch.testing.assert_close(found["bias"], (p * residuals.square()).mean(0))
    relabelled = (
        Samples(TensorSource(inputs, torch.full((7,), y)), samples.index, samples.transform)
        for y in range(4)
    )
    terms = [diagonal_fisher(model, part, "weighted")["weight"] for part in relabelled]
    exact = diagonal_fisher(model, samples, "exact")["weight"]
    torch.testing.assert_close(torch.stack(terms).sum(0), exact)


def test_batch() -> None:
    """Three batches of 3, 3 and 1 samples, each counted once."""
    model, samples, inputs, residuals = drawn()
    found = diagonal_fisher(model, samples, "batch", batch_size=3)
    parts = list(zip(residuals.split(3), inputs.split(3), strict=True))
    weight = sum((r.T @ x / len(x)).square() for r, x in parts)
    assert isinstance(weight, Tensor)
    torch.testing.assert_close(found["weight"], weight / 3)


@pytest.mark.parametrize(
    ("kind", "weight", "bias"),
    [
        ("exact", 0.5, 0.25),
        ("empirical", 0.5, 0.25),
        ("weighted", 0.25, 0.125),
        ("batch", 0.0, 0.25),
    ],
)
def test_by_hand(kind: Fisher, weight: float, bias: float) -> None:
    """Two classes with p = ½ everywhere, x = 1 and −1 with one label, then x = √3 and −√3.

    Each sample has the gradient ±x/2, squared x²/4: (1 + 1 + 3 + 3)/4/4 = ½; weighted by p, half
    of that. In batches of two the gradients cancel.
    """
    inputs = torch.tensor([1, -1, 3**0.5, -(3**0.5)])[:, None]
    model, samples = linear(inputs, torch.tensor([0, 0, 1, 1]), torch.zeros(2, 1))
    found = diagonal_fisher(model, samples, kind, batch_size=2)
    torch.testing.assert_close(found["weight"], torch.full((2, 1), weight, dtype=torch.float64))
    biases = torch.full((2,), bias, dtype=torch.float64)  # labels agree within a batch
    torch.testing.assert_close(found["bias"], biases)


def test_where_labels_follow_the_model_empirical_comes_to_exact() -> None:
    """x = 1 throughout, p = (¾, ¼), and labels in just these shares."""
    weight = torch.tensor([[3.0], [1.0]]).log()
    model, samples = linear(torch.ones(8, 1), torch.tensor([0] * 6 + [1] * 2), weight)
    exact = diagonal_fisher(model, samples, "exact")["weight"]
    torch.testing.assert_close(diagonal_fisher(model, samples, "empirical")["weight"], exact)
    torch.testing.assert_close(exact, torch.full((2, 1), 3 / 16, dtype=torch.float64))


def test_sure_answers_make_no_weight_important() -> None:
    weight = torch.tensor([[1e3], [-1e3]])
    model, samples = linear(torch.ones(4, 1), torch.ones(4, dtype=torch.int64), weight)
    assert not diagonal_fisher(model, samples, "exact")["weight"].any()
    wrong = diagonal_fisher(model, samples, "empirical")["weight"]  # every label is the other one
    torch.testing.assert_close(wrong, torch.ones(2, 1, dtype=torch.float64))


def test_of_answers() -> None:
    """Squares of the mean gradient of each batch, for the largest p as the label."""
    model, samples, inputs, _ = drawn()
    order = torch.tensor([6, 2, 0, 5, 1])
    p = (inputs[order] @ model.weight.T.detach()).softmax(1)
    residuals = F.one_hot(p.argmax(1), 4) - p
    batches = zip(residuals.split(2), inputs[order].split(2), strict=True)
    slopes = [(r.T @ x) / len(x) for r, x in batches]
    weight, bias = fisher_of_answers(model, [model.weight, model.bias], samples, order, 2)
    torch.testing.assert_close(weight, torch.stack(slopes).square().mean(0))
    means = torch.stack([r.mean(0) for r in residuals.split(2)])
    torch.testing.assert_close(bias, means.square().mean(0))
    assert not weight.requires_grad
