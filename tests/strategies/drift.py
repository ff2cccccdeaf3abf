"""Methods of test-time adaptation on batches that a test can see, without protocol and files."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from clbench.adaptation import Adaptation
from clbench.samples import Batch
from clbench.testing import ToyDrift
from clbench.types import Context, Split, Stream

A = TypeVar("A", bound=Adaptation)


@dataclass
class Drift:
    """Sets up methods on the toy stream, each with a copy of the same model.

    Attributes:
        scenario: The stream.
        model: What methods start from; None: the scenario's.
        n_outputs: Of the model; 0: the stream's.
    """

    scenario: ToyDrift = field(default_factory=ToyDrift)
    model: nn.Module | None = None
    n_outputs: int = 0

    def __post_init__(self) -> None:
        self.stream: Stream = self.scenario.stream(Split.EVALUATE, 0)
        if self.model is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.model = self.scenario.model(0, self.stream)

    def context(self) -> Context:
        """What the engine would lend, seeded alike each time."""
        return Context(
            device=torch.device("cpu"),
            seed=0,
            scenario=self.scenario,
            objective=self.scenario.objective(),
            transform=self.stream.transform,
            n_outputs=self.n_outputs or self.stream.n_outputs,
            source=self.stream.source,
        )

    def prepare(self, strategy: A) -> A:
        """A copy of the strategy, set up."""
        strategy = copy.deepcopy(strategy)
        strategy.setup(self.fresh(), self.context())
        return strategy

    def fresh(self) -> nn.Module:
        """A copy of the model before adaptation."""
        assert self.model is not None
        return copy.deepcopy(self.model).eval()

    def batches(self, domain: int = 0) -> list[Batch]:
        """What arrives in a domain, without labels."""
        samples = self.stream.arrivals[domain].samples
        order = torch.arange(len(samples))
        return [b.unlabelled() for b in samples.batches(order, self.scenario.batch_size)]


def batch_of(inputs: Tensor) -> Batch:
    """Unlabelled inputs as they stand."""
    return Batch(inputs, torch.empty(0, dtype=torch.int64), inputs, torch.arange(len(inputs)))
