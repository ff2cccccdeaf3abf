"""A-GEM against its projection, by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from strategies.agem import AGEM, project
from strategies.finetune import Finetune

Make = Callable[..., Any]


def test_a_gradient_against_the_reference_loses_that_part() -> None:
    """g = (1, 0 | 2), r = (-1, 1 | -1): gᵀr = -3, rᵀr = 3, so g + r."""
    gradient = [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]])]
    reference = [torch.tensor([-1.0, 1.0]), torch.tensor([[-1.0]])]
    project(gradient, reference)
    assert gradient[0].tolist() == [0.0, 1.0]
    assert gradient[1].tolist() == [[1.0]]
    assert sum(float((g * r).sum()) for g, r in zip(gradient, reference, strict=True)) == 0.0


def test_the_parts_of_all_parameters_count_together() -> None:
    """Against the first, along the second, along the whole: nothing changes."""
    gradient = [torch.tensor([1.0]), torch.tensor([5.0])]
    project(gradient, [torch.tensor([-2.0]), torch.tensor([1.0])])
    assert [g.item() for g in gradient] == [1.0, 5.0]


def test_a_gradient_along_or_across_the_reference_stays() -> None:
    for reference in ([3.0, 4.0], [-2.0, 1.0], [0.0, 0.0]):
        gradient = [torch.tensor([1.0, 2.0])]
        project(gradient, [torch.tensor(reference)])
        assert gradient[0].tolist() == [1.0, 2.0], reference


def test_without_a_memory_it_is_fine_tuning(bench: Make, same_weights: Callable[..., bool]) -> None:
    one = bench(memory_size=0)
    agem, finetune = one.learned(AGEM(momentum=0.9)), one.learned(Finetune(momentum=0.9))
    assert same_weights(agem.model, finetune.model)


def test_a_step_is_along_the_projected_gradient(bench: Make) -> None:
    """After an experience, on the next one's classes: the gradients disagree."""
    one = bench(memory_size=30, memory_batch_size=30)
    agem = one.learned(AGEM(lr=0.1), 0)
    agem.begin(steps=1)
    batch, twin = one.batch(1, 0, 10), copy.deepcopy(agem.model)
    parameters = list(twin.parameters())
    g = torch.autograd.grad(F.cross_entropy(twin(batch.inputs), batch.targets), parameters)
    # All thirty stored samples are drawn.
    stored = twin(agem.context.transform.test(agem.memory.raw))
    r = torch.autograd.grad(F.cross_entropy(stored, agem.memory.targets), parameters)
    along = sum((a * b).sum() for a, b in zip(g, r, strict=True))
    square = sum((b * b).sum() for b in r)
    assert along < 0
    agem.update(agem.loss(batch))
    for new, old, a, b in zip(agem.model.parameters(), parameters, g, r, strict=True):
        torch.testing.assert_close(new, old - 0.1 * (a - along / square * b))


def test_where_gradients_agree_the_step_is_that_of_fine_tuning(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    one = bench(memory_size=30)
    agem, finetune = one.prepare(AGEM()), one.prepare(Finetune())
    batch = one.batch(0, 0, 10)
    agem.observe(batch)
    for strategy in (agem, finetune):
        strategy.begin(steps=1)
        strategy.update(strategy.loss(batch))
    assert same_weights(agem.model, finetune.model)
