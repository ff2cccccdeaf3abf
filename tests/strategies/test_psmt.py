"""PSMT against CoTTA's limit, the released code written out, and masks and averages by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from drift import Drift, batch_of
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.batch_statistics import batch_norms
from strategies.cotta import CoTTA
from strategies.psmt import PSMT, quantile


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_quantile_is_torch_s(share: float) -> None:
    values = [torch.rand(7, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3])]
    flat = torch.cat([v.flatten() for v in values])
    torch.testing.assert_close(quantile(values, share), flat.quantile(share))


def test_without_pull_and_mask_it_is_cotta_without_restoration() -> None:
    """A loss of a sixth, for six classes, and a rate six times as high."""
    drift = Drift()
    common = {"optimizer": "sgd", "teacher_momentum": 0.8, "views": 2, "confidence_threshold": 0.9}
    psmt = drift.prepare(PSMT(lr=0.06, fisher_weight=0.0, share=0.0, **common))  # type: ignore[arg-type]
    cotta = drift.prepare(CoTTA(lr=0.01, restore_probability=0.0, **common))  # type: ignore[arg-type]
    for batch in [b for domain in range(3) for b in drift.batches(domain)[:2]]:
        expected = cotta.adapt(batch)
        torch.testing.assert_close(psmt.adapt(batch), expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(psmt.predict(batch), cotta.predict(batch), rtol=0, atol=1e-3)


class Linear(nn.Module):
    """Two outputs, W x for the first two numbers of each input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x)
        return logits


def test_mask_average_and_pull_by_hand() -> None:
    """x = (1, 2); the student is moved to W = ((ln 3, 0), (0, 0)), the teacher stays at 0.

    p = (3/4, 1/4), q = (1/2, 1/2): the gradient is ±(1/4)(1, 2)/2, F = (1/64, 1/16) in each row.
    With a share of a half the second column has m = 1. A rate of 1 makes the student
    W₁ = ((ln 3 − 1/8, −1/4), (1/8, 1/4)), and the teacher, with γ = 1/2, half of its first column.
    In the next step the pull adds 2 λ F (W₁ − W₀) = ∓2 λ (1/64 · 1/8, 1/16 · 1/4).
    """
    options = PSMT(
        lr=1.0,
        optimizer="sgd",
        momentum=0.0,
        fisher_weight=16.0,
        share=0.5,
        teacher_momentum=0.5,
        confidence_threshold=0.0,
    )
    psmt = Drift(model=Linear(), n_outputs=2).prepare(options)
    x = torch.tensor([[1.0, 2.0]])
    weight = psmt.model.get_parameter("layer.weight")
    taught = psmt.teacher.get_parameter("layer.weight")
    with torch.no_grad():
        weight[0, 0] = math.log(3)
    assert psmt.adapt(batch_of(x)).tolist() == [[0.0, 0.0]]
    first = torch.tensor([[math.log(3) - 1 / 8, -1 / 4], [1 / 8, 1 / 4]])
    torch.testing.assert_close(weight.detach(), first)
    torch.testing.assert_close(taught, first * torch.tensor([0.5, 0.0]))
    q, p = (x @ taught.T).softmax(1), (x @ first.T).softmax(1)
    psmt.adapt(batch_of(x))
    pull = 2 * 16 * torch.tensor([[-1 / 512, -1 / 64], [1 / 512, 1 / 64]])
    second = first - (p - q).T @ x / 2 - pull
    torch.testing.assert_close(weight.detach(), second)
    assert torch.equal(taught[:, 1], torch.zeros(2))
    torch.testing.assert_close(psmt.past[0], first)


def test_the_largest_gradients_keep_their_teacher() -> None:
    drift = Drift()
    psmt = drift.prepare(PSMT(share=0.2, confidence_threshold=0.0, teacher_momentum=0.5))
    batches = drift.batches()
    psmt.adapt(batches[0])  # the student moves away from the teacher, on rounding at first
    before = torch.cat([p.flatten() for p in weights(psmt.teacher)])
    psmt.adapt(batches[1])
    after = torch.cat([p.flatten() for p in weights(psmt.teacher)])
    moved = torch.cat([p.flatten() for p in weights(psmt.model)])
    squares = torch.cat([f.flatten() for f in psmt.importance])
    kept = squares > squares.quantile(0.8)
    assert torch.equal(after[kept], before[kept])
    torch.testing.assert_close(after[~kept], ((before + moved) / 2)[~kept])
    assert (after[~kept] != before[~kept]).float().mean() > 0.9


def test_it_is_the_released_code() -> None:
    """Its loop written out: loss, pull, threshold, step, two averages, restoration, sum."""
    drift = Drift()
    options = PSMT(
        lr=0.01,
        optimizer="sgd",
        form="code",
        fisher_weight=5.0,
        share=0.2,
        teacher_momentum=0.8,
        source_samples=25,
    )
    psmt = drift.prepare(options)
    student = drift.fresh()
    for norm in batch_norms(student):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    teacher, source = copy.deepcopy(student), copy.deepcopy(student)
    fisher = [torch.zeros_like(p) for p in student.parameters()]
    context = drift.context()
    assert context.source is not None
    order = torch.randperm(len(context.source), generator=context.generator("fisher"))[:25]
    for rows in order.split(10):
        outputs = student(context.source.take(rows).inputs)
        loss = F.cross_entropy(outputs, outputs.max(1).indices)
        slopes = torch.autograd.grad(loss, list(student.parameters()))
        fisher = [f + g**2 / 3 for f, g in zip(fisher, slopes, strict=True)]
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9)
    for batch in [b for domain in range(3) for b in drift.batches(domain)[:2]]:
        found = psmt.adapt(batch)
        s = student(batch.inputs)
        with torch.no_grad():
            t = teacher(batch.inputs)
        torch.testing.assert_close(found, s + t, rtol=0, atol=2e-3)
        forward = -(t.softmax(1) * s.log_softmax(1)).sum(1)
        reverse = -(s.softmax(1) * t.log_softmax(1)).sum(1)
        loss = (0.5 * forward + 0.5 * reverse).mean()
        pairs = zip(fisher, student.parameters(), source.parameters(), strict=True)
        loss = loss + 5 * sum((f * (p - old) ** 2).sum() for f, p, old in pairs)
        optimizer.zero_grad()
        loss.backward()
        squares = [p.grad**2 for p in student.parameters() if p.grad is not None]
        limit = torch.cat([f.flatten() for f in squares]).quantile(0.2)
        optimizer.step()
        with torch.no_grad():
            triples = zip(
                teacher.parameters(), student.parameters(), source.parameters(), strict=True
            )
            for (taught, p, old), f in zip(triples, squares, strict=True):
                mask = (f < limit).float()
                taught.copy_(0.8 * taught + 0.2 * p)
                p.copy_(old * mask + p * (1 - mask))
                taught.copy_(mask * p + (1 - mask) * (0.8 * taught + 0.2 * p))
    batch = drift.batches()[0]
    expected = (student(batch.inputs) + teacher(batch.inputs)).detach()
    torch.testing.assert_close(psmt.predict(batch), expected, rtol=0, atol=5e-3)


def test_the_code_s_form_needs_the_source_and_the_paper_s_does_not() -> None:
    drift = Drift()
    drift.stream = replace(drift.stream, source=None)
    drift.prepare(PSMT())
    with pytest.raises(UserError, match="strategy=psmt"):
        drift.prepare(PSMT(form="code"))
