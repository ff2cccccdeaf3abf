"""Runs that train together: what each learns is what it learns alone, and who is not together."""

from __future__ import annotations

import copy
import json
import logging
import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suite import Command, composed, configured
from torch import Tensor, nn

from clbench import protocol
from clbench.conditions import Conditions
from clbench.config import build
from clbench.errors import Interrupted, UserError
from clbench.nn.backbones import MLP, Backbone, ConvNet
from clbench.nn.heads import Classifier
from clbench.population.companion import present
from clbench.population.pool import Population
from clbench.population.reading import Unlike, read
from clbench.results import Result
from clbench.testing import ToyScenario, toy_for
from clbench.training import GradientStrategy, Wrapper, has_own_loop
from clbench.types import Scenario, Setting, Strategy, Stream
from strategies.derpp import DERpp
from strategies.finetune import Finetune
from strategies.hft import HFT
from strategies.lwf import LwF
from strategies.refresh import Refresh
from strategies.replay import Replay
from strategies.si import SI

#: Largest difference of a weight at the end of a toy stream, fp32, weights of size 0.1 to 1: what
#: sums in another order come to after some dozens of steps.
TOLERANCE = 1e-4
LEARNED = ("train_samples", "forward_samples", "backward_samples", "memory_samples")

#: A strategy and what it learns, for each run.
Plan = Callable[[int], tuple[Strategy, Scenario]]


@dataclass
class Learned:
    """What came of a run."""

    result: Result
    state: dict[str, Tensor]


def suited(name: str) -> Strategy:
    return build(composed(f"strategy={name}")["strategy"], Strategy, "strategy")


def learn(plan: Plan, number: int, device: Any = "cpu") -> Learned:
    strategy, scenario = plan(number)
    conditions = Conditions(seed=number, device=device, threads=1)
    result = protocol.run(scenario, strategy, conditions)
    model: nn.Module = strategy.model  # type: ignore[attr-defined]
    return Learned(result, {k: v.detach().clone() for k, v in model.state_dict().items()})


def alone(plan: Plan, count: int) -> list[Learned]:
    return [learn(plan, number) for number in range(count)]


def together(plan: Plan, count: int, size: int | None = None) -> tuple[list[Learned], Population]:
    with Population(size or count) as pool:
        found = list(pool.map(lambda number: learn(plan, number), range(count)))
    assert all(isinstance(one, Learned) for one in found)
    return found, pool  # type: ignore[return-value]


def difference(one: Learned, other: Learned) -> float:
    pairs = ((one.state[name], other.state[name]) for name in one.state)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def assert_alike(some: Sequence[Learned], others: Sequence[Learned], within: float) -> None:
    for one, other in zip(some, others, strict=True):
        assert difference(one, other) <= within
        assert one.result.accuracy_matrix == other.result.accuracy_matrix
        assert [one.result.costs[k] for k in LEARNED] == [other.result.costs[k] for k in LEARNED]


def tried(strategy: Strategy, number: int) -> Strategy:
    """The strategy as another trial has it: another learning rate."""
    mine = copy.deepcopy(strategy)
    inner = mine.base if isinstance(mine, Wrapper) else mine
    assert isinstance(inner, GradientStrategy)
    inner.lr *= 1 + 0.5 * number
    return mine


def toy(backbone: Backbone | None = None) -> ToyScenario:
    return ToyScenario(backbone=backbone or MLP(hidden=(16,)), epochs=1, per_class=25)


@pytest.mark.parametrize("name", configured("strategy"))
def test_every_strategy_learns_what_it_learns_alone(name: str) -> None:
    strategy = suited(name)
    if has_own_loop(strategy):
        with pytest.raises(UserError, match="a loop of its own"):
            Population.check(strategy)
        return
    Population.check(strategy)
    if strategy.settings == {Setting.INSTRUCTION_TUNING}:
        pytest.importorskip("transformers", reason="the extra `text` is not installed")
    scenario = toy_for(strategy)
    scenario = replace(scenario, epochs=1)
    if isinstance(scenario, ToyScenario):
        scenario = replace(scenario, per_class=15)

    def plan(number: int) -> tuple[Strategy, Scenario]:
        return tried(strategy, number), copy.deepcopy(scenario)

    found, pool = together(plan, 2)
    assert_alike(found, alone(plan, 2), TOLERANCE if pool.shared else 0)


@pytest.mark.parametrize(
    "varied",
    [
        pytest.param(lambda i: Replay(lr=0.05 * (i + 1), momentum=0.3 * i), id="replay"),
        pytest.param(lambda i: DERpp(lr=0.05, alpha=0.1 * i, beta=0.5 / (i + 1)), id="derpp"),
        pytest.param(lambda i: suited("ewc") if i else suited("ewc_online"), id="ewc"),
        pytest.param(lambda i: LwF(lwf_lambda=1.0 + i, temperature=2.0 + i), id="lwf"),
        pytest.param(lambda i: SI(si_c=0.5 + i, clip=1.0 * i), id="si"),
        pytest.param(lambda i: HFT(base=Replay(weight_decay=0.01 * i), ratio=0.5), id="hft"),
        pytest.param(lambda i: Refresh(base=Replay(), gamma=1e-6, noise=0.1 * i), id="refresh"),
    ],
)
def test_runs_differ_in_hyperparameters_and_stay_what_they_are(
    varied: Callable[[int], Strategy],
) -> None:
    def plan(number: int) -> tuple[Strategy, Scenario]:
        return varied(number), toy()

    found, pool = together(plan, 3)
    assert_alike(found, alone(plan, 3), TOLERANCE)
    assert pool.shared > pool.alone  # a Fisher information is a run's own business


def test_batch_norms_keep_statistics_of_their_own() -> None:
    def plan(number: int) -> tuple[Strategy, Scenario]:
        return DERpp(lr=0.05 * (number + 1)), toy(ConvNet(widths=(4, 8)))

    found, pool = together(plan, 3)
    assert_alike(found, alone(plan, 3), TOLERANCE)
    assert pool.shared
    names = [name for name in found[0].state if name.endswith("running_var")]
    assert names
    assert all(not torch.equal(found[0].state[name], found[1].state[name]) for name in names)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_on_a_gpu_runs_learn_what_they_learn_alone() -> None:
    def work(number: int) -> Learned:
        backbone = ConvNet(widths=(4, 8))
        return learn(lambda i: (DERpp(lr=0.05 * (i + 1)), toy(backbone)), number, "cuda")

    with Population(3) as pool:
        found = [one for one in pool.map(work, range(3)) if isinstance(one, Learned)]
    assert pool.shared
    for one, other in zip(found, map(work, range(3)), strict=True):
        assert difference(one, other) <= TOLERANCE


def test_steps_that_fit_no_other_run_are_taken_alone() -> None:
    """Short last batches, batches and streams of other sizes, one run long after the others."""

    def plan(number: int) -> tuple[Strategy, Scenario]:
        scenario = replace(toy(), per_class=(20, 20, 23, 37)[number], batch_size=10 + number // 3)
        return Replay(), scenario

    found, pool = together(plan, 4)
    assert_alike(found, alone(plan, 4), TOLERANCE)
    assert pool.shared
    assert pool.alone


def test_more_work_than_places_is_done_in_order() -> None:
    def plan(_: int) -> tuple[Strategy, Scenario]:
        return Finetune(), toy()

    found, pool = together(plan, 5, size=2)
    assert_alike(found, alone(plan, 5), TOLERANCE)
    assert pool.shared


@dataclass(kw_only=True)
class Other(ToyScenario):
    """A toy with another model."""

    backbone: Backbone = field(default_factory=MLP)
    kind: str

    def model(self, seed: int, stream: Stream) -> nn.Module:
        return {"dropout": dropping, "double": double}[self.kind](super().model(seed, stream))


def dropping(model: nn.Module) -> nn.Module:
    """Draws at random in training."""
    assert isinstance(model, Classifier)
    model.head = nn.Sequential(nn.Dropout(0.2), model.head)
    return model


def double(model: nn.Module) -> nn.Module:
    """In double precision, so that rounding is no excuse."""
    model.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model


class Precise(Finetune):
    """Leaves outputs as they are."""

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model(inputs)
        return out


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_in_double_precision_there_is_no_difference(optimizer: Any) -> None:
    def plan(number: int) -> tuple[Strategy, Scenario]:
        strategy = Precise(lr=0.01 * (number + 1), optimizer=optimizer, weight_decay=0.01)
        return strategy, Other(kind="double", backbone=MLP(hidden=(16,)), epochs=2, per_class=15)

    found, pool = together(plan, 2)
    assert_alike(found, alone(plan, 2), 1e-10)
    assert pool.shared
    assert not pool.alone


def test_what_draws_at_random_is_called_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    def plan(_: int) -> tuple[Strategy, Scenario]:
        return Replay(), Other(kind="dropout", epochs=1, per_class=10)

    with caplog.at_level(logging.WARNING):
        found, pool = together(plan, 2)
    assert_alike(found, alone(plan, 2), 0)
    assert not pool.shared
    assert "one by one" in caplog.text


class Impatient(Finetune):
    """Looks at gradients without asking for them where others could join."""

    def update(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        self.descend()


class Overwriting(Finetune):
    """Changes outputs in place."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).mul_(2.0)


@pytest.mark.parametrize("kind", [Impatient, Overwriting])
def test_a_run_may_do_with_outputs_what_it_likes(kind: type[Finetune]) -> None:
    def plan(number: int) -> tuple[Strategy, Scenario]:
        return kind(lr=0.05 * (number + 1)), toy()

    found, pool = together(plan, 3)
    assert_alike(found, alone(plan, 3), TOLERANCE)
    assert pool.shared


class Failing(Finetune):
    """Raises in its second experience."""

    def after(self, experience: Any) -> None:
        if experience.index == 1:
            raise ValueError("out of luck")


def test_a_run_that_fails_leaves_the_others_alone() -> None:
    def plan(number: int) -> tuple[Strategy, Scenario]:
        return (Failing if number == 1 else Finetune)(), toy()

    def work(number: int) -> Learned | str:
        try:
            return learn(plan, number)
        except ValueError as error:
            return str(error)

    with Population(3) as pool:
        first, second, third = pool.map(work, range(3))
    assert second == "out of luck"
    assert isinstance(first, Learned)
    assert isinstance(third, Learned)
    assert_alike([first], [learn(plan, 0)], TOLERANCE)
    assert_alike([third], [learn(plan, 2)], TOLERANCE)
    with Population(3) as pool, pytest.raises(ValueError, match="out of luck"):
        list(pool.map(lambda number: learn(plan, number), range(3)))


def test_runs_end_when_nobody_waits_for_them() -> None:
    ended: list[int] = []

    def plan(number: int) -> tuple[Strategy, Scenario]:
        return Finetune(), replace(toy(), epochs=1 if number == 0 else 100)

    def work(number: int) -> None:
        try:
            learn(plan, number)
        except Interrupted:
            ended.append(number)
            raise

    before = threading.active_count()
    with Population(3) as pool:
        answers = pool.map(work, range(3))
        next(answers)
        answers.close()  # type: ignore[attr-defined]
    assert ended == [1, 2]
    assert threading.active_count() == before


def drawn_next() -> list[float]:
    """What every global generator would draw, without drawing it."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    drawn = [torch.rand(()).item(), random.random(), float(np.random.rand())]
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    return drawn


def test_global_generators_are_each_run_s_own() -> None:
    model = nn.Linear(2, 1)

    def work(number: int) -> list[float]:
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)
        drawn = []
        for _ in range(3):
            mine = copy.deepcopy(model)
            present().adopt(mine)
            mine(torch.ones(1, 2))
            drawn += [torch.rand(()).item(), random.random(), float(np.random.rand())]
        return drawn

    before = drawn_next()
    with Population(3) as pool:
        found = list(pool.map(work, range(3)))
    assert before == drawn_next()
    with Population(1) as pool:
        assert found == [next(iter(pool.map(work, [number]))) for number in range(3)]


def test_too_little_memory_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("clbench.population.stack.call", full)

    def plan(_: int) -> tuple[Strategy, Scenario]:
        return Finetune(), toy()

    with Population(2) as pool, pytest.raises(UserError, match="Set population to a smaller"):
        list(pool.map(lambda number: learn(plan, number), range(2)))


def small(**attributes: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for name, value in attributes.items():
        setattr(model[0], name, value)
    return model


def key(model: nn.Module, rows: int = 4) -> Any:
    return read(model, torch.ones(rows, 3)).key


def test_models_are_called_as_one_only_where_nothing_but_their_numbers_differs() -> None:
    assert key(small()) == key(small())
    assert key(small()) != key(small().eval())
    assert key(small()) != key(small(), rows=5)
    assert key(small()) != key(small().double())
    assert key(small(scale=2)) != key(small(scale=3))
    assert key(small(scale=2)) != key(small(scale=2.0))
    assert key(small(sizes=[1, 2])) == key(small(sizes=[1, 2]))
    tied, untied = small(), small()
    tied.append(nn.Linear(3, 3))
    untied.append(nn.Linear(3, 3))
    tied[3].weight = tied[0].weight
    assert key(tied) != key(untied)
    plain = key(small())
    with torch.no_grad():
        assert key(small()) != plain
    with torch.autocast("cpu", torch.bfloat16):
        assert key(small()) != plain
    hidden = small()
    hidden.register_buffer("more", torch.ones(1))
    assert key(hidden) != key(small())


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda m: m[0].register_forward_hook(lambda *_: None), id="hook"),
        pytest.param(lambda m: setattr(m[0], "mask", torch.ones(3)), id="tensor"),
        pytest.param(lambda m: setattr(m[0], "other", object()), id="object"),
        pytest.param(lambda m: setattr(m[0], "call", lambda: m), id="closure"),
    ],
)
def test_what_can_t_be_compared_is_called_alone(spoil: Callable[[Any], Any]) -> None:
    model = small()
    spoil(model)
    with pytest.raises(Unlike):
        key(model)


def test_calls_within_transforms_and_on_inputs_with_gradients_are_left_alone() -> None:
    model = small().eval()
    with pytest.raises(Unlike):
        read(model, torch.ones(4, 3, requires_grad=True))
    with torch.inference_mode(), pytest.raises(Unlike):
        key(model)

    def one(x: Tensor) -> Tensor:
        with pytest.raises(Unlike):
            read(model, x[None])
        return x

    torch.func.vmap(one)(torch.ones(4, 3))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(Unlike):
                read(self.inner, x)
            return x

    torch.func.functional_call(
        Reads(), {f"inner.{name}": w for name, w in weights.items()}, (torch.ones(4, 3),)
    )


SMALL = (
    "scenario=digits",
    "scenario.epochs=1",
    "strategy=replay",
    "budget=small",
    "budget.trials=3",
    "budget.tuning_seeds=1",
    "budget.seeds=2",
    "device=cpu",
)


def rows(folder: Path) -> list[dict[str, Any]]:
    """What every run says, by what was asked of it."""
    found = [json.loads(file.read_text()) for file in folder.glob("runs/*/result.json")]
    return sorted(found, key=lambda r: json.dumps([r["run"]["options"], r["run"]["seed"]]))


def test_trials_and_seeds_train_together(command: Command, work: Path) -> None:
    done = command("phase=benchmark", *SMALL, "population=3", "results_dir=many")
    assert done.returncode == 0, done.stderr
    assert re.search(r"population=3: \d+% of \d+ calls of models were shared", done.stderr)
    assert command("phase=benchmark", *SMALL, "results_dir=one").returncode == 0
    many, one = rows(work / "many"), rows(work / "one")
    assert len(many) == len(one) == 5
    for mine, other in zip(many, one, strict=True):
        assert mine["run"].pop("population") == 3
        assert mine["run"]["run_id"] != other["run"]["run_id"]
        assert mine["accuracy_matrix"] == other["accuracy_matrix"]
    again = command("phase=evaluate", *SMALL, "population=3", "results_dir=many")
    assert again.stderr.count("(was there)") == 2
    single = command("phase=evaluate", *SMALL, "results_dir=many")
    assert single.returncode == 0, "a study is found whatever the population"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("phase=run", "population=2"), "phase=tune|evaluate|benchmark"),
        (("phase=tune", "population=2", "workers=2"), "Set population=0"),
        (("phase=tune", "population=2", "timeout=9"), "Set population=0"),
        (("phase=tune", "population=2", "tracker=tensorboard"), "Set population=0"),
        (("phase=tune", "population=some"), "give a number of runs"),
        (("phase=tune", "population=2", "strategy=gdumb"), "a loop of its own"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    command: Command, options: tuple[str, ...], word: str
) -> None:
    done = command("scenario=digits", "device=cpu", *options)
    assert done.returncode == 2
    assert word in done.stderr


def test_on_a_cpu_the_suite_chooses_processes_and_says_so(command: Command, work: Path) -> None:
    done = command("phase=evaluate", "untuned=true", *SMALL, "population=auto")
    assert done.returncode == 0, done.stderr
    assert "population=auto: each run trains by itself here; workers=N" in done.stderr
    assert all("population" not in found["run"] for found in rows(work / "results"))
