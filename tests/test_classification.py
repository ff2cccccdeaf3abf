"""Scores worked out by hand, and streams that are what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from clbench.classification import (
    Classification,
    channel_statistics,
    class_order,
    of_classes,
    relabelled,
)
from clbench.errors import Diverged, UserError
from clbench.nn.backbones import MLP
from clbench.nn.transforms import Identity
from clbench.samples import Batch, MappedSource, Samples, Source, TensorSource
from clbench.testing import ToyScenario, check_scenario
from clbench.types import Experience, Split


def selections(*labels: Sequence[int]) -> list[Samples]:
    """One source; sample i of it has the input i."""
    flat = [label for part in labels for label in part]
    source = TensorSource(torch.arange(len(flat)).view(-1, 1), torch.tensor(flat))
    bounds = [0, *torch.tensor([len(part) for part in labels]).cumsum(0).tolist()]
    return [Samples(source, torch.arange(a, b), Identity()) for a, b in pairwise(bounds)]


def experiences(*classes: tuple[int, ...]) -> list[Experience]:
    return [Experience(i, str(i), None, c) for i, c in enumerate(classes)]


def answers(outputs: Sequence[Sequence[float]]) -> Callable[[Batch], Tensor]:
    """Outputs by the input, whatever the batch."""
    table = torch.tensor(outputs)
    return lambda batch: table[batch.inputs.flatten()]


#: Four classes in two experiences; one row of outputs for each of five test samples.
OUTPUTS = [
    [3.0, 2.0, 9.0, 0.0],  # of class 0: wrong among all, right among its own
    [1.0, 2.0, 0.0, 9.0],  # of class 1: wrong among all, right among its own
    [5.0, 2.0, 1.0, 0.0],  # of class 0: right, right
    [9.0, 0.0, 1.0, 2.0],  # of class 2: wrong, wrong
    [0.0, 0.0, 1.0, 2.0],  # of class 3: right, right
]
TESTS = ([0, 1, 0], [2, 3])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_scores_by_hand(batch_size: int) -> None:
    scores = Classification(task_aware=True).score(
        answers(OUTPUTS), selections(*TESTS), experiences((0, 1), (2, 3)), batch_size
    )
    assert scores["accuracy"] == pytest.approx([1 / 3, 1 / 2])
    assert scores["task_aware_accuracy"] == pytest.approx([1, 1 / 2])


def test_classes_that_have_not_arrived_do_not_compete() -> None:
    (first, _) = selections(*TESTS)
    scores = Classification(task_aware=True).score(
        answers(OUTPUTS), [first], experiences((0, 1)), 10
    )
    assert scores == {"accuracy": [1.0], "task_aware_accuracy": [1.0]}


def test_experiences_may_have_different_numbers_of_classes() -> None:
    scores = Classification(task_aware=True).score(
        answers(OUTPUTS), selections([0], [1, 2, 3]), experiences((0,), (3, 1, 2)), 3
    )
    assert scores["accuracy"] == pytest.approx([0, 0])
    assert scores["task_aware_accuracy"] == pytest.approx([1, 1 / 3])


def test_without_classes_of_their_own_there_is_one_score() -> None:
    scores = Classification(task_aware=False).score(
        answers(OUTPUTS), selections(*TESTS), experiences((0, 1, 2, 3), (0, 1, 2, 3)), 10
    )
    assert list(scores) == ["accuracy"]


def test_tests_may_lie_in_several_sources() -> None:
    a, b = selections([0, 1, 0], [2, 3])
    source = TensorSource(torch.tensor([[3], [4]]), torch.tensor([2, 3]))
    elsewhere = Samples(source, torch.arange(2), Identity())
    kinds = experiences((0, 1), (2, 3))
    for tests in ([a, b], [a, elsewhere]):
        scores = Classification(task_aware=True).score(answers(OUTPUTS), tests, kinds, 2)
        assert scores["accuracy"] == pytest.approx([1 / 3, 1 / 2])
    # and in another order
    turned = Classification(task_aware=True).score(answers(OUTPUTS), [elsewhere, a], kinds[::-1], 2)
    assert turned["accuracy"] == pytest.approx([1 / 2, 1 / 3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_output_that_is_no_number_is_said(bad: float) -> None:
    broken = [*OUTPUTS[:4], [0.0, bad, 1.0, 2.0]]
    with pytest.raises(Diverged, match="an output of the model is not finite"):
        Classification(task_aware=True).score(
            answers(broken), selections(*TESTS), experiences((0, 1), (2, 3)), 2
        )


def test_the_loss_is_the_cross_entropy() -> None:
    outputs, targets = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([0, 1])
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert float(Classification(True).loss(outputs, targets)) == pytest.approx(expected)


# Streams.


def test_the_toy_scenario_conforms() -> None:
    check_scenario(ToyScenario())


@pytest.mark.parametrize("n_experiences", [1, 2, 3, 6])
def test_classes_arrive_in_order_and_once(n_experiences: int) -> None:
    stream = ToyScenario(n_experiences=n_experiences).stream(Split.EVALUATE, 0)
    arrived = [c for e in stream.experiences for c in e.classes]
    assert arrived == list(range(6))
    assert stream.n_outputs == 6
    for experience, test in zip(stream.experiences, stream.tests, strict=True):
        assert experience.train is not None
        assert set(experience.train.targets.tolist()) == set(experience.classes)
        assert set(test.targets.tolist()) == set(experience.classes)
        assert len(experience.classes) == 6 // n_experiences


def test_the_seed_names_the_classes_anew_and_keeps_their_samples() -> None:
    """Whatever the seed, a class's name stands for the same images."""
    scenario = ToyScenario(per_class=4)

    def by_name(seed: int) -> dict[str, Tensor]:
        stream = scenario.stream(Split.EVALUATE, seed)
        source = stream.tests[0].source
        return {
            name: source.gather((source.targets == label).nonzero().flatten())
            for label, name in enumerate(stream.facts["class_names"])
        }

    one, two = by_name(0), by_name(1)
    assert list(one) != list(two)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_experiences_must_divide_the_classes() -> None:
    with pytest.raises(UserError, match=r"n_experiences=4 does not divide.*one of 1, 2, 3, 6"):
        ToyScenario(n_experiences=4).stream(Split.EVALUATE, 0)


def test_the_class_order_is_a_permutation_that_follows_from_the_seed() -> None:
    state = torch.get_rng_state()
    orders = [class_order(10, seed).tolist() for seed in range(5)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert class_order(10, 3).tolist() == orders[3]


def test_relabelling_keeps_samples_and_changes_labels() -> None:
    inputs, targets = torch.arange(4).view(4, 1), torch.tensor([0, 1, 2, 1])
    rank = torch.tensor([2, 0, 1])
    sources: list[Source] = [
        TensorSource(inputs, targets),
        MappedSource(inputs.numpy(), targets),
        MappedSource(inputs.flip(0).numpy(), targets, torch.tensor([3, 2, 1, 0])),
    ]
    for source in sources:
        found = relabelled(source, rank)
        assert found.targets.tolist() == [2, 0, 1, 0]
        assert torch.equal(found.gather(torch.arange(4)), inputs)
        assert source.targets.tolist() == [0, 1, 2, 1]


def test_samples_of_some_classes_in_order() -> None:
    source = TensorSource(torch.zeros(5, 1), torch.tensor([2, 0, 1, 2, 0]))
    assert of_classes(source, [0, 2]).tolist() == [0, 1, 3, 4]
    assert of_classes(source, []).tolist() == []


def test_statistics_of_channels() -> None:
    images = torch.tensor([[0, 255], [51, 51]], dtype=torch.uint8).view(1, 2, 1, 2)
    mean, std = channel_statistics(images.expand(3, -1, -1, -1))
    assert mean == pytest.approx([0.5, 0.2])
    # six values 0 and 1: deviations of 0.5, summed 1.5, divided by 6 - 1
    assert std[0] == pytest.approx(0.3**0.5)
    assert std[1] == pytest.approx(1e-3), "a constant channel is not divided by zero"


def test_the_normalisation_is_the_backbone_s_if_it_has_one() -> None:
    toy = ToyScenario()
    trained = replace(toy, backbone=MLP(hidden=(3,), mean=(0.1,), std=(0.9,)))
    assert toy.transform(toy.images(Split.TUNE)).mean == (0.5,)
    transform = trained.transform(trained.images(Split.TUNE))
    assert (transform.mean, transform.std) == ((0.1,), (0.9,))
