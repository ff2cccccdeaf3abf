"""CoTTA against its limits, a loop written out, and numbers worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from drift import Drift, batch_of
from torch import Tensor, nn

from clbench.nn.batch_statistics import batch_norms, normalise_by_batch
from clbench.nn.test_time_augmentation import CoTTAViews
from strategies.cotta import CoTTA

NEVER, ALWAYS = 0.0, 1.1  # thresholds of the confidence


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_full_restore_keeps_the_source() -> None:
    """The student is the source after every batch, to the bit; the teacher had seen its step."""
    drift = Drift()
    cotta = drift.prepare(CoTTA(restore_probability=1.0, teacher_momentum=0.9, views=2))
    source = weights(drift.fresh())
    for batch in drift.batches():
        cotta.adapt(batch)
        assert same(weights(cotta.model), source)
    assert not same(weights(cotta.teacher), source)


def test_without_rate_and_views_it_is_prediction_with_batch_statistics() -> None:
    drift = Drift()
    cotta = drift.prepare(CoTTA(lr=0.0, confidence_threshold=NEVER))
    model = drift.fresh()
    normalise_by_batch(model)
    for domain in range(3):
        for batch in drift.batches(domain):
            expected = model(batch.inputs)
            torch.testing.assert_close(cotta.adapt(batch), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(cotta.predict(batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("threshold", [NEVER, ALWAYS, 0.9])
def test_it_is_the_published_loop(threshold: float, symmetric: bool) -> None:
    """Student, teacher, anchor and restoring written out with deep copies and plain loops."""
    drift = Drift()
    cotta = drift.prepare(
        CoTTA(
            lr=0.01,
            optimizer="sgd",
            confidence_threshold=threshold,
            symmetric=symmetric,
            views=3,
            teacher_momentum=0.8,
            restore_probability=0.1,
        )
    )
    student = drift.fresh()
    for norm in batch_norms(student):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    teacher, anchor = copy.deepcopy(student), copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9)
    context = drift.context()
    views, restoring = CoTTAViews(context), context.generator("restore")
    decisions = []
    for batch in [b for domain in range(3) for b in drift.batches(domain)[:2]]:
        x = batch.inputs
        found = cotta.adapt(batch)
        sure = anchor(x).softmax(1).max(1).values.mean() >= threshold
        with torch.no_grad():
            z = teacher(x) if sure else torch.stack([teacher(v) for v in views(x, 3)]).mean(0)
        decisions.append(bool(sure))
        torch.testing.assert_close(found, z, rtol=0, atol=2e-4)
        s = student(x)
        loss = -(z.softmax(1) * s.log_softmax(1)).sum(1)
        if symmetric:
            loss = 0.5 * loss - 0.5 * (s.softmax(1) * z.log_softmax(1)).sum(1)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        with torch.no_grad():
            for t, p in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(0.8 * t + 0.2 * p)
            counts = [p.numel() for p in student.parameters()]
            drawn = torch.rand(sum(counts), generator=restoring)
            whole = zip(student.parameters(), anchor.parameters(), drawn.split(counts), strict=True)
            for p, old, numbers in whole:
                mask = (numbers.view_as(p) < 0.1).float()
                p.copy_(old * mask + p * (1 - mask))
    expected = {NEVER: {True}, ALWAYS: {False}}.get(threshold, {True, False})
    assert set(decisions) == expected
    pairs = zip(weights(cotta.model), weights(student), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    assert not same(weights(cotta.model), weights(anchor))


class Linear(nn.Module):
    """Two outputs, W x for the first number of each input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1)[:, :1])
        return logits


def test_two_steps_by_hand() -> None:
    """SGD on W x. With the teacher's own answer as its target a student does not move.

    The student is moved to W = (ln 3, 0), the teacher stays at 0: for x = 1 they answer
    p = (3/4, 1/4) and q = (1/2, 1/2). The gradient is (p - q) x = (1/4, -1/4). With a rate of 2,
    W becomes (ln 3 - 1/2, 1/2), and the teacher, with momentum 3/4, a quarter of that.
    """
    drift = Drift(model=Linear(), n_outputs=2)
    options = CoTTA(
        lr=2.0,
        optimizer="sgd",
        confidence_threshold=0.5,
        restore_probability=0.0,
        teacher_momentum=0.75,
    )
    cotta = drift.prepare(options)
    batch = batch_of(torch.ones(3, 1))
    assert cotta.adapt(batch).tolist() == [[0.0, 0.0]] * 3
    assert not any(p.any() for p in weights(cotta.model))
    layer = cotta.model.get_parameter("layer.weight")
    with torch.no_grad():
        layer[0] = torch.tensor(3.0).log()
    assert cotta.adapt(batch).tolist() == [[0.0, 0.0]] * 3
    expected = torch.tensor([3.0, 1.0]).log() + torch.tensor([-0.5, 0.5])
    torch.testing.assert_close(layer.flatten(), expected)
    torch.testing.assert_close(cotta.predict(batch)[0], expected / 4)


def test_confidence_equal_to_the_threshold_is_enough() -> None:
    """Two outputs of 0 have a confidence of 1/2; no view is drawn unless more is asked for."""
    drift = Drift(model=Linear(), n_outputs=2)
    for threshold, drawn in ((0.5, False), (0.51, True)):
        cotta = drift.prepare(CoTTA(confidence_threshold=threshold, views=2))
        before = {k: g.get_state() for k, g in cotta.context.generators.items()}
        cotta.adapt(drift.batches()[0])
        after = {k: g.get_state() for k, g in cotta.context.generators.items()}
        moved = {k.split("@")[0] for k in after if not torch.equal(before[k], after[k])}
        assert moved == {"restore"} | ({"views", "noise of views"} if drawn else set())


def test_restored_numbers_are_the_source_s_and_the_others_are_not() -> None:
    drift = Drift()
    cotta = drift.prepare(CoTTA(restore_probability=0.3, views=1))
    cotta.adapt(drift.batches()[0])
    pairs = zip(weights(cotta.model), weights(drift.fresh()), strict=True)
    back = torch.cat([(a == b).flatten() for a, b in pairs])
    n = len(back)
    assert abs(back.sum() - 0.3 * n) < 4.5 * (0.21 * n) ** 0.5 + 0.02 * n
