"""LCA: its coefficient by hand, its average step by step, its sets and their limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.testing import ToyScenario
from strategies.finetune import Finetune
from strategies.lca import LCA, coefficient


def test_the_coefficient_by_hand() -> None:
    """‖θ−θ*‖ = 4, ‖g‖ = 1, ‖g−g'‖ = 6, ‖w−w'‖ = 3: (1+1)·3/(4·6) = 1/4; 1 − 2·2/(4·6) = 5/6."""
    values = [torch.tensor([x]) for x in (4.0, 1.0, 6.0, 3.0)]
    assert coefficient("paper", *values).item() == pytest.approx(1 / 4)
    assert coefficient("code", *values).item() == pytest.approx(5 / 6)


class Scripted(Finetune):
    """Takes the steps and has the gradients that it is told."""

    def setup(self, model: nn.Module, context: Any) -> None:  # noqa: ARG002
        super().setup(nn.Linear(2, 1, bias=False), context)
        self.script: list[tuple[Sequence[float], Sequence[float]]] = []
        nn.init.zeros_(next(self.model.parameters()))

    def update(self, loss: Tensor) -> None:  # noqa: ARG002
        (weight,) = self.model.parameters()
        weight.grad, weight.data = (torch.tensor([x]) for x in self.script.pop(0))


STEPS: list[tuple[Sequence[float], Sequence[float]]] = [
    ((1.0, -2.0), (1.0, 1.0)),
    ((0.0, 2.0), (1.0, 3.0)),
    ((0.5, 0.5), (-1.0, 3.0)),
    ((0.5, 0.5), (0.0, 0.0)),
]


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_average_step_by_step(bench: Callable[..., Any], form: Any) -> None:
    """Against the equations written out for one tensor."""
    toy = bench()
    strategy = toy.prepare(LCA(base=Scripted(), form=form, outside=0.9))
    strategy.before(toy.stream.experiences[1])
    strategy.base.script = list(STEPS)
    average, last, at = torch.zeros(2), None, [torch.zeros(2)]
    for number, (g, w) in enumerate(STEPS):
        gradient, weight = torch.tensor(g), torch.tensor(w)
        if form == "code" and number == 0:
            average = weight
        way = (weight - average).abs().sum().item()
        kept = 0.9
        if last is not None:
            change = (gradient - last).abs().sum().item()
            size = gradient.abs().sum().item()
            if form == "paper":
                moved = (at[-1] - at[-2]).abs().sum().item()
                beta = (size + 1) * moved / (way * change) if change else 2.0
            else:
                beta = 1 - 2 * (1 + size) / (way * change) if change else -1.0
            kept = beta if 0 < beta < 1 else 0.9
        average = kept * average + (1 - kept) * weight
        at.append(weight)
        last = gradient
        strategy.update(torch.zeros(()))
        assert torch.allclose(strategy.average[0], average, atol=1e-6), number
    strategy.after(toy.stream.experiences[1])
    assert torch.allclose(next(strategy.model.parameters()), average, atol=1e-6)
    found = strategy.facts()
    assert found["coefficients"] == 4
    assert 0 < found["coefficients_by_equation"] < 4


def test_the_first_experience_is_its_base_s(
    bench: Callable[..., Any], same_weights: Callable[..., bool]
) -> None:
    toy = bench(per_class=10, epochs=2)
    one, plain = toy.learned(LCA(base=Finetune()), 0), toy.learned(Finetune(), 0)
    assert same_weights(one.model, plain.model)
    toy.teach(one, 1)
    toy.teach(plain, 1)
    assert not same_weights(one.model, plain.model)


def test_where_the_equation_gives_nothing_outside_decides(bench: Callable[..., Any]) -> None:
    """Scripted gradients that never change: 1 keeps everything, 0 is the base."""
    toy = bench()
    for outside, expected in ((1.0, [0.0, 0.0]), (0.0, [2.0, 2.0])):
        strategy = toy.prepare(LCA(base=Scripted(), outside=outside))
        strategy.before(toy.stream.experiences[1])
        strategy.base.script = [((1.0, 1.0), (w, w)) for w in (1.0, 3.0, 2.0)]
        for _ in range(3):
            strategy.update(torch.zeros(()))
        strategy.after(toy.stream.experiences[1])
        (weight,) = strategy.model.parameters()
        assert weight.flatten().tolist() == expected


def accuracies(toy: Any, strategy: LCA) -> list[float]:
    objective = toy.scenario.objective()
    with torch.inference_mode():
        found = objective.score(strategy.predict, toy.stream.tests, toy.stream.experiences, 100)
    return list(found["accuracy"])


def test_other_words_make_another_set_which_forgets_nothing(worded: Callable[..., Any]) -> None:
    toy = worded()
    strategy = toy.learned(LCA(base=Finetune(), expand=True))
    assert strategy.facts()["sets"] == 3
    assert accuracies(toy, strategy) == [1, 1, 1]
    plain = toy.learned(LCA(base=Finetune(), outside=0.0))
    assert min(accuracies(toy, plain)) < 1


def test_each_set_is_the_base_alone_on_its_experience(worded: Callable[..., Any]) -> None:
    toy = worded()
    strategy = toy.learned(LCA(base=Finetune(), expand=True), 0)
    alone = toy.learned(Finetune(), 0)
    for p, q in zip(strategy.sets[0], alone.model.parameters(), strict=True):
        assert torch.equal(p, q)
    toy.teach(strategy, 1)
    for p, q in zip(strategy.sets[0], alone.model.parameters(), strict=True):
        assert torch.equal(p, q), "the first set stays"


def test_the_same_words_go_on_with_their_set(worded: Callable[..., Any]) -> None:
    toy = worded(words=("apple", "plum", "apple"))
    strategy = toy.learned(LCA(base=Finetune(), expand=True), 0, 1)
    kept = [t.clone() for t in strategy.sets[1]]
    toy.teach(strategy, 2)
    assert strategy.facts()["sets"] == 2
    assert strategy.current == 0
    assert strategy.facts()["coefficients"] > 0, "averaged"
    assert all(torch.equal(p, q) for p, q in zip(strategy.sets[1], kept, strict=True))


def test_predicting_with_several_sets_leaves_the_weights(worded: Callable[..., Any]) -> None:
    toy = worded()
    strategy = toy.learned(LCA(base=Finetune(), expand=True))
    before = [p.detach().clone() for p in strategy.model.parameters()]
    accuracies(toy, strategy)
    assert all(torch.equal(p, q) for p, q in zip(strategy.model.parameters(), before, strict=True))


def test_images_have_no_instructions() -> None:
    with pytest.raises(UserError, match=r"Set strategy.expand=false"):
        LCA(base=Finetune(), expand=True).check(ToyScenario())
