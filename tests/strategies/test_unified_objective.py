"""The objective of docs/unified-objective.md, once in general; every special case against it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

from clbench.nn.fisher import diagonal_fisher
from clbench.training import GradientStrategy
from strategies.der import DER
from strategies.derpp import DERpp
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.lwf import LwF
from strategies.mas import MAS
from strategies.replay import Replay
from strategies.si import SI

Make = Callable[..., Any]
Potential = Callable[[Tensor], Tensor]
Term = tuple[float, Tensor]
PAGE = Path(__file__).parents[2] / "docs" / "unified-objective.md"
MEMORY, ARRIVING, CLASSES = 10, 6, 6


def bregman(potential: Potential, p: Tensor, q: Tensor) -> Tensor:
    """F(p) − F(q) − ⟨∇F(q), p − q⟩, each row of p and q being a point; the mean over rows."""
    slope = grad(potential)
    pairs = zip(p, q, strict=True)
    rows = [potential(a) - potential(b) - (slope(b) * (a - b)).sum() for a, b in pairs]
    return torch.stack(rows).mean()


def objective(
    arriving: Tensor, outputs: Sequence[Term] = (), weights: Sequence[Term] = ()
) -> Tensor:
    """CE + Σ α D_Φ + Σ β D_Ψ, from coefficients and divergences, none of them nothing."""
    assert all(float(divergence.detach()) > 1e-3 for _, divergence in (*outputs, *weights))
    return arriving + sum(factor * divergence for factor, divergence in (*outputs, *weights))


def negative_entropy(p: Tensor) -> Tensor:
    return torch.xlogy(p, p).sum()


def half_square(p: Tensor) -> Tensor:
    return p.square().sum().div(2)


def quadratic(diagonal: Tensor) -> Potential:
    """½ pᵀAp."""

    def potential(p: Tensor) -> Tensor:
        return (diagonal * p.square()).sum().div(2)

    return potential


@pytest.fixture
def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, CLASSES))


@pytest.fixture
def learned(bench: Make, small: nn.Module) -> Callable[..., Any]:
    """A strategy after some experiences, its weights somewhere else, with a batch of the next.

    Every draw from the memory takes all of it, so that only the order is left to chance.
    """

    def make(strategy: GradientStrategy, *experiences: int) -> Any:
        one = bench(small, memory_size=MEMORY, memory_batch_size=MEMORY)
        strategy = one.learned(strategy, *experiences)
        move(strategy.model)
        return strategy, one.batch(experiences[-1] + 1, 0, ARRIVING), one.stream.experiences

    return make


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One point: all weights in a row, [1, P]."""
    return torch.cat([t.flatten() for t in tensors])[None]


def position(strategy: Any) -> Tensor:
    return flat(list(strategy.model.parameters()))


def arriving_loss(strategy: Any, batch: Any) -> Tensor:
    return F.cross_entropy(strategy.model(batch.inputs), batch.targets)


def stored_logits(strategy: Any) -> Tensor:
    logits: Tensor = strategy.model(strategy.context.transform.test(strategy.memory.raw))
    return logits


def stored_labels(strategy: Any) -> Tensor:
    return F.one_hot(strategy.memory.targets, CLASSES).float()


def agree(strategy: Any, batch: Any, expected: Tensor) -> None:
    """The strategy's loss is the expected one, in value and gradient."""
    parameters = list(strategy.model.parameters())
    found = strategy.loss(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(value, parameters) for value in (found, expected)]
    for one, two in zip(*slopes, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_bregman_divergences_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 4, generator=generator) for _ in range(2))
    a = torch.rand(4, generator=generator)
    torch.testing.assert_close(bregman(half_square, p, q), (p - q).square().sum(1).mean() / 2)
    torch.testing.assert_close(bregman(quadratic(a), p, q), (a * (p - q) ** 2).sum(1).mean() / 2)
    kl = F.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean")
    torch.testing.assert_close(bregman(negative_entropy, p.softmax(1), q.softmax(1)), kl)
    labels = torch.tensor([0, 3, 1, 1, 2])
    one_hot = F.one_hot(labels, 4).float()
    cross_entropy = F.cross_entropy(q, labels)
    torch.testing.assert_close(bregman(negative_entropy, one_hot, q.softmax(1)), cross_entropy)


def test_finetune(learned: Make) -> None:
    strategy, batch, _ = learned(Finetune(), 0)
    agree(strategy, batch, objective(arriving_loss(strategy, batch)))


def test_replay(learned: Make) -> None:
    """α = m/n; all of it times n/(n + m)."""
    strategy, batch, _ = learned(Replay(), 0)
    answers = stored_logits(strategy).softmax(1)
    kept = bregman(negative_entropy, stored_labels(strategy), answers)
    share = ARRIVING / (ARRIVING + MEMORY)
    whole = objective(arriving_loss(strategy, batch), [(MEMORY / ARRIVING, kept)])
    agree(strategy, batch, share * whole)


def test_der(learned: Make) -> None:
    strategy, batch, _ = learned(DER(alpha=0.7), 0)
    kept = bregman(half_square, stored_logits(strategy), strategy.memory.extras["logits"])
    terms = [(2 * 0.7 / CLASSES, kept)]
    agree(strategy, batch, objective(arriving_loss(strategy, batch), terms))


def test_derpp(learned: Make) -> None:
    strategy, batch, _ = learned(DERpp(alpha=0.7, beta=0.4), 0)
    logits = stored_logits(strategy)
    dark = bregman(half_square, logits, strategy.memory.extras["logits"])
    labelled = bregman(negative_entropy, stored_labels(strategy), logits.softmax(1))
    terms = [(2 * 0.7 / CLASSES, dark), (0.4, labelled)]
    agree(strategy, batch, objective(arriving_loss(strategy, batch), terms))


@pytest.mark.parametrize("scale_t2", [False, True])
@pytest.mark.parametrize("over", ["new", "all"])
def test_lwf(learned: Make, over: Literal["new", "all"], scale_t2: bool) -> None:
    options: dict[str, Any] = {"cross_entropy_over": over, "scale_t2": scale_t2}
    strategy, batch, experiences = learned(LwF(lwf_lambda=3, temperature=2, **options), 0)
    strategy.before(experiences[1])
    outputs = strategy.model(batch.inputs)
    old = list(experiences[0].classes)
    z = (strategy.teacher(batch.inputs)[:, old] / 2).softmax(1)
    kept = bregman(negative_entropy, z, (outputs[:, old] / 2).softmax(1))
    arriving = F.cross_entropy(outputs, batch.targets)
    if over == "new":
        new = list(experiences[1].classes)
        places = torch.tensor([new.index(int(y)) for y in batch.targets])
        arriving = F.cross_entropy(outputs[:, new], places)
    agree(strategy, batch, objective(arriving, [(3 * 4 if scale_t2 else 3, kept)]))


@pytest.mark.parametrize(("form", "gamma"), [("separate", 1.0), ("online", 0.5)])
def test_ewc(
    bench: Make, small: nn.Module, form: Literal["separate", "online"], gamma: float
) -> None:
    one = bench(small)
    strategy = one.prepare(EWC(ewc_lambda=7, form=form, gamma=gamma))
    fishers, places = [], []
    for index in (0, 1):
        one.teach(strategy, index)
        found = diagonal_fisher(strategy.model, one.stream.experiences[index].train)
        fishers.append(flat(list(found.values()))[0])
        places.append(position(strategy).detach())
    move(strategy.model)
    batch, here = one.batch(2, 0, ARRIVING), position(strategy)
    if form == "separate":
        held = zip(fishers, places, strict=True)
        terms = [(7.0, bregman(quadratic(f), here, there)) for f, there in held]
    else:
        terms = [(7.0, bregman(quadratic(gamma * fishers[0] + fishers[1]), here, places[1]))]
    agree(strategy, batch, objective(arriving_loss(strategy, batch), weights=terms))


@pytest.mark.parametrize(
    ("strategy", "factor"), [(SI(si_c=3.0), 2 * 3.0), (MAS(mas_lambda=0.2), 2 * 0.2)]
)
def test_si_and_mas(bench: Make, small: nn.Module, strategy: Any, factor: float) -> None:
    one = bench(small)
    strategy = one.learned(strategy, 0)
    omega = flat(strategy.anchor.curvature())[0] / factor
    assert omega.any()
    there = position(strategy).detach()
    move(strategy.model)
    terms = [(factor, bregman(quadratic(omega), position(strategy), there))]
    batch = one.batch(1, 0, ARRIVING)
    agree(strategy, batch, objective(arriving_loss(strategy, batch), weights=terms))


def test_the_page_points_to_what_is_there() -> None:
    text = PAGE.read_text()
    links = re.findall(r"\]\((\S+?)\)", text)
    assert links
    assert all((PAGE.parent / link).is_file() for link in links)
    tested = {"finetune", "replay", "der", "derpp", "lwf", "ewc", "si", "mas"}
    assert tested <= {Path(link).stem for link in links}
    assert Path(__file__).name in text
