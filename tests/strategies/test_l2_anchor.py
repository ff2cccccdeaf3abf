"""The L2 anchor against its equation, its limits, and EWC with F = 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import strategies.ewc
from clbench.errors import UserError
from clbench.nn.heads import Classifier, CosineHead
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.l2_anchor import L2Anchor

Make = Callable[..., Any]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def move(model: nn.Module) -> None:
    """Takes the weights elsewhere, so that there is something to penalise."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


def expected(before: dict[str, Tensor], model: nn.Module, rows: list[int]) -> dict[str, Tensor]:
    """2 λ (θ − θ*) with λ = 3, in the head only for some rows."""
    pulls = {name: 6 * (p - before[name]) for name, p in weights(model).items()}
    others = [row for row in range(6) if row not in rows]
    for name in ("head.weight", "head.bias"):
        pulls[name][others] = 0
    return pulls


def check(strategy: L2Anchor, before: dict[str, Tensor], rows: list[int]) -> None:
    move(strategy.model)
    penalty, pulls = strategy.anchor.penalty(), expected(before, strategy.model, rows)
    value = sum(pull.square().sum() / 12 for pull in pulls.values())
    torch.testing.assert_close(penalty.detach(), torch.as_tensor(value))
    gradients = torch.autograd.grad(penalty, list(strategy.model.parameters()))
    for gradient, pull in zip(gradients, pulls.values(), strict=True):
        torch.testing.assert_close(gradient, pull)


def test_pre_trained_weights_hold_from_the_first_step(bench: Make) -> None:
    """Of the head, which is not pre-trained, nothing is held."""
    strategy = bench().prepare(L2Anchor(l2_lambda=3))
    check(strategy, weights(strategy.model), [])


@pytest.mark.parametrize("from_start", [True, False])
def test_the_weights_of_the_latest_experience_hold(bench: Make, from_start: bool) -> None:
    one = bench()
    strategy = one.learned(L2Anchor(l2_lambda=3, lr=0.01, from_start=from_start), 0, 1)
    rows = [c for e in one.stream.experiences[:2] for c in e.classes]
    check(strategy, weights(strategy.model), rows)


def test_without_a_start_the_first_experience_is_free(bench: Make) -> None:
    strategy = bench().prepare(L2Anchor(l2_lambda=3, from_start=False))
    move(strategy.model)
    assert strategy.anchor.penalty().item() == 0


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_without_a_weight_it_is_fine_tuning_bit_for_bit(
    bench: Make, same_weights: Callable[..., bool], head: str
) -> None:
    one = bench(head=head)
    plain = one.learned(Finetune())
    none = one.learned(L2Anchor(l2_lambda=0, loss_over="all"))
    assert same_weights(plain.model, none.model)
    assert not same_weights(plain.model, one.learned(L2Anchor(loss_over="all")).model)


def test_it_is_ewc_with_an_information_of_one(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rows of classes still to come, which EWC holds too: here all classes come at once."""

    def ones(model: nn.Module, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {name: torch.ones_like(p) for name, p in model.named_parameters()}

    monkeypatch.setattr(strategies.ewc, "diagonal_fisher", ones)
    one = bench(n_experiences=1)
    ewc: EWC = one.prepare(EWC(ewc_lambda=6, form="online", gamma=0, lr=0.01))
    l2: L2Anchor = one.prepare(L2Anchor(l2_lambda=3, from_start=False, loss_over="all", lr=0.01))
    for strategy in (ewc, l2):
        one.teach(strategy, 0)
        one.teach(strategy, 0)
    for a, b in zip(weights(ewc.model).values(), weights(l2.model).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_heavier_anchor_drifts_less(bench: Make) -> None:
    one = bench()
    drifts = []
    for l2_lambda in (0.0, 0.1, 1.0):
        strategy = one.prepare(L2Anchor(l2_lambda=l2_lambda))
        start = weights(strategy.model)
        one.teach(strategy)
        end = weights(strategy.model)
        body = [name for name in start if name.startswith("features.")]
        drifts.append(sum(float((end[n] - start[n]).square().sum()) for n in body))
    assert drifts[0] > 2 * drifts[1] > 4 * drifts[2]


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
@pytest.mark.parametrize("loss_over", ["experience", "all"])
def test_the_classification_loss_by_hand(bench: Make, loss_over: Any, outputs: Any) -> None:
    one = bench()
    strategy = one.learned(L2Anchor(l2_lambda=0, loss_over=loss_over, outputs=outputs), 0)
    strategy.before(one.stream.experiences[1])
    batch, new = one.batch(1, 0, 7), list(one.stream.experiences[1].classes)
    met = sorted([*one.stream.experiences[0].classes, *new])
    columns = new if loss_over == "experience" else met if outputs == "sigmoid" else list(range(6))
    logits = strategy.model(batch.inputs)[:, columns].double()
    where = torch.tensor([columns.index(int(label)) for label in batch.targets])
    if outputs == "softmax":
        wanted = logits.logsumexp(1) - logits[torch.arange(7), where]
    else:
        signs = 1 - 2 * F.one_hot(where, len(columns))
        wanted = (1 + (signs * logits).exp()).log().sum(1)
    torch.testing.assert_close(strategy.loss(batch).double(), wanted.mean(), rtol=1e-5, atol=1e-6)


def test_the_scale_of_a_cosine_head_is_held_once_it_was_trained(bench: Make) -> None:
    one = bench()
    features = one.prepare(Finetune()).model.features
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(features, CosineHead(32, 6, learnable=True))
    one = bench(model)
    strategy = one.prepare(L2Anchor())
    place = strategy.anchor.names.index("head.scale")
    assert strategy.anchor.curvature()[place] == 0
    one.teach(strategy, 0)
    torch.testing.assert_close(strategy.anchor.curvature()[place], torch.tensor(0.1))


def test_what_has_no_meaning_is_refused(bench: Make) -> None:
    with pytest.raises(UserError, match="l2_lambda=-1"):
        L2Anchor(l2_lambda=-1)
    with pytest.raises(UserError, match="Sequential"):
        bench(nn.Sequential(nn.Flatten(), nn.Linear(36, 6))).prepare(L2Anchor())
