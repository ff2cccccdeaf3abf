"""iCaRL: herding, targets, exemplar sets and the nearest mean, each by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.testing import ToyScenario
from strategies.icarl import ICaRL, herd

Make = Callable[..., Any]


def herd_by_brute_force(features: Tensor, count: int) -> list[int]:
    """Algorithm 4 as it is printed, over the samples that are not yet taken."""
    mean = features.mean(0)
    chosen: list[int] = []
    for k in range(1, count + 1):
        distances = {}
        for i in range(len(features)):
            if i not in chosen:
                total = features[i] + sum((features[j] for j in chosen), torch.zeros_like(mean))
                distances[i] = float((mean - total / k).norm())
        chosen.append(min(distances, key=lambda i: distances[i]))
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", [True, False])
def test_herding_is_algorithm_4(seed: int, unit: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(14, 5, generator=generator, dtype=torch.float64) + 0.5
    if unit:
        features = F.normalize(features)
    assert herd(features, 9).tolist() == herd_by_brute_force(features, 9)


def test_herding_takes_each_sample_once_and_no_more_than_there_are() -> None:
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert sorted(herd(features, 10).tolist()) == [0, 1, 2]
    assert herd(features, 1).tolist() == [0]


def test_the_first_experience_is_learned_from_its_labels(bench: Make) -> None:
    one = bench()
    icarl = one.prepare(ICaRL())
    icarl.before(one.stream.experiences[0])
    batch = one.batch(0, 0, 8)
    probabilities = icarl.model(batch.inputs).sigmoid()
    expected = torch.zeros(())
    for p, label in zip(probabilities, batch.targets.tolist(), strict=True):
        for c in one.stream.experiences[0].classes:
            expected = expected - (p[c] if c == label else 1 - p[c]).log() / 8
    torch.testing.assert_close(icarl.loss(batch), expected)


def test_old_classes_are_learned_from_the_old_outputs(bench: Make) -> None:
    """For samples of new classes and exemplars alike; classes to come have no loss."""
    one = bench()
    icarl = one.learned(ICaRL(), 0)
    icarl.before(one.stream.experiences[1])
    old_model = copy.deepcopy(icarl.model)
    with torch.no_grad():
        for parameter in icarl.model.parameters():
            parameter.mul_(0.9)
    fresh, stored = one.batch(1, 0, 5), icarl.stored().take(torch.arange(5))
    old, new = (one.stream.experiences[i].classes for i in (0, 1))
    for batch in (fresh, stored):
        p, q = icarl.model(batch.inputs).sigmoid(), old_model(batch.inputs).sigmoid()
        expected = torch.zeros(())
        for i, label in enumerate(batch.targets.tolist()):
            for c in (*old, *new):
                t = q[i, c].item() if c in old else float(c == label)
                expected = expected - (t * p[i, c].log() + (1 - t) * (1 - p[i, c]).log()) / 5
        torch.testing.assert_close(icarl.loss(batch), expected)
    icarl.model.zero_grad()
    icarl.loss(fresh).backward()
    to_come = list(one.stream.experiences[2].classes)
    assert not icarl.model.head.weight.grad[to_come].any()
    assert icarl.model.head.weight.grad[[*old, *new]].any(1).all()


def test_exemplar_sets_are_equal_shares_cut_from_the_end(bench: Make) -> None:
    one = bench(memory_size=31)
    icarl = one.prepare(ICaRL())
    before: dict[int, Tensor] = {}
    for index, share in enumerate((31 // 2, 31 // 4, 31 // 6)):
        one.teach(icarl, index)
        assert {len(raw) for raw in icarl.exemplars.values()} == {share}
        assert icarl.memory_samples == share * 2 * (index + 1)
        for label, raw in before.items():
            assert torch.equal(icarl.exemplars[label], raw[:share])
        before = dict(icarl.exemplars)


def test_exemplars_are_herded_by_features_of_the_trained_model(bench: Make) -> None:
    one = bench()
    icarl = one.learned(ICaRL(), 0)
    train = one.stream.experiences[0].train
    everything = train.take(torch.arange(len(train)))
    with torch.no_grad():
        features = F.normalize(icarl.model.features(everything.inputs))
    for label, raw in icarl.exemplars.items():
        mine = (everything.targets == label).nonzero().flatten()
        order = herd_by_brute_force(features[mine].double(), 15)
        assert torch.equal(raw, everything.raw[mine[order]])


def test_training_is_on_new_samples_and_all_exemplars(bench: Make) -> None:
    one = bench(memory_size=30, epochs=1)
    icarl = one.learned(ICaRL(), 0)
    first = sum(one.steps)
    one.teach(icarl, 1)
    assert first == 80
    assert sum(one.steps) - first == 80 + 30


def test_the_answer_is_the_nearest_mean_of_exemplars(bench: Make) -> None:
    one = bench()
    icarl = one.learned(ICaRL(), 0, 1)
    outputs = one.outputs(icarl)
    tests = [t.take(torch.arange(len(t))) for t in one.stream.tests]
    with torch.no_grad():
        features = F.normalize(icarl.model.features(torch.cat([t.inputs for t in tests])))
        for label, raw in icarl.exemplars.items():
            stored = icarl.model.features(icarl.context.transform.test(raw))
            mean = F.normalize(F.normalize(stored).mean(0), dim=0)
            expected = -((features - mean) ** 2).sum(1)
            torch.testing.assert_close(outputs[:, label], expected, rtol=1e-4, atol=1e-5)
    to_come = list(one.stream.experiences[2].classes)
    assert outputs.isfinite().all()
    assert outputs[:, to_come].max() < outputs[:, list(icarl.exemplars)].min()


def test_answers_before_the_first_experience_are_finite(bench: Make) -> None:
    one = bench()
    assert one.outputs(one.prepare(ICaRL())).isfinite().all()


def test_too_small_a_memory_is_refused(bench: Make) -> None:
    with pytest.raises(UserError, match="memory_size"):
        ICaRL().check(ToyScenario(memory_size=0))
    with pytest.raises(UserError, match="6 classes"):
        bench(memory_size=5).prepare(ICaRL())
    assert bench(memory_size=6, epochs=1).learned(ICaRL()).memory_samples == 6
