"""LwF against numbers by hand and its limits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.protocol import run
from clbench.testing import ToyScenario
from strategies.finetune import Finetune
from strategies.lwf import LwF

Make = Callable[..., Any]


def at_second(one: Any, strategy: LwF) -> LwF:
    """Has learned one experience, and is about to take the first step of the next."""
    strategy = one.learned(strategy, 0)
    strategy.before(one.stream.experiences[1])
    return strategy


@pytest.mark.parametrize(("scale_t2", "factor"), [(False, 1), (True, 4)])
def test_distillation_by_hand(bench: Make, scale_t2: bool, factor: int) -> None:
    """T = 2: outputs (2 ln 3, 0) are (¾, ¼), answers (½, ½).

    KL = ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4/3). The second sample agrees: 0. Four other outputs
    play no part.
    """
    lwf = at_second(bench(), LwF(scale_t2=scale_t2))
    outputs = torch.tensor([[2 * math.log(3), 0, 5, -7, 1, 2], [1, 3, 0, 0, 9, 0]])
    answers = torch.tensor([[1.0, 1, 0, 0, 8, 0], [0, 2, 4, 0, 0, 0]])
    expected = factor * math.log(4 / 3) / 4
    assert lwf.distillation(outputs, answers).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_its_gradient_is_that_of_the_paper_s_cross_entropy(bench: Make, temperature: float) -> None:
    """−Σ y' log ŷ' with y' = y^(1/T) / Σ y^(1/T), as the paper writes the temperature."""
    lwf = at_second(bench(), LwF(temperature=temperature))
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 6, generator=generator, requires_grad=True)
    answers = torch.randn(5, 6, generator=generator)

    def softened(logits: torch.Tensor) -> torch.Tensor:
        powers = logits[:, :2].softmax(1) ** (1 / temperature)
        return powers / powers.sum(1, keepdim=True)

    paper = -(softened(answers) * softened(outputs).log()).sum(1).mean()
    (expected,) = torch.autograd.grad(paper, outputs)
    (found,) = torch.autograd.grad(lwf.distillation(outputs, answers), outputs)
    torch.testing.assert_close(found, expected)
    assert found.any()


@pytest.mark.parametrize("over", ["new", "all"])
def test_the_loss_is_the_sum(bench: Make, normalised: nn.Module, over: Any) -> None:
    one = bench(normalised)
    lwf = at_second(one, LwF(lwf_lambda=0.7, cross_entropy_over=over))
    with torch.no_grad():  # away from the teacher
        for p in lwf.model.parameters():
            p.mul_(1.3)
    batch, twin = one.batch(1, 0, 9), copy.deepcopy(lwf.model)
    outputs, answers = twin(batch.inputs), lwf.teacher(batch.inputs)
    if over == "new":
        cross = F.cross_entropy(outputs[:, 2:4], batch.targets - 2)
    else:
        cross = F.cross_entropy(outputs, batch.targets)
    old, new = (o[:, :2].div(2).softmax(1) for o in (answers, outputs))
    kl = (old * (old / new).log()).sum(1).mean()
    torch.testing.assert_close(lwf.loss(batch), cross + 0.7 * kl)
    assert kl > 1e-3


def test_the_first_experience_asks_no_teacher(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    one = bench()
    lwf = one.prepare(LwF(lwf_lambda=100, cross_entropy_over="all"))
    asked: list[nn.Module] = []
    lwf.teacher.register_forward_pre_hook(lambda teacher, _: asked.append(teacher))
    one.teach(lwf, 0)
    assert not asked
    assert same_weights(lwf.model, one.learned(Finetune(), 0).model)
    assert lwf.known == [0, 1]
    one.teach(lwf, 1)
    assert asked


def test_over_new_classes_old_and_coming_outputs_are_left_alone(bench: Make) -> None:
    one = bench()
    lwf = at_second(one, LwF(lwf_lambda=0))
    head = list(lwf.model.parameters())[-1]
    (gradient,) = torch.autograd.grad(lwf.loss(one.batch(1, 0, 9)), head)
    assert gradient.ne(0).tolist() == [False, False, True, True, False, False]


def test_the_teacher_is_the_model_as_it_was(
    bench: Make, normalised: nn.Module, same_weights: Callable[..., bool]
) -> None:
    """Also its batch statistics; it learns nothing while the model does."""
    one = bench(normalised)
    lwf = one.learned(LwF(), 0)
    assert same_weights(lwf.teacher, lwf.model)
    before = copy.deepcopy(lwf.teacher)
    second = one.stream.experiences[1]
    lwf.before(second)
    lwf.fit(second.train)
    assert same_weights(lwf.teacher, before)
    assert not same_weights(lwf.model, before)
    assert not lwf.teacher.training
    assert not any(p.requires_grad for p in lwf.teacher.parameters())
    lwf.after(second)
    assert same_weights(lwf.teacher, lwf.model)
    assert lwf.known == [0, 1, 2, 3]


def test_a_larger_weight_keeps_old_answers_to_new_samples(bench: Make) -> None:
    one = bench()
    new = one.batch(1, 0, 80)
    divergences = []
    for weight in (0, 1, 10):
        lwf = one.learned(LwF(lwf_lambda=weight, lr=0.03), 0)
        teacher = copy.deepcopy(lwf.teacher)
        one.teach(lwf, 1)
        lwf._old = torch.tensor([0, 1])
        divergences.append(lwf.distillation(lwf.predict(new), teacher(new.inputs)).item())
    assert divergences[0] > divergences[1] > divergences[2]


def test_without_a_weight_it_is_fine_tuning_bit_for_bit(
    same_weights: Callable[..., bool],
) -> None:
    plain = Finetune()
    none = LwF(lwf_lambda=0, cross_entropy_over="all")
    some = LwF(lwf_lambda=1, cross_entropy_over="all")
    results = [run(ToyScenario(), s, Conditions(threads=1)) for s in (plain, none, some)]
    assert results[0].accuracy_matrix == results[1].accuracy_matrix
    assert same_weights(plain.model, none.model)
    assert not same_weights(plain.model, some.model)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(UserError, match="temperature=0"):
        LwF(temperature=0)
    with pytest.raises(UserError, match="lwf_lambda=-1"):
        LwF(lwf_lambda=-1)
