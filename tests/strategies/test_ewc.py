"""EWC against its equation on a linear model, its limits, and its two forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import strategies.ewc
from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.nn.fisher import diagonal_fisher
from clbench.protocol import run
from clbench.samples import Samples
from clbench.testing import ToyScenario
from strategies.ewc import EWC
from strategies.finetune import Finetune

Make = Callable[..., Any]
Form = Literal["separate", "online"]
FORMS = pytest.mark.parametrize("form", ["separate", "online"])


@pytest.fixture
def linear() -> nn.Module:
    """Softmax regression for the toy scenario."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 6))


def everything(samples: Samples) -> Tensor:
    return samples.take(torch.arange(len(samples))).inputs.flatten(1)


def information(strategy: EWC, samples: Samples) -> list[Tensor]:
    """p (1 − p) x², in closed form: the exact Fisher information of softmax regression."""
    with torch.no_grad():
        x = everything(samples)
        p = strategy.model(x).softmax(1)
    variance = p * (1 - p)
    return [variance.T @ x.square() / len(x), variance.mean(0)]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def move(model: nn.Module, seed: int = 0) -> None:
    """Takes the weights elsewhere, so that there is something to penalise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


def pulls(one: Any, strategy: EWC) -> tuple[Tensor, list[Tensor]]:
    """What the penalty adds to the loss of a batch, and to its gradients."""
    batch, parameters = one.batch(1, 0, 6), list(strategy.model.parameters())
    whole = strategy.loss(batch)
    plain = strategy.context.objective.loss(strategy.forward(batch.inputs), batch.targets)
    parts = (torch.autograd.grad(value, parameters) for value in (whole, plain))
    return (whole - plain).detach(), [a - b for a, b in zip(*parts, strict=True)]


@FORMS
@pytest.mark.parametrize("fisher", ["exact", "empirical", "batch"])
def test_without_a_weight_it_is_fine_tuning_bit_for_bit(
    same_weights: Callable[..., bool], form: Form, fisher: Any
) -> None:
    plain, none = Finetune(), EWC(ewc_lambda=0, form=form, fisher=fisher)
    some = EWC(ewc_lambda=5, form=form, fisher=fisher)
    results = [run(ToyScenario(), s, Conditions(threads=1)) for s in (plain, none, some)]
    assert results[0].accuracy_matrix == results[1].accuracy_matrix
    assert same_weights(plain.model, none.model)
    assert not same_weights(plain.model, some.model)


@FORMS
def test_the_first_experience_is_fine_tuning(
    bench: Make, same_weights: Callable[..., bool], form: Form
) -> None:
    one = bench()
    learned = one.learned(EWC(ewc_lambda=100, form=form), 0)
    assert same_weights(learned.model, one.learned(Finetune(), 0).model)


@FORMS
def test_after_one_experience(bench: Make, linear: nn.Module, form: Form) -> None:
    """½ λ Σ F (θ − θ*)², and λ F (θ − θ*), whatever the form."""
    one = bench(linear)
    ewc = one.learned(EWC(ewc_lambda=7, form=form), 0)
    start = weights(ewc.model)
    fisher = information(ewc, one.stream.experiences[0].train)
    move(ewc.model)
    steps = [p - s for p, s in zip(weights(ewc.model), start, strict=True)]
    value, gradient = pulls(one, ewc)
    expected = 3.5 * sum((f * d.square()).sum() for f, d in zip(fisher, steps, strict=True))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for found, f, d in zip(gradient, fisher, steps, strict=True):
        torch.testing.assert_close(found, 7 * f * d, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "gamma"), [("separate", 1), ("online", 1), ("online", 0.25)])
def test_after_two_experiences(bench: Make, linear: nn.Module, form: Form, gamma: float) -> None:
    """Separate: a term each. Online: gamma F₁ + F₂ about the latest weights."""
    one = bench(linear)
    ewc = one.prepare(EWC(ewc_lambda=3, form=form, gamma=gamma, lr=0.01))
    fishers, anchors = [], []
    for index in (0, 1):
        one.teach(ewc, index)
        fishers.append(information(ewc, one.stream.experiences[index].train))
        anchors.append(weights(ewc.model))
    move(ewc.model)
    here = weights(ewc.model)
    if form == "separate":
        terms = list(zip(fishers, anchors, strict=True))
    else:
        terms = [([gamma * f for f in fishers[0]], anchors[1]), (fishers[1], anchors[1])]
    value, gradient = pulls(one, ewc)
    expected = sum(
        1.5 * (f * (p - a).square()).sum()
        for fisher, anchor in terms
        for f, p, a in zip(fisher, here, anchor, strict=True)
    )
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for i, found in enumerate(gradient):
        pull = sum(3 * fisher[i] * (here[i] - anchor[i]) for fisher, anchor in terms)
        torch.testing.assert_close(found, pull, rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow(bench: Make) -> None:
    one = bench()
    sizes = []
    for count in (1, 3):
        ewc = one.learned(EWC(), *range(count))
        state = ewc.anchor.state_dict()
        sizes.append(sum(t.numel() for name in ("scales", "targets") for t in state[name]))
    assert sizes[0] == sizes[1] == 2 * sum(p.numel() for p in ewc.model.parameters())


@FORMS
def test_important_weights_stay_closer(bench: Make, form: Form) -> None:
    """Σ F (θ − θ*)², what EWC holds down, is smaller than fine-tuning leaves it."""
    one = bench()
    distance = {}
    for strategy in (Finetune(), EWC(ewc_lambda=10, form=form), EWC(ewc_lambda=50, form=form)):
        learned = one.learned(strategy, 0)
        fisher = diagonal_fisher(learned.model, one.stream.experiences[0].train)
        start = weights(learned.model)
        one.teach(learned, 1)
        distance[getattr(strategy, "ewc_lambda", 0)] = sum(
            float((f * (p - s).square()).sum())
            for f, p, s in zip(fisher.values(), weights(learned.model), start, strict=True)
        )
    assert distance[50] < distance[10] < distance[0]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def spy(model: nn.Module, samples: Samples, kind: Any, **options: Any) -> Any:
        calls.append({"kind": kind, **options})
        return diagonal_fisher(model, samples, kind, **options)

    monkeypatch.setattr(strategies.ewc, "diagonal_fisher", spy)
    return calls


def test_the_estimate_is_the_one_asked_for(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    one = bench(batch_size=20)
    one.learned(EWC(fisher="batch"), 0)
    one.learned(EWC(fisher="empirical", fisher_samples=13), 0)
    assert [call["kind"] for call in calls] == ["batch", "empirical"]
    assert calls[0]["batch_size"] == 20
    whole, some = (call["order"].tolist() for call in calls)
    assert sorted(whole) == list(range(80))
    assert whole != sorted(whole)
    assert len(set(some)) == 13


def test_a_frozen_part_is_held_when_it_thaws(bench: Make) -> None:
    one = bench()
    ewc = one.prepare(EWC(ewc_lambda=10))
    first = next(ewc.model.parameters())
    first.requires_grad_(False)
    one.teach(ewc, 0)
    first.requires_grad_(True)
    assert ewc.anchor.curvature()[0].any()


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(UserError, match=r"gamma=0\.5 has no meaning with form=separate"):
        EWC(gamma=0.5)
    with pytest.raises(UserError, match="ewc_lambda=-1"):
        EWC(ewc_lambda=-1)
    with pytest.raises(UserError, match=r"gamma=1\.5"):
        EWC(gamma=1.5, form="online")
