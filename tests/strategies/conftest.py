"""What the oracle tests of strategies share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from clbench.samples import Batch
from clbench.testing import ToyDrift, ToyInstructions, ToyScenario
from clbench.text.encoding import Example
from clbench.text.instructions import Instructions
from clbench.types import Context, Scenario, Split, Strategy, Stream

S = TypeVar("S", bound=Strategy)


@dataclass
class Bench:
    """Runs strategies on a scenario without protocol, files and metrics.

    Attributes:
        scenario: The stream and the budget.
        model: What strategies start from, a copy each; None: the scenario's model.
        steps: Samples of every training step that was counted.
    """

    scenario: Scenario
    model: nn.Module | None = None

    def __post_init__(self) -> None:
        self.stream: Stream = self.scenario.stream(Split.EVALUATE, 0)
        self.steps: list[int] = []

    def context(self) -> Context:
        """What the engine would lend, seeded alike each time."""
        return Context(
            device=torch.device("cpu"),
            seed=0,
            scenario=self.scenario,
            objective=self.scenario.objective(),
            transform=self.stream.transform,
            n_outputs=self.stream.n_outputs,
            stream_batches=self.stream.batches(self.scenario),
            source=self.stream.source,
            on_step=self.steps.append,
        )

    def prepare(self, strategy: S) -> S:
        """A copy of the strategy, set up with a model that is the same for all."""
        strategy = copy.deepcopy(strategy)
        if self.model is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = self.scenario.model(0, self.stream)
        else:
            model = copy.deepcopy(self.model)
        strategy.setup(model, self.context())
        return strategy

    def teach(self, strategy: Strategy, *experiences: int) -> None:
        """Lets a strategy that is set up learn some experiences; default: all."""
        for index in experiences or range(len(self.stream.experiences)):
            if strategy.revisits:
                vars(strategy)["context"].seen = list(self.stream.experiences[: index + 1])
            strategy.learn(self.stream.experiences[index])

    def learned(self, strategy: S, *experiences: int) -> S:
        """`prepare`, then `teach`."""
        strategy = self.prepare(strategy)
        self.teach(strategy, *experiences)
        return strategy

    def batch(self, experience: int, start: int, size: int) -> Batch:
        """Some training samples of an experience, not augmented."""
        train = self.stream.experiences[experience].train
        assert train is not None
        return train.take(torch.arange(start, start + size))

    def arriving(self, experience: int = 0, size: int = 0) -> list[Batch]:
        """What arrives without labels in an experience, in batches; default: the scenario's."""
        samples = self.stream.arrivals[experience].samples
        order = torch.arange(len(samples))
        batches = samples.batches(order, size or self.scenario.batch_size)
        return [batch.unlabelled() for batch in batches]

    def outputs(self, strategy: Strategy) -> Tensor:
        """What a strategy answers on all test samples."""
        whole = [t.take(torch.arange(len(t))).unlabelled() for t in self.stream.tests]
        with torch.no_grad():
            return torch.cat([strategy.predict(batch) for batch in whole])


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """Makes a bench from options of the toy scenario; `model` starts every strategy."""

    def make(model: nn.Module | None = None, **options: int) -> Bench:
        return Bench(ToyScenario(**options), model)  # type: ignore[arg-type]

    return make


@pytest.fixture
def drift() -> Callable[..., Bench]:
    """Makes a bench of test-time adaptation from options of its toy scenario."""

    def make(model: nn.Module | None = None, **options: Any) -> Bench:
        return Bench(ToyDrift(**options), model)

    return make


@pytest.fixture
def instructions() -> Callable[..., Bench]:
    """Makes a bench of instruction tuning from options of its toy scenario."""
    pytest.importorskip("peft", reason="the extra `text` is not installed")

    def make(**options: Any) -> Bench:
        return Bench(ToyInstructions(**options))

    return make


@dataclass(kw_only=True)
class Worded(ToyInstructions):
    """The toy's tasks, asked for in words, in this order."""

    template: str = "{instruction}: {input}"
    words: tuple[str, ...] = ("apple", "plum", "pear")

    def instructions(self, split: Split) -> Instructions:
        found = super().instructions(split)

        def reworded(examples: Sequence[Example], word: str) -> list[Example]:
            return [replace(e, instruction=f"of the {word}") for e in examples]

        parts = [
            replace(p, train=reworded(p.train, word), test=reworded(p.test, word))
            for p, word in zip(found.parts, self.words, strict=True)
        ]
        return replace(found, parts=parts, ordered=True)


@pytest.fixture
def worded() -> Callable[..., Bench]:
    """Makes a bench of instruction tuning whose tasks are known by the words in `words`."""
    pytest.importorskip("peft", reason="the extra `text` is not installed")

    def make(**options: Any) -> Bench:
        return Bench(Worded(**options))

    return make


@pytest.fixture
def normalised() -> nn.Module:
    """A model for the toy scenario whose outputs depend on who else is in the batch."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(36, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6)
        )


@pytest.fixture
def same_weights() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two models agree in every bit."""

    def same(one: nn.Module, two: nn.Module) -> bool:
        a, b = one.state_dict(), two.state_dict()
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    return same
