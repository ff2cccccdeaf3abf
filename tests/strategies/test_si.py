"""SI against paths of one weight that can be followed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.nn.transforms import Identity
from clbench.protocol import run
from clbench.samples import Batch, Samples
from clbench.testing import ToyScenario
from clbench.types import Context, Experience, Objective
from strategies.finetune import Finetune
from strategies.si import SI


class Weight(nn.Module):
    """One weight, which is also the output; another one beside it that is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.other = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.w + self.other).expand(len(x), 1)


class HalfSquare(Objective):
    """½ (w − y)²: the gradient of the weight is w − y."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square().mean() / 2

    def score(self, *_: Any) -> dict[str, list[float]]:
        raise NotImplementedError


class DoubleSI(SI):
    """In fp64: a run's outputs are fp32."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.model(inputs)
        return outputs


class Line:
    """SI on one weight; every number below is a sum of powers of two."""

    def __init__(self, **options: float) -> None:
        self.strategy, self.model = DoubleSI(**options), Weight()  # type: ignore[arg-type]
        context = Context(
            device=torch.device("cpu"),
            seed=0,
            scenario=ToyScenario(),
            objective=HalfSquare(),
            transform=Identity(),
            n_outputs=1,
        )
        self.strategy.setup(self.model, context)

    @property
    def w(self) -> float:
        return self.model.w.item()

    def learn(self, targets: Sequence[float]) -> float:
        """One experience with one step for each target; returns ω at its end."""
        nothing = Experience(0, "by hand", None)
        self.strategy.before(nothing)
        self.strategy.begin(len(targets))
        for y in targets:
            batch = Batch(torch.zeros(1, 1), torch.tensor([y]), torch.empty(1), torch.empty(1))
            self.strategy.update(self.strategy.loss(batch))
        self.model.eval()
        (path,) = self.strategy._path
        self.strategy.after(nothing)
        return path.item()

    def omega(self) -> float:
        (curvature,) = self.strategy.anchor.curvature()
        return float(curvature) / (2 * self.strategy.si_c)


def test_a_path_by_hand() -> None:
    """w: 0, ½, ¾ towards 1 with lr ½.

    ω = −(−1)·½ − (−½)·¼ = 0.625; Δ = 0.75; Ω = 0.625 / (0.5625 + 0.4375) = 0.625.
    """
    line = Line(lr=0.5, si_c=1, xi=0.4375)
    assert line.learn([1, 1]) == 0.625
    assert line.w == 0.75
    assert line.omega() == pytest.approx(0.625)


def test_the_path_of_the_second_experience_leaves_the_penalty_out() -> None:
    """From ¾ towards −1. Step 1: g = 1.75, no pull: w = −0.125, ω = 1.75·0.875 = 1.53125.

    Step 2: g = 0.875, pull 2·0.625·(−0.875) = −1.09375, so Δw = ½·0.21875 = 0.109375 and
    ω = 1.53125 − 0.875·0.109375 = 1.435546875. With the pull it would be more.
    """
    line = Line(lr=0.5, si_c=1, xi=0.4375)
    line.learn([1, 1])
    assert line.learn([-1, -1]) == pytest.approx(1.435546875, rel=1e-12)
    assert line.w == pytest.approx(-0.015625, rel=1e-12)
    added = 1.435546875 / (0.765625**2 + 0.4375)
    assert line.omega() == pytest.approx(0.625 + added, rel=1e-12)


def test_the_loss_has_the_penalty() -> None:
    """½ (−0.125 + 1)² + 0.625·(−0.125 − 0.75)²."""
    line = Line(lr=0.5, si_c=1, xi=0.4375)
    line.learn([1, 1])
    nn.init.constant_(line.model.w, -0.125)
    batch = Batch(torch.zeros(1, 1), torch.tensor([-1.0]), torch.empty(1), torch.empty(1))
    assert line.strategy.loss(batch).item() == pytest.approx(0.3828125 + 0.478515625)


def test_a_move_up_hill_takes_importance_away() -> None:
    """At ½, 0.0625 above its target, with a pull of 1.25·(½ − ¾) = −0.3125: up by 0.125.

    ω = −0.0625·0.125, Ω = 0.625 + ω / (0.125² + 0.4375).
    """
    line = Line(lr=0.5, si_c=1, xi=0.4375)
    line.learn([1, 1])
    nn.init.constant_(line.model.w, 0.5)
    assert line.learn([0.4375]) == pytest.approx(-0.0078125)
    assert line.w == pytest.approx(0.625)
    assert line.omega() == pytest.approx(0.625 - 0.0078125 / 0.453125)


def test_importance_stops_at_zero() -> None:
    """One small step makes Ω = 2⁻¹³ / (2⁻¹⁴ + 1); si_c 2¹² makes it a pull of about 1.

    At −1, ¼ above the target: the pull wins, and ω / (Δ² + 1) is far below −Ω.
    """
    line = Line(lr=0.5, si_c=2**12, xi=1)
    assert line.learn([2**-6]) == 2**-13
    assert line.omega() == pytest.approx(2**-13 / (2**-14 + 1))
    nn.init.constant_(line.model.w, -1)
    assert line.learn([-1.25]) < -0.09
    assert line.w > -1
    assert line.omega() == 0


def test_clipping_shortens_the_move_and_not_the_gradient() -> None:
    """g = −1 clipped to ¼ with lr ½: Δ = 0.125 each; ω = 0.125·(1 + 0.875)."""
    line = Line(lr=0.5, si_c=1, xi=1, clip=0.25)
    assert line.learn([1, 1]) == pytest.approx(0.125 * 1.875, rel=1e-5)  # norm + 1e-6


def test_a_frozen_weight_collects_nothing() -> None:
    line = Line(lr=0.5, si_c=1, xi=1)
    line.learn([1, 1])
    before = line.omega()
    nn.init.constant_(line.model.w, 0.0)  # pulled, if it could move
    line.model.w.requires_grad_(False)
    line.model.other.requires_grad_(True)
    assert line.learn([1, 1]) == 0
    assert line.w == 0
    assert line.model.other.item() == 0.75
    assert line.omega() == pytest.approx(before)


def test_without_a_weight_it_is_fine_tuning_bit_for_bit(
    same_weights: Callable[..., bool],
) -> None:
    plain, none, some = Finetune(), SI(si_c=0), SI(si_c=5)
    results = [run(ToyScenario(), s, Conditions(threads=1)) for s in (plain, none, some)]
    assert results[0].accuracy_matrix == results[1].accuracy_matrix
    assert same_weights(plain.model, none.model)
    assert not same_weights(plain.model, some.model)


def test_the_whole_path_is_about_the_fall_of_the_loss(bench: Callable[..., Any]) -> None:
    """Σ ω is the integral of −∇L·dθ: with small full-batch steps, the loss that was lost."""
    one = bench(batch_size=80, epochs=40)
    si = one.prepare(SI(lr=0.01))
    samples: Samples = one.stream.experiences[0].train
    batch = samples.take(torch.arange(80))
    with torch.no_grad():
        start = si.loss(batch).item()
    one.teach(si, 0)
    with torch.no_grad():
        end = si.context.objective.loss(si.forward(batch.inputs), batch.targets).item()
    assert sum(float(p.sum()) for p in si._path) == pytest.approx(start - end, rel=0.02)
    assert start - end > 0.5


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(UserError, match="xi=0"):
        SI(xi=0)
    with pytest.raises(UserError, match="si_c=-1"):
        SI(si_c=-1)
