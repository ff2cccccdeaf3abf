"""What a strategy remembers is saved and put back; what it can't save, it says."""

from __future__ import annotations

import copy
import io
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.memory import Memory
from clbench.samples import Batch
from clbench.state import capture, restore
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy, Wrapper
from clbench.types import Context, Experience, Split


@dataclass(kw_only=True)
class Rich(GradientStrategy):
    """Has an attribute of every kind."""

    rates: list[float] = field(default_factory=list)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.memory = Memory(9, context)
        self.optimizer_kept = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        self.generator = context.generator("mine")
        self.importance = torch.zeros(3)
        self.scale = torch.ones(2, requires_grad=True)
        self.count, self.name, self.flag, self.nothing = 0, "", False, None
        self.means: dict[int, Tensor] = {}
        self.history: list[Any] = []
        self.pair = (0, torch.zeros(1))
        self._scratch = object()

    def after(self, experience: Experience) -> None:
        self.importance += torch.rand(3, generator=self.generator)
        with torch.no_grad():
            self.scale *= 2
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer_kept.step()
        self.count, self.name, self.flag = self.count + 1, experience.name, True
        self.means[experience.index] = torch.rand(2, generator=self.generator)
        self.history.append([experience.index, {"mean": self.means[experience.index]}])
        self.pair = (self.count, self.importance.clone())

    def observe(self, batch: Batch) -> None:
        self.memory.add(batch)


@dataclass(kw_only=True)
class Around(Wrapper):
    """Wraps, and has a state of its own."""

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.calls = 0

    def observe(self, batch: Batch) -> None:
        super().observe(batch)
        self.calls += 1


SCENARIO = ToyScenario(per_class=10, epochs=1)
STREAM = SCENARIO.stream(Split.EVALUATE, 0)


def ready(strategy: Rich | Around | Odd, *experiences: int) -> Any:
    context = Context(
        device=torch.device("cpu"),
        seed=0,
        scenario=SCENARIO,
        objective=SCENARIO.objective(),
        transform=STREAM.transform,
        n_outputs=STREAM.n_outputs,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        strategy.setup(SCENARIO.model(0, STREAM), context)
    for index in experiences:
        strategy.learn(STREAM.experiences[index])
    return strategy


def context_of(strategy: Any) -> Context:
    context = strategy.context
    assert isinstance(context, Context)
    return context


def through_a_file(state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("wrapped", [False, True])
def test_comes_back_after_a_file(wrapped: bool) -> None:
    def make() -> Rich | Around:
        return Around(base=Rich(rates=[0.5])) if wrapped else Rich(rates=[0.5])

    one = ready(make(), 0, 1)
    state = through_a_file(capture(one))
    two = ready(make())
    assert not same(capture(two), state)
    restore(two, state)
    assert same(capture(two), state)
    # The context's generators are saved by the loop; given these, both go on alike.
    for key, generator in context_of(one).generators.items():
        purpose, _, kind = key.rpartition("@")
        own = context_of(two).generator(purpose, torch.device(kind))
        own.set_state(generator.get_state())
    for strategy in (one, two):
        strategy.learn(STREAM.experiences[2])
    assert same(capture(one), capture(two))


def test_options_context_and_scratch_are_no_state() -> None:
    state = capture(ready(Rich(rates=[0.5]), 0))
    assert {"model", "memory", "optimizer_kept", "generator", "importance", "scale"} <= set(state)
    assert not {"rates", "lr", "context", "_scratch", "_optimizer", "_step"} & set(state)


def test_a_wrapped_strategy_s_state_is_inside() -> None:
    state = capture(ready(Around(base=Rich()), 0))
    assert set(state) == {"base", "calls"}
    assert state["calls"] == 2
    assert state["base"]["count"] == 1


def test_captured_state_does_not_change_with_the_strategy() -> None:
    strategy = ready(Rich(), 0)
    state = capture(strategy)
    before = through_a_file(state)
    strategy.learn(STREAM.experiences[1])
    assert same(state, before)


def test_restored_state_does_not_change_with_the_strategy() -> None:
    """So that it can be restored again, as a reset does."""
    one = ready(Rich(rates=[0.5]), 0, 1)
    state = capture(one)
    kept = copy.deepcopy(state)
    restore(one, state)
    one.learn(STREAM.experiences[2])
    one.memory.add(SCENARIO.stream(Split.EVALUATE, 0).tests[0].take(torch.arange(4)))
    assert not same(capture(one), kept)
    assert same(state, kept)


def test_a_trained_tensor_stays_the_one_that_is_trained() -> None:
    one = ready(Rich(), 0)
    two = ready(Rich())
    scale = two.scale
    restore(two, through_a_file(capture(one)))
    assert two.scale is scale
    assert two.scale.requires_grad
    assert torch.equal(two.scale, torch.full((2,), 2.0))


class Odd(Rich):
    """Gets an attribute that can't be saved."""


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "odd is a object"),
        ({1, 2}, "odd is a set"),
        (deque([1]), "odd is a deque"),
        ([1, {"a": (2, print)}], r"odd\[1\]\['a'\]\[1\] is a builtin"),
        ([nn.Linear(1, 1)], r"odd\[0\] is a Linear"),
        ({"a": torch.Generator()}, r"odd\['a'\] is a Generator"),
    ],
)
def test_what_can_t_be_saved_is_named(value: Any, named: str) -> None:
    strategy = ready(Odd())
    strategy.odd = value
    with pytest.raises(TypeError, match=rf"{named}.* can't be saved.*underscore"):
        capture(strategy)


def test_modules_in_a_module_list_can_be_saved() -> None:
    strategy = ready(Odd())
    strategy.odd = nn.ModuleList([nn.Linear(1, 1)])
    assert set(capture(strategy)["odd"]) == {"0.weight", "0.bias"}


def test_state_of_another_strategy_is_refused() -> None:
    state = capture(ready(Rich(), 0))
    del state["importance"]
    state["other"] = 1
    with pytest.raises(ValueError, match="Rich: saved state differs in importance, other"):
        restore(ready(Rich()), state)


class OwnLoop(Rich):
    """Goes round the seams that a wrapper changes."""

    def learn(self, experience: Experience) -> None:
        super().learn(experience)


def test_a_base_with_a_loop_of_its_own_is_refused() -> None:
    Around(base=Rich()).check(SCENARIO)
    with pytest.raises(UserError, match="Around can't wrap OwnLoop, which has a loop of its own"):
        Around(base=OwnLoop()).check(SCENARIO)
