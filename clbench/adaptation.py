"""What the methods of test-time adaptation share: a model, and a way back to how it came."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.samples import Batch
from clbench.state import capture, restore
from clbench.types import Context, Experience, Setting, Strategy, require


@dataclass(kw_only=True)
class Adaptation(Strategy, ABC):
    """A method that answers batches as they arrive without labels, and may learn from them.

    It says what it does with a batch in `adapt`, whose outputs are scored, and how it answers
    without learning in `predict`. Everything that it remembers is state like any strategy's, made
    in `prepare`, so `reset` can put it back: weights, batch statistics, optimizer, teacher,
    memory, averages, and the random streams.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.TEST_TIME_ADAPTATION})

    def setup(self, model: nn.Module, context: Context) -> None:
        self.model, self.context = model.eval(), context
        self.prepare()
        self._start = capture(self)
        self._drawn = {key: g.get_state() for key, g in context.generators.items()}

    def prepare(self) -> None:
        """Configures the model and makes all state, before the stream."""

    def learn(self, experience: Experience) -> None:
        """Nothing: no labels arrive."""

    @abstractmethod
    def adapt(self, batch: Batch) -> Tensor:
        """See `Strategy.adapt`."""

    def reset(self) -> None:
        restore(self, self._start)
        for key, generator in self.context.generators.items():
            if key in self._drawn:
                generator.set_state(self._drawn[key])
            else:
                generator.manual_seed(generator.initial_seed())

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the model as it is set, in fp32 whatever the precision of the run."""
        with self.context.autocast():
            outputs: Tensor = self.model(inputs)
        return outputs.float()


@dataclass(kw_only=True)
class GradientAdaptation(Adaptation, ABC):
    """Base of the methods that take gradient steps at test time.

    Attributes:
        lr: Learning rate.
        optimizer: "adam" (betas 0.9 and 0.999) or "sgd".
        momentum: Of SGD.
        weight_decay: L2 coefficient.
    """

    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(self, "lr", "momentum", "weight_decay", at_least=0)
        require(self, "momentum", at_most=1)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the hyper-parameters, in its fused form."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=True
            )
        return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay, fused=True)
