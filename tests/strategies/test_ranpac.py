"""RanPAC against the joint closed form, whatever the order of the experiences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.testing import ToyScenario, ToyViT
from strategies.ranpac import RIDGES, RanPAC

Make = Callable[..., Any]


def everything(one: Any, ranpac: RanPAC) -> tuple[Tensor, Tensor]:
    """h of all training samples of the stream, in double precision, and their classes."""
    parts = [e.train.take(torch.arange(len(e.train))) for e in one.stream.experiences]
    with torch.no_grad():
        features = ranpac.tuned_features(torch.cat([p.inputs for p in parts]))
        return ranpac.expand(features).double(), torch.cat([p.targets for p in parts])


def closed_form(one: Any, ranpac: RanPAC, ridge: float) -> Tensor:
    """Outputs of regression on all samples at once."""
    inputs, targets = everything(one, ranpac)
    tests = torch.cat([t.take(torch.arange(len(t))).inputs for t in one.stream.tests])
    with torch.no_grad():
        queries = ranpac.expand(ranpac.tuned_features(tests)).double()
    gram = inputs.T @ inputs + ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(gram, inputs.T @ F.one_hot(targets, 6).double())
    return queries @ weights


@pytest.mark.parametrize("projection", [0, 100, 500])
@pytest.mark.parametrize("ridge", [0.1, 100.0])
def test_every_order_of_experiences_gives_the_joint_closed_form(
    bench: Make, projection: int, ridge: float
) -> None:
    one = bench()
    for order in permutations(range(3)):
        ranpac = one.learned(RanPAC(tuning="none", projection=projection, ridge=ridge), *order)
        expected = closed_form(one, ranpac, ridge)
        torch.testing.assert_close(one.outputs(ranpac).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tuning", ["adapter", "ssf", "vpt_shallow", "vpt_deep", "full"])
def test_after_the_first_experience_the_order_makes_no_difference(bench: Make, tuning: Any) -> None:
    one = bench(backbone=ToyViT())
    strategy = RanPAC(tuning=tuning, ridge=10.0, dropout=0)
    ranpac, other = one.learned(strategy, 0, 1, 2), one.learned(strategy, 0, 2, 1)
    torch.testing.assert_close(one.outputs(ranpac), one.outputs(other), rtol=1e-4, atol=1e-4)
    expected = closed_form(one, ranpac, 10.0)
    torch.testing.assert_close(one.outputs(ranpac).double(), expected, rtol=1e-3, atol=1e-3)
    plain = one.learned(RanPAC(tuning="none", ridge=10.0))
    assert not torch.allclose(one.outputs(plain), one.outputs(ranpac), atol=1e-2)


def test_features_are_projected_at_random_and_rectified(bench: Make) -> None:
    ranpac = bench().prepare(RanPAC(tuning="none"))
    features = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert ranpac._projection is not None
    torch.testing.assert_close(ranpac.expand(features), (features @ ranpac._projection).relu())
    assert ranpac._projection.shape == (32, 417), "32 · 10,000 / 768"
    assert ranpac._projection.mean().item() == pytest.approx(0, abs=0.05)
    assert ranpac._projection.std().item() == pytest.approx(1, abs=0.05)
    again = bench().prepare(RanPAC(tuning="none"))
    assert torch.equal(again._projection, ranpac._projection)


def test_a_huge_ridge_leaves_sums_of_features(bench: Make) -> None:
    """(G + λI)⁻¹ → I / λ: outputs go to hᵀQ / λ."""
    one = bench()
    ranpac = one.learned(RanPAC(tuning="none", ridge=1e12))
    inputs, targets = everything(one, ranpac)
    sums = torch.stack([inputs[targets == c].sum(0) for c in range(6)], 1)
    tests = torch.cat([t.take(torch.arange(len(t))).inputs for t in one.stream.tests])
    with torch.no_grad():
        expected = ranpac.expand(ranpac.tuned_features(tests)).double() @ sums
    torch.testing.assert_close(1e12 * one.outputs(ranpac).double(), expected, rtol=1e-4, atol=1e-3)


def test_the_ridge_is_the_best_on_a_fifth_of_the_experience(bench: Make) -> None:
    """The code's way: a solution for each candidate, mean squared error over all columns."""
    one = bench(noise=120.0)
    ranpac = one.learned(RanPAC(tuning="none", projection=60), 0)
    generator = torch.Generator()
    generator.set_state(ranpac.context.generator("ridge").get_state())
    one.teach(ranpac, 1)
    train = one.stream.experiences[1].train
    whole = train.take(torch.randperm(len(train), generator=generator))
    with torch.no_grad():
        inputs = ranpac.expand(ranpac.tuned_features(whole.inputs)).double()
    answers, count = F.one_hot(whole.targets, 6).double(), 64
    gram, products = inputs[:count].T @ inputs[:count], inputs[:count].T @ answers[:count]
    errors = []
    for ridge in RIDGES:
        weights = torch.linalg.solve(gram + ridge * torch.eye(60), products)
        errors.append(F.mse_loss(inputs[count:] @ weights, answers[count:]))
    best = RIDGES[int(torch.stack(errors).argmin())]
    assert ranpac.chosen == best
    assert RIDGES[0] < best < RIDGES[-1], "or the test would show little"
    expected = one.prepare(RanPAC(tuning="none", projection=60, ridge=best))
    one.teach(expected, 0, 1)
    torch.testing.assert_close(one.outputs(ranpac), one.outputs(expected))


def test_the_choice_draws_anew_in_each_experience(bench: Make) -> None:
    one = bench(noise=120.0)
    chosen = []
    ranpac = one.prepare(RanPAC(tuning="none", projection=60))
    states = [ranpac.context.generator("ridge").get_state()]
    for index in range(3):
        one.teach(ranpac, index)
        chosen.append(ranpac.chosen)
        states.append(ranpac.context.generator("ridge").get_state())
    assert set(chosen) <= set(RIDGES)
    assert all(not torch.equal(a, b) for a, b in pairwise(states))


@pytest.mark.parametrize("count", [1, 2])
def test_an_experience_of_one_sample_or_two(bench: Make, count: int) -> None:
    one = bench()
    part = one.stream.experiences[0]
    few = type(part)(0, part.name, part.train.subset(torch.arange(count)), part.classes)
    ranpac = one.prepare(RanPAC(tuning="none"))
    ranpac.learn(few)
    assert one.outputs(ranpac).isfinite().all()
    assert (ranpac.chosen == 1.0) == (count == 1)


def test_samples_are_seen_once_after_the_tuning(bench: Make) -> None:
    one = bench(backbone=ToyViT())
    one.learned(RanPAC())
    assert sum(one.steps) == 5 * 80 + 80 + 80


def test_classes_that_have_not_come_are_named_last(bench: Make) -> None:
    one = bench()
    ranpac = one.prepare(RanPAC(tuning="none"))
    assert one.outputs(ranpac).isfinite().all()
    one.teach(ranpac, 1)
    outputs = one.outputs(ranpac)
    met = list(one.stream.experiences[1].classes)
    others = [c for c in range(6) if c not in met]
    assert outputs.isfinite().all()
    assert outputs[:, others].max() < outputs[:, met].min()


def test_facts_tell_the_ridge_and_the_bytes(bench: Make) -> None:
    facts = bench().learned(RanPAC(tuning="none", projection=50)).facts()
    assert facts["gram_bytes"] == 8 * 50 * 50
    assert facts["inputs"] == 50
    assert facts["ridge"] in RIDGES


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(UserError, match="ridge=0"):
        RanPAC(ridge=0)
    with pytest.raises(UserError, match="projection=-1"):
        RanPAC(projection=-1)
    with pytest.raises(UserError, match=r"RanPAC with strategy\.tuning=ssf.*MLP"):
        RanPAC(tuning="ssf").check(ToyScenario())
