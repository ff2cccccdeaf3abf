"""Refresh learning against its equations, its released code, and its base."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from suite import Command, composed
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.conditions import Conditions
from clbench.config import build
from clbench.errors import UserError
from clbench.nn.fisher import diagonal_fisher
from clbench.nn.noise import GaussianNoise
from clbench.protocol import run
from clbench.state import capture
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy
from clbench.types import Strategy
from strategies.der import DER
from strategies.derpp import DERpp
from strategies.er_ace import ERACE
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.lwf import LwF
from strategies.refresh import Refresh, unnoticed
from strategies.replay import Replay

Make = Callable[..., Any]
Same = Callable[[nn.Module, nn.Module], bool]
BASES: list[GradientStrategy] = [
    *(Finetune(), Replay(), DER(alpha=0.7), DERpp(alpha=0.7, beta=0.4)),
    *(ERACE(), EWC(ewc_lambda=5.0), LwF()),
]
EVERY_BASE = pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)


@pytest.fixture
def restless() -> nn.Module:
    """Dropout draws from the global generator, and batch norm keeps statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, 6))


@contextmanager
def seeded() -> Iterator[None]:
    """The global generator as in a run: seeded, and afterwards as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


def same(one: Any, two: Any) -> bool:
    """Whether two captured states agree in every bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def weights(strategy: Refresh) -> list[Tensor]:
    return [p.detach().clone() for p in strategy.model.parameters()]


def gradients(strategy: Refresh, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(strategy.model.parameters())))


def normal_numbers(one: Any, strategy: Refresh) -> list[Tensor]:
    """What the first step of a run adds, before it is scaled."""
    numbers = [torch.zeros_like(p) for p in strategy.model.parameters()]
    count = sum(n.numel() for n in numbers)
    noise = GaussianNoise(count, one.context().generator("refresh.noise"))
    noise.add(numbers, [torch.ones_like(n) for n in numbers])
    return numbers


def started(one: Any, strategy: Refresh, scale: float = 0.0) -> Refresh:
    """In training on the first experience; its memory holds a batch, and F is random."""
    strategy = one.prepare(strategy)
    generator = torch.Generator().manual_seed(3)
    for value in strategy.information.values():
        value.copy_(scale * torch.rand(value.shape, generator=generator))
    strategy.before(one.stream.experiences[0])
    strategy.begin(steps=4)
    batch = one.batch(0, 0, 10)
    strategy.base.update(strategy.base.loss(batch))
    strategy.observe(batch)
    return strategy


# The base.


@EVERY_BASE
@pytest.mark.parametrize(
    ("form", "unlearned", "steps"),
    [("sde", "objective", 1), ("sde", "arriving", 2), ("relative", "objective", 3)],
)
def test_without_step_and_noise_it_is_its_base_bit_for_bit(
    bench: Make,
    restless: nn.Module,
    base: GradientStrategy,
    form: Literal["sde", "relative"],
    unlearned: Literal["objective", "arriving"],
    steps: int,
) -> None:
    """Model, memory, penalty, teacher and all random streams; augmentation and dropout included."""
    one = bench(restless, crop_padding=1, flip=True)
    options: dict[str, Any] = {"form": form, "unlearned": unlearned, "unlearn_steps": steps}
    with seeded():
        plain = one.learned(base)
        drawn = torch.get_rng_state()
    with seeded():
        refreshed = one.learned(Refresh(base=base, gamma=0, noise=0, **options))
        assert torch.equal(drawn, torch.get_rng_state())
    assert same(capture(plain), capture(refreshed.base))
    for key, generator in plain.context.generators.items():
        assert torch.equal(generator.get_state(), refreshed.context.generators[key].get_state())
    assert torch.equal(one.outputs(plain), one.outputs(refreshed))


@EVERY_BASE
@pytest.mark.parametrize("config", ["refresh", "refresh_code"])
def test_it_runs_round_every_base_and_changes_it(
    same_weights: Same, base: GradientStrategy, config: str
) -> None:
    plain, node = copy.deepcopy(base), composed(f"strategy={config}")["strategy"]
    refreshed = replace(build(node, Refresh, "strategy"), base=copy.deepcopy(base))
    for strategy in (plain, refreshed):
        result = run(ToyScenario(memory_size=12), strategy, Conditions(threads=1))
        assert result.status == "complete"
    assert not same_weights(plain.model, refreshed.model)
    assert refreshed.memory_samples == plain.memory_samples


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("unlearned", "passes"), [("objective", {10: 1, 7: 2}), ("arriving", {10: 1})]
)
def test_a_step_costs_one_more_pass_of_what_is_unlearned(
    bench: Make,
    unlearned: Literal["objective", "arriving"],
    passes: dict[int, int],
    steps: int,
) -> None:
    one = bench(memory_batch_size=7)
    strategy = started(one, Refresh(base=DERpp(), unlearned=unlearned, unlearn_steps=steps))
    sizes: list[int] = []
    strategy.model.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    strategy.loss(one.batch(1, 0, 10))
    expected = {10: 1 + steps * passes[10], 7: 2 + steps * passes.get(7, 0)}
    assert {size: sizes.count(size) for size in sizes} == expected


# The step uphill.


def test_the_step_of_the_paper(bench: Make) -> None:
    """θ + γ(F + d)⁻¹g + noise·√(2γ(F + d)⁻¹)·ξ."""
    one = bench(memory_size=10, memory_batch_size=10)
    options: dict[str, Any] = {"gamma": 0.02, "noise": 0.5, "damping": 0.1}
    strategy = started(one, Refresh(base=DERpp(), **options), scale=1.0)
    batch, before = one.batch(1, 0, 6), weights(strategy)
    slope = gradients(strategy, strategy.base.loss(batch))
    xi, information = normal_numbers(one, strategy), strategy.information.values()
    strategy.unlearn(batch)
    for new, old, g, x, f in zip(weights(strategy), before, slope, xi, information, strict=True):
        expected = old + 0.02 / (f + 0.1) * g + 0.5 * (2 * 0.02 / (f + 0.1)).sqrt() * x
        torch.testing.assert_close(new, expected)


def test_the_step_of_the_released_code(bench: Make) -> None:
    """Its recipe, with its numbers: a copy takes an SGD step of 0.01 up the cross-entropy of the
    batch; each tensor's move is rescaled to the norm of its weights; noise of 0.001 is added;
    all is divided by 1 + 0.001 F; the weights move by 1e-5 of it."""
    with seeded():  # no bias before the batch norm: its gradient is nothing but rounding
        layers = [nn.Linear(36, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6)]
        one = bench(nn.Sequential(nn.Flatten(), *layers))
    node = composed("strategy=refresh_code")["strategy"]
    strategy = started(one, build(node, Refresh, "strategy"), scale=3000.0)
    assert isinstance(strategy.base, DERpp)
    batch, before, xi = one.batch(1, 0, 6), weights(strategy), normal_numbers(one, strategy)
    twin = copy.deepcopy(strategy.model).double()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    (-F.cross_entropy(twin(batch.inputs.double()), batch.targets)).backward()
    optimizer.step()
    strategy.unlearn(batch)
    information = strategy.information.values()
    columns = zip(weights(strategy), before, twin.parameters(), xi, information, strict=True)
    for new, old, moved, x, f in columns:
        step = moved.detach() - old
        step = step * old.norm() / (step.norm() + 1e-20) + 0.001 * x
        expected = 1e-5 * step / (1 + 0.001 * f)
        resolution = 1e-7 * float(old.abs().max())  # of the weights: the step is 1e-5 of them
        torch.testing.assert_close((new - old).double(), expected, rtol=1e-2, atol=resolution)


@EVERY_BASE
def test_unlearning_raises_the_loss_by_what_the_gradient_says(
    bench: Make, base: GradientStrategy
) -> None:
    """γ gᵀ(F + d)⁻¹g to first order, for the loss that the base will see: same samples."""
    one = bench(memory_size=10, memory_batch_size=10)
    refreshed = Refresh(base=base, gamma=1e-3, noise=0, damping=0.1)
    strategy = started(one, refreshed, scale=1.0)
    batch = one.batch(0, 10, 10)
    low = strategy.base.loss(batch)
    slope = gradients(strategy, low)
    strategy.unlearn(batch)
    risen = float((strategy.base.loss(batch) - low).detach())
    information = strategy.information.values()
    expected = sum(
        float((1e-3 / (f + 0.1) * g.square()).sum())
        for f, g in zip(information, slope, strict=True)
    )
    assert risen > 0
    assert risen == pytest.approx(expected, rel=0.05)


def test_the_relative_step_is_a_part_of_the_norm_of_each_tensor(bench: Make) -> None:
    one = bench()
    strategy = started(one, Refresh(base=Replay(), form="relative", gamma=0.01, noise=0))
    batch = one.batch(0, 10, 10)
    before, low = weights(strategy), strategy.base.loss(batch)
    slope = gradients(strategy, low)
    strategy.unlearn(batch)
    for new, old, g in zip(weights(strategy), before, slope, strict=True):
        torch.testing.assert_close((new - old).norm(), 0.01 * old.norm(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            new - old, 0.01 * old.norm() * g / g.norm(), rtol=1e-3, atol=1e-6
        )
    assert strategy.base.loss(batch) > low


def test_a_tensor_without_a_gradient_gets_none_from_the_relative_step(bench: Make) -> None:
    """0/0 would be no number."""
    one = bench(nn.Sequential(nn.Flatten(), nn.Linear(36, 6), Unread()))
    strategy = started(one, Refresh(base=Finetune(), form="relative", gamma=0.1, noise=0))
    strategy.unlearn(one.batch(0, 0, 10))
    assert torch.equal(weights(strategy)[-1], torch.ones(3))
    assert all(w.isfinite().all() for w in weights(strategy))


class Unread(nn.Module):
    """Passes on what comes; has a parameter that plays no part."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_base_starts_from_where_unlearning_ends(bench: Make) -> None:
    """SGD: θ'' = θ' − lr ∇L(θ'), θ' being the unlearned weights, not those before."""
    one = bench()
    strategy = started(one, Refresh(base=Finetune(lr=0.2), gamma=1e-3, damping=0.1, noise=0.01))
    twin, batch = copy.deepcopy(strategy), one.batch(0, 10, 10)
    strategy.update(strategy.loss(batch))
    twin.unlearn(batch)
    slope = gradients(twin, twin.base.loss(batch))
    for new, old, g in zip(weights(strategy), weights(twin), slope, strict=True):
        torch.testing.assert_close(new, old - 0.2 * g)


def test_the_gradient_after_a_step_is_that_of_a_flatter_loss(bench: Make) -> None:
    """∇L(θ + γF̃⁻¹∇L) = ∇[L + ½γ ∇LᵀF̃⁻¹∇L] + O(γ²), F held constant."""
    one = bench()
    errors = []
    for gamma in (0.02, 0.01):
        strategy = started(one, Refresh(base=Finetune(), gamma=gamma, noise=0, damping=1.0), 1.0)
        batch, parameters = one.batch(0, 10, 10), list(strategy.model.parameters())
        loss = strategy.base.loss(batch)
        slope = torch.autograd.grad(loss, parameters, create_graph=True)
        information = strategy.information.values()
        steepness = sum(
            (g.square() / (f + 1)).sum() for g, f in zip(slope, information, strict=True)
        )
        expected = torch.autograd.grad(loss + gamma / 2 * steepness, parameters)
        found = gradients(strategy, strategy.loss(batch))
        plain = torch.cat([(a - b.detach()).flatten() for a, b in zip(found, slope, strict=True)])
        rest = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
        assert rest.norm() < 0.2 * plain.norm()
        errors.append(float(rest.norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_what_is_frozen_stays(bench: Make) -> None:
    one = bench()
    strategy = one.prepare(Refresh(base=Finetune(), gamma=0.1, damping=0.1))
    first, *rest = strategy.model.parameters()
    first.requires_grad_(False)
    before = weights(strategy)
    one.teach(strategy, 0)
    assert torch.equal(before[0], first)
    assert not any(torch.equal(a, b) for a, b in zip(before[1:], rest, strict=True))


# Traces.


def test_unlearning_leaves_no_trace_but_in_the_weights(bench: Make, restless: nn.Module) -> None:
    one = bench(restless, crop_padding=1)
    with seeded():
        strategy = started(one, Refresh(base=DERpp(), gamma=0.1, damping=0.1))
        context, model = strategy.context, strategy.model
        buffers = [b.clone() for b in model.buffers()]
        states = {k: g.get_state() for k, g in context.generators.items()}
        dropout, memory = torch.get_rng_state(), capture(strategy.base)["memory"]
        before = weights(strategy)
        strategy.unlearn(one.batch(1, 0, 10))
        assert not any(map(torch.equal, before, weights(strategy)))
        assert len(buffers) == 3
        assert all(map(torch.equal, buffers, model.buffers()))
        assert torch.equal(dropout, torch.get_rng_state())
        assert same(memory, capture(strategy.base)["memory"])
        moved = {
            k for k, g in context.generators.items() if not torch.equal(g.get_state(), states[k])
        }
    assert {name.partition("@")[0] for name in moved} == {"refresh.noise"}


def test_every_step_has_noise_of_its_own(bench: Make) -> None:
    """The random streams that are wound back are those of the loss only."""
    one = bench()
    strategy = started(one, Refresh(base=Finetune(), gamma=1e-8, damping=1.0, noise=1.0))
    batch, places = one.batch(0, 0, 10), [weights(strategy)[0]]
    for _ in range(2):
        strategy.unlearn(batch)
        places.append(weights(strategy)[0])
    first, second = places[1] - places[0], places[2] - places[1]
    cosine = F.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    assert abs(float(cosine)) < 4 / first.numel() ** 0.5


def test_streams_begun_in_a_pass_begin_again(bench: Make) -> None:
    context = bench().context()
    model = nn.Linear(2, 2)
    draws = []
    for _ in range(2):
        with unnoticed(model, context):
            draws.append(torch.rand(3, generator=context.generator("late")))
    draws.append(torch.rand(3, generator=context.generator("late")))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(("unlearned", "times"), [("objective", 3), ("arriving", 1)])
def test_both_passes_see_the_same_samples_of_the_memory(
    bench: Make,
    monkeypatch: pytest.MonkeyPatch,
    unlearned: Literal["objective", "arriving"],
    times: int,
) -> None:
    one = bench(memory_batch_size=4, crop_padding=2)
    strategy = started(one, Refresh(base=Replay(), unlearned=unlearned, unlearn_steps=2))
    memory = strategy.base.memory  # type: ignore[attr-defined]
    drawn: list[Tensor] = []
    draw = memory.draw

    def noted(n: int) -> Any:
        recalled = draw(n)
        drawn.append(recalled.inputs)
        return recalled

    monkeypatch.setattr(memory, "draw", noted)
    strategy.loss(one.batch(1, 0, 10))
    strategy.loss(one.batch(1, 0, 10))
    assert len(drawn) == 2 * times
    assert all(torch.equal(drawn[0], other) for other in drawn[:times])
    assert not torch.equal(drawn[0], drawn[times])


def test_stored_logits_are_those_of_the_base_s_own_step(bench: Make) -> None:
    """What DER keeps is the answer after unlearning, as in the released code."""
    one = bench()
    strategy = started(one, Refresh(base=DER(), gamma=0.05, damping=0.1))
    batch, kept = one.batch(0, 10, 10), strategy.memory_samples
    strategy.update(strategy.loss(batch))
    answers = strategy.base._logits  # type: ignore[attr-defined]
    strategy.observe(batch)
    stored = strategy.base.memory.extras["logits"][kept:]  # type: ignore[attr-defined]
    assert torch.equal(stored, answers)
    twin = started(one, Refresh(base=DER(), gamma=0.05, damping=0.1))
    twin.unlearn(batch)
    torch.testing.assert_close(stored, twin.base.forward(batch.inputs))


# The Fisher information.


@pytest.mark.parametrize("kind", ["exact", "empirical", "weighted", "batch"])
def test_what_is_known_of_old_experiences_decays(bench: Make, kind: Any) -> None:
    one = bench(batch_size=16)
    strategy = one.prepare(Refresh(base=Finetune(), decay=0.3, fisher=kind, fisher_samples=0))
    assert not any(f.any() for f in strategy.information.values())
    known = {name: torch.zeros_like(f) for name, f in strategy.information.items()}
    orders = one.context().generator("refresh.fisher")
    for index in (0, 1):
        one.teach(strategy, index)
        train = one.stream.experiences[index].train
        order = torch.randperm(len(train), generator=orders)
        found = diagonal_fisher(strategy.model, train, kind, order=order, batch_size=16)
        known = {name: 0.3 * f + found[name] for name, f in known.items()}
        for name, f in strategy.information.items():
            assert f.any()
            torch.testing.assert_close(f, known[name])


def test_some_samples_estimate_it(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import strategies.refresh

    orders: list[list[int]] = []

    def spy(*arguments: Any, order: Tensor, **options: Any) -> Any:
        orders.append(order.tolist())
        return diagonal_fisher(*arguments, order=order, **options)

    monkeypatch.setattr(strategies.refresh, "diagonal_fisher", spy)
    one = bench()
    one.learned(Refresh(base=Finetune(), fisher_samples=13), 0, 1)
    one.learned(Refresh(base=Finetune(), fisher_samples=0), 0)
    assert [len(set(order)) for order in orders] == [13, 13, 80]
    assert orders[0] != orders[1]
    assert sorted(orders[2]) == list(range(80))


def test_important_weights_are_moved_less(bench: Make) -> None:
    """In the second experience, by the Fisher information of the first."""
    one = bench()
    strategy = one.learned(Refresh(base=Finetune(), gamma=1e-7, noise=1.0, damping=1e-4), 0)
    strategy.begin(steps=1)
    before = weights(strategy)
    strategy.unlearn(one.batch(1, 0, 10))
    moves = torch.cat(
        [(a - b).abs().flatten() for a, b in zip(weights(strategy), before, strict=True)]
    )
    known = torch.cat([f.flatten() for f in strategy.information.values()])
    order = known.argsort()
    quarter = len(order) // 4
    assert known[order[-quarter:]].mean() > 1e-4  # of the size of the damping
    assert moves[order[-quarter:]].mean() < 0.8 * moves[order[:quarter]].mean()


# The command line.


def test_the_base_is_chosen_by_name(command: Command) -> None:
    done = command(
        *("scenario=digits", "scenario.epochs=1", "strategy=refresh"),
        *("strategy@strategy.base=er_ace", "strategy.base.lr=0.05", "progress=false"),
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    said = json.loads((folder / "result.json").read_text())["run"]
    assert folder.name.startswith("digits-refresh.er_ace-")
    assert (said["strategy"], said["base"]) == ("refresh", "er_ace")
    base = said["options"]["strategy"]["base"]
    assert base["_target_"] == "strategies.er_ace.ERACE"
    assert base["lr"] == 0.05


@pytest.mark.parametrize("name", ["finetune", "replay", "der", "derpp", "er_ace", "ewc", "lwf"])
def test_every_base_can_be_chosen(name: str) -> None:
    node = composed("strategy=refresh", f"strategy@strategy.base={name}")["strategy"]
    own = composed(f"strategy={name}")["strategy"]
    strategy = build(node, Refresh, "strategy")
    assert strategy.base == build(own, Strategy, "strategy")
    strategy.check(ToyScenario())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1e-3}, "gamma=-0.001 is out of range"),
        ({"damping": 0.0}, "damping=0.0 is out of range; it must be above 0"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"unlearn_steps": -1}, "unlearn_steps=-1"),
        ({"noise": -0.5}, "noise=-0.5"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Refresh(base=Finetune(), **options)
