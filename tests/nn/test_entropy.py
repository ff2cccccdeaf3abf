"""Entropies and their gradients against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clbench.nn.entropy import entropy, marginal_entropy, threshold


def logits(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def test_of_two_classes_by_hand() -> None:
    # p = (1/4, 3/4): H = ¼ ln 4 + ¾ ln 4/3
    z = torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(entropy(z), torch.tensor([math.log(4) / 4 + 0.75 * math.log(4 / 3)]))


def test_guessing_and_being_sure() -> None:
    torch.testing.assert_close(entropy(torch.zeros(1, 5)), torch.tensor([math.log(5)]))
    z = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    sure = entropy(z)
    sure.sum().backward()
    assert sure.item() == 0
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_gradient_is_the_closed_form() -> None:
    z = logits(4, 6).requires_grad_()
    h = entropy(z)
    h.sum().backward()
    p = z.detach().softmax(1)
    torch.testing.assert_close(z.grad, -p * (p.log() + h.detach()[:, None]))


def test_marginal_entropy_is_that_of_the_mean_answer() -> None:
    z = logits(4, 3, 6)
    mean = z.softmax(2).mean(1)
    torch.testing.assert_close(marginal_entropy(z), -(mean * mean.log()).sum(1))
    torch.testing.assert_close(marginal_entropy(z[:, :1]), entropy(z[:, 0]))


def test_answers_that_are_sure_but_disagree_are_not_sure_together() -> None:
    z = torch.tensor([[[1e3, 0.0], [0.0, 1e3]]], requires_grad=True)
    both = marginal_entropy(z)
    torch.testing.assert_close(both, torch.tensor([math.log(2)]))
    both.sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_threshold_is_a_share_of_guessing() -> None:
    assert threshold(0.4, 10) == 0.4 * math.log(10)
    guessing = entropy(torch.zeros(3, dtype=torch.double)).item()
    assert threshold(1, 3) == pytest.approx(guessing)
