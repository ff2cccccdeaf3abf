"""RDumb: another method that is put back to its start every so many batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from clbench.adaptation import Adaptation
from clbench.samples import Batch
from clbench.types import Context, Experience, Scenario, Setting, Strategy, require


@dataclass(kw_only=True)
class RDumb(Strategy):
    """Resets its base before batch N + 1, 2 N + 1, ...: the baseline of long streams.

    Press et al. 2023, "RDumb: A simple approach that questions our progress in continual test-time
    adaptation", NeurIPS, arXiv 2306.05401, and its code. Everything of the base goes back: weights,
    batch statistics, optimizer, averages, memory, random streams. Scored, and predicted with, is
    what the base says.

    **Differs from the paper:** the base may be any method; by default it is the paper's, ETA, with
    this suite's defaults for CIFAR (the paper's ImageNet has epsilon 0.05, SGD with lr 2.5e-4, and
    E₀ = ½ ln K − 1, for K = 1000 entropy_margin 0.355).

    Attributes:
        base: The method that is reset; `strategy@strategy.base=<name>` chooses it.
        reset_every: N, in batches.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.TEST_TIME_ADAPTATION})

    base: Adaptation
    reset_every: int = 1000

    def __post_init__(self) -> None:
        require(self, "reset_every", at_least=1)

    def setup(self, model: nn.Module, context: Context) -> None:
        self.base.setup(model, context)
        self.batches = 0

    def learn(self, experience: Experience) -> None:
        """Nothing: no labels arrive."""

    def adapt(self, batch: Batch) -> Tensor:
        if self.batches and self.batches % self.reset_every == 0:
            self.base.reset()
        self.batches += 1
        return self.base.adapt(batch)

    def predict(self, batch: Batch) -> Tensor:
        return self.base.predict(batch)

    def reset(self) -> None:
        self.base.reset()
        self.batches = 0

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        self.base.check(scenario)

    @property
    def memory_samples(self) -> int:
        return self.base.memory_samples

    def facts(self) -> Mapping[str, Any]:
        return self.base.facts()
