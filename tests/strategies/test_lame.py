"""LAME against loops, a fixed point and affinities worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from adapting import Features, adapting, answers_without_a_trace, unlabelled
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.heads import Classifier
from strategies.lame import LAME, Affinity, affinities, assignments

KINDS: tuple[Affinity, ...] = ("rbf", "knn", "linear")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directions(n: int, d: int) -> Tensor:
    return nn.functional.normalize(random(n, d))


def priors(n: int, k: int) -> Tensor:
    return (2 * random(n, k, seed=1).double()).softmax(1)


def classifier() -> Classifier:
    """Features of two numbers; the logits of two classes are ±10 times the second."""
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.tensor([[0.0, 10.0], [0.0, -10.0]])
    return Classifier(Features(nn.Identity(), 2), head)


def test_without_affinity_the_answer_is_the_model_s() -> None:
    p = priors(7, 4)
    logits = assignments(p.log(), torch.zeros(7, 7).double(), 100, 1e-8)
    torch.testing.assert_close(logits.softmax(1), p)


def test_one_iteration_by_hand() -> None:
    """Two samples, each the other's only neighbour: z = softmax(log p + p of the other)."""
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    z = assignments(p.log(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1, 0.0).softmax(1)
    first = 0.8 * math.exp(0.4), 0.2 * math.exp(0.6)
    second = 0.4 * math.exp(0.8), 0.6 * math.exp(0.2)
    assert z[0, 0].item() == pytest.approx(first[0] / sum(first))
    assert z[1, 0].item() == pytest.approx(second[0] / sum(second))


def loop(p: Tensor, kernel: Tensor, max_iterations: int, tolerance: float) -> tuple[Tensor, int]:
    """The paper's algorithm with a stop after every iteration; the number done, too."""
    unary = -p.log()
    z, before = p, math.inf
    for i in range(max_iterations):
        pulls = kernel @ z
        z = (pulls - unary).softmax(1)
        energy = (unary * z - pulls * z + z * z.log()).sum().item()
        if i > 1 and abs(energy - before) <= tolerance * abs(before):
            break
        before = energy
    return z, i + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
def test_it_stops_where_a_loop_does(kind: Affinity, tolerance: float) -> None:
    p, kernel = priors(40, 5), affinities(directions(40, 3).double(), kind, 5)
    expected, done = loop(p, kernel, 100, tolerance)
    assert 2 < done < 100
    z = assignments(p.log(), kernel, 100, tolerance).softmax(1)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-12)
    # An iteration more would have been another answer.
    assert not torch.allclose(z, loop(p, kernel, done + 1, 0.0)[0], rtol=1e-9, atol=1e-12)


def test_the_end_is_a_fixed_point_of_less_and_less_energy() -> None:
    """With a positive semi-definite affinity the energy never grows (theorem of the paper)."""
    p, kernel = priors(30, 4), affinities(directions(30, 3).double(), "rbf", 5)

    def energy(z: Tensor) -> float:
        return float((z * (z / p).log()).sum() - (z * (kernel @ z)).sum() / 2)

    steps = [assignments(p.log(), kernel, n, 0.0).softmax(1) for n in range(1, 30)]
    energies = [energy(p), *map(energy, steps)]
    assert all(b <= a + 1e-12 for a, b in pairwise(energies))
    assert energies[-1] < energies[0] - 1
    end = assignments(p.log(), kernel, 1000, 1e-16).softmax(1)
    torch.testing.assert_close(end, (p.log() + kernel @ end).softmax(1))


def test_affinities_by_hand() -> None:
    """Unit vectors at 0, 60 and 180 degrees: distances 1, √3 and 2."""
    angles = torch.tensor([0.0, math.pi / 3, math.pi])
    f = torch.stack((angles.cos(), angles.sin()), 1)
    linear = torch.tensor([[1, 0.5, -1], [0.5, 1, -0.5], [-1, -0.5, 1]])
    torch.testing.assert_close(affinities(f, "linear", 1), linear)
    knn = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 1, 0]])
    assert torch.equal(affinities(f, "knn", 1), knn)
    # The second nearest, a sample itself counted: 1, 1 and √3.
    width = (2 + math.sqrt(3)) / 3
    squares = torch.tensor([[0.0, 1, 4], [1, 0, 3], [4, 3, 0]])
    torch.testing.assert_close(affinities(f, "rbf", 2), (-squares / (2 * width**2)).exp())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_equal_features_and_small_batches_are_no_obstacle(kind: Affinity, n: int) -> None:
    model = classifier()
    strategy = adapting(LAME(affinity=kind), model, 2)
    logits = strategy.adapt(unlabelled(torch.tensor([[1.0, 0.1]]).repeat(n, 1)))
    assert logits.isfinite().all()
    assert (logits.argmax(1) == 0).all()
    if kind == "knn" and n == 1:
        torch.testing.assert_close(logits.softmax(1), model(torch.tensor([[1.0, 0.1]])).softmax(1))


def test_equal_features_are_neighbours_of_each_other_not_of_themselves() -> None:
    kernel = affinities(torch.tensor([[1.0, 0.0]]).repeat(4, 1), "knn", 3)
    assert torch.equal(kernel, 1 - torch.eye(4))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_of_one_class_correct_a_wrong_answer(kind: Affinity) -> None:
    """Nine of about one direction say class 0, the tenth beside them narrowly class 1."""
    heights = torch.cat((torch.linspace(0.02, 0.1, 9), torch.tensor([-0.01])))
    inputs = torch.stack((torch.ones(10), heights), 1)
    model = classifier()
    assert model(inputs).argmax(1).tolist() == [0] * 9 + [1]
    logits = adapting(LAME(affinity=kind), model, 2).adapt(unlabelled(inputs))
    assert logits.argmax(1).tolist() == [0] * 10


def test_a_symmetric_affinity_counts_both_directions() -> None:
    """Of three samples the last has no admirer; symmetric, it pulls the second with 1/2."""
    angles = torch.tensor([0.0, 0.4, 1.0])
    inputs = torch.stack((angles.cos(), angles.sin()), 1)
    model = classifier()
    given = model(inputs).softmax(1)
    answers = [
        adapting(LAME(affinity="knn", neighbours=1, symmetric=s, max_iterations=1), model, 2)
        .adapt(unlabelled(inputs))
        .softmax(1)
        for s in (False, True)
    ]
    one_way = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 1, 0]])
    for answer, kernel in zip(answers, (one_way, (one_way + one_way.T) / 2), strict=True):
        torch.testing.assert_close(answer, loop(given + 1e-10, kernel, 1, 0.0)[0])


def test_predicts_what_it_answers_and_remembers_nothing() -> None:
    strategy = adapting(LAME(), classifier(), 2)
    batch = unlabelled(random(12, 2))
    answer = strategy.adapt(batch)
    assert torch.equal(answers_without_a_trace(strategy, batch), answer)
    assert torch.equal(strategy.adapt(batch), answer)
    assert not answer.requires_grad


def test_a_model_without_features_is_refused() -> None:
    with pytest.raises(UserError, match="lame needs a model with features and a head"):
        adapting(LAME(), nn.Linear(2, 2), 2)
