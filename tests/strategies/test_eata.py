"""EATA against a loop written from its code, TENT, and its parts by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from suite import composed
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.config import build
from clbench.errors import UserError
from clbench.samples import Batch
from clbench.types import Context, Strategy
from strategies.eata import EATA
from strategies.tent import Tent

Make = Callable[..., Any]


def scales(strategy: Any) -> list[Tensor]:
    return [p.detach().clone() for p in strategy.model.parameters() if p.requires_grad]


def unlabelled(inputs: Tensor) -> Batch:
    nobody = torch.empty(0, dtype=torch.int64)
    return Batch(inputs, nobody, inputs, torch.arange(len(inputs)))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_opened_up_it_is_tent(drift: Make, optimizer: Any) -> None:
    bench = drift()
    eata, tent = (
        bench.prepare(s)
        for s in (
            EATA(
                lr=0.01,
                optimizer=optimizer,
                entropy_margin=math.inf,
                epsilon=2.0,
                beta=0.0,
                reweight=False,
            ),
            Tent(lr=0.01, optimizer=optimizer),
        )
    )
    for index in range(3):
        for batch in bench.arriving(index):
            assert torch.equal(eata.adapt(batch), tent.adapt(batch))
            assert torch.equal(eata.predict(batch), tent.predict(batch))


class Published:
    """The published loop: lists of indices, loss with the penalty inside, plain SGD."""

    def __init__(self, model: nn.Module, margin: float, epsilon: float, beta: float) -> None:
        self.model, self.margin, self.epsilon, self.beta = model, margin, epsilon, beta
        self.scales = [p for p in model.parameters() if p.requires_grad]
        self.descent = torch.optim.SGD(self.scales, 0.01, momentum=0.9)
        self.average: Tensor | None = None
        self.fishers: list[Tensor] = []
        self.anchors = [p.detach().clone() for p in self.scales]
        self.kept: list[int] = []

    def measure(self, batches: list[Tensor]) -> None:
        self.fishers = [torch.zeros_like(p) for p in self.scales]
        for inputs in batches:
            outputs = self.model(inputs)
            F.cross_entropy(outputs, outputs.max(1)[1]).backward()
            for fisher, p in zip(self.fishers, self.scales, strict=True):
                assert p.grad is not None
                fisher += p.grad**2 / len(batches)
            self.descent.zero_grad()

    def __call__(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.model(inputs)
        p = outputs.softmax(1)
        h = -(p * outputs.log_softmax(1)).sum(1)
        rows = [i for i in range(len(inputs)) if h[i] < self.margin]
        if self.average is not None:
            cosine = [abs(F.cosine_similarity(self.average, p[i], dim=0)) for i in range(len(p))]
            rows = [i for i in rows if cosine[i] < self.epsilon]
        self.kept.append(len(rows))
        if rows:
            mean = p[rows].mean(0).detach()
            old = self.average
            self.average = mean if old is None else 0.9 * old + (1 - 0.9) * mean
            weights = 1 / torch.exp(h[rows].detach() - self.margin)
            loss = (h[rows] * weights).mean(0)
            for fisher, anchor, q in zip(self.fishers, self.anchors, self.scales, strict=False):
                loss = loss + self.beta * (fisher * (q - anchor) ** 2).sum()
            loss.backward()
            self.descent.step()
        self.descent.zero_grad()
        return outputs.detach()


@pytest.mark.parametrize("beta", [0.0, 500.0])
def test_it_is_the_loop_of_the_published_code(drift: Make, beta: float) -> None:
    bench = drift()
    strategy = EATA(lr=0.01, optimizer="sgd", epsilon=0.9, beta=beta, fisher_batch_size=16)
    eata, other = (bench.prepare(strategy) for _ in range(2))
    loop = Published(other.model, 0.4 * math.log(6), 0.9, beta)
    if beta:
        generator = bench.context().generator("eata.fisher")
        order = torch.randperm(60, generator=generator)
        source = bench.stream.source
        loop.measure([batch.inputs for batch in source.batches(order, 16)])
        torch.testing.assert_close(eata._fisher, loop.fishers)
    for index in range(3):
        for batch in bench.arriving(index):
            torch.testing.assert_close(eata.adapt(batch), loop(batch.inputs))
    torch.testing.assert_close(scales(eata), [p.detach() for p in loop.scales])
    torch.testing.assert_close(eata.average, loop.average)
    # The comparison means something: some samples were kept and some were not.
    assert 0 < sum(loop.kept) < 3 * 38


def test_the_pull_holds_the_weights_near_the_source(drift: Make) -> None:
    bench = drift()
    far = []
    for beta in (0.0, 500.0):
        strategy = EATA(lr=0.01, optimizer="sgd", epsilon=2.0, beta=beta)
        eata = bench.prepare(strategy)
        start = scales(eata)
        for batch in bench.arriving(1):
            eata.adapt(batch)
        away = zip(scales(eata), start, strict=True)
        far.append(sum(float((a - b).square().sum()) for a, b in away))
    assert far[1] < far[0]


def test_a_step_by_hand(drift: Make) -> None:
    """Two alike samples as in the test of TENT: the weight is exp(E₀ − H) for both."""
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-12))
    eata = drift(model).prepare(EATA(lr=0.1, optimizer="sgd", momentum=0.0, beta=0.0))
    vars(eata)["_margin"] = 0.5
    eata.adapt(unlabelled(torch.tensor([[3.0, 5.0], [1.0, 9.0]])))
    p = 1 / (1 + math.exp(-2))
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    gradient = -p * (math.log(p) + h) * math.exp(0.5 - h)
    scale, shift = eata.model.parameters()
    torch.testing.assert_close(scale.detach(), torch.full((2,), 1 - 0.1 * gradient))
    torch.testing.assert_close(shift.detach(), torch.zeros(2), atol=1e-7, rtol=0)
    torch.testing.assert_close(eata.average, torch.full((2,), 0.5))


def test_which_samples_are_kept_by_hand(drift: Make) -> None:
    eata = drift().prepare(EATA(epsilon=0.5, beta=0.0))
    answers = torch.eye(6)[:3]
    entropies = torch.tensor([0.1, 0.4 * math.log(6) + 1e-4, 0.4 * math.log(6) - 1e-4])
    assert eata.select(answers, entropies).tolist() == [True, False, True]
    # cos(m, e₀) = 0.8, cos(m, e₂) = 0: the first answer is old news.
    eata.average = torch.tensor([0.8, 0.6, 0.0, 0.0, 0.0, 0.0])
    assert eata.select(answers, torch.zeros(3)).tolist() == [False, False, True]


def test_the_average_answer_by_hand(drift: Make) -> None:
    eata = drift().prepare(EATA(beta=0.0, decay=0.9))
    eata.remember(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(eata.average, torch.tensor([1.0, 0.0]))
    eata.remember(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(eata.average, torch.tensor([0.9, 0.1]))


def test_without_a_reliable_sample_nothing_happens(drift: Make) -> None:
    bench = drift()
    eata = bench.prepare(EATA(lr=0.01, optimizer="sgd", epsilon=2.0))
    eata.adapt(bench.arriving(0)[0])  # momentum has begun
    before, average = scales(eata), eata.average
    vars(eata)["_margin"] = 0.0
    eata.adapt(bench.arriving(1)[0])
    assert all(map(torch.equal, scales(eata), before))
    assert eata.average is average


def test_eta_needs_no_source_and_eata_says_that_it_does(
    drift: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = drift()
    with_source = bench.context

    def without() -> Context:
        context: Context = with_source()
        context.source = None
        return context

    monkeypatch.setattr(bench, "context", without)
    eta = build(composed("strategy=eta")["strategy"], Strategy, "strategy")
    assert isinstance(eta, EATA)
    bench.prepare(eta)
    with pytest.raises(UserError, match=r"samples of the source.*strategy\.beta=0"):
        bench.prepare(EATA())


@pytest.mark.parametrize("option", [{"epsilon": -0.1}, {"decay": 1.1}, {"fisher_samples": 0}])
def test_ranges(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="out of range"):
        EATA(**option)
