"""The minibatch loop shared by every strategy that takes gradient steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import Diverged, UserError
from clbench.samples import Batch, Samples
from clbench.types import (
    CLASSIFICATION,
    Context,
    Experience,
    Scenario,
    Setting,
    Strategy,
    require,
)


class Trainer(Strategy, ABC):
    """The loop, and the seams at which methods differ, each named for its moment.

    | seam | when |
    |---|---|
    | `before(experience)` | once, before the first step, in evaluation mode |
    | `material(experience)` | after it: the samples to go through |
    | `begin(steps)` | then: training mode, a new optimizer and schedule |
    | `batches(samples, ...)` | then: the batches of every epoch, in order |
    | `loss(batch)` | every step; complete, and without side effects on memories |
    | `update(loss)` | every step |
    | `observe(batch)` | after the steps on an arriving batch, once |
    | `after(experience)` | once, after the last step, in evaluation mode |
    """

    context: Context
    model: nn.Module

    def learn(self, experience: Experience) -> None:
        if experience.train is None:
            return
        self.before(experience)
        self.fit(self.material(experience))
        self.after(experience)

    def fit(
        self, samples: Samples, epochs: int | None = None, batch_size: int | None = None
    ) -> None:
        """Every batch of every epoch through `loss`, `update`, `observe`.

        Args:
            samples: What to learn from.
            epochs: Passes; default: the scenario's budget.
            batch_size: Default: the scenario's budget.

        Raises:
            Diverged: If the loss was not finite; looked at once, after the last step, because
                looking at every step would make a GPU wait.
        """
        scenario = self.context.scenario
        size = batch_size or scenario.batch_size
        epochs = scenario.epochs if epochs is None else epochs
        self.begin(steps=epochs * scenario.passes * -(-len(samples) // size))
        self._summed_loss = torch.zeros((), device=self.context.device)
        with self.context.resumable() as proceed:
            for batch in self.batches(samples, epochs, size):
                if not proceed():
                    continue
                for _ in range(scenario.passes):
                    loss = self.loss(batch)
                    self.update(loss)
                    self._summed_loss += loss.detach()
                self.observe(batch)
        self.model.eval()
        total = self._summed_loss.item()
        if not math.isfinite(total):
            raise Diverged(f"the training loss is {total}; lower the learning rate")

    @abstractmethod
    def before(self, experience: Experience) -> None:
        """Once, before the first step of an experience."""

    def material(self, experience: Experience) -> Samples:
        """What to learn an experience from: by default, its own samples."""
        assert experience.train is not None
        return experience.train

    def batches(self, samples: Samples, epochs: int, batch_size: int) -> Iterator[Batch]:
        """The arriving batches, ceil(len(samples) / batch_size) in each epoch; counts them."""
        return self.context.batches(samples, epochs, batch_size)

    @abstractmethod
    def begin(self, steps: int) -> None:
        """Training mode, a new optimizer, and the learning-rate schedule over `steps` steps."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one step, a scalar."""

    @abstractmethod
    def update(self, loss: Tensor) -> None:
        """Turns the loss of one step into new weights."""

    @abstractmethod
    def observe(self, batch: Batch) -> None:
        """After the steps on an arriving batch: what a memory keeps of it."""

    @abstractmethod
    def after(self, experience: Experience) -> None:
        """Once, after the last step of an experience."""


def has_own_loop(strategy: Strategy) -> bool:
    """Whether a method, or one that it wraps, learns otherwise than by the seams of `Trainer`."""
    if not isinstance(strategy, Trainer):
        return True
    kind = type(strategy)
    if kind.learn is not Trainer.learn or kind.fit is not Trainer.fit:
        return True
    return isinstance(strategy, Wrapper) and has_own_loop(strategy.base)


@dataclass(kw_only=True)
class GradientStrategy(Trainer, ABC):
    """A method that minimises a loss over minibatches; it changes as few seams as it needs.

    By default `loss` is the objective on the batch, `update` one optimizer step, and `before`,
    `observe` and `after` do nothing. The optimizer is made anew for each experience, over the
    parameters that require gradients after `before`.

    Attributes:
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: L2 coefficient (decoupled for AdamW).
        optimizer: "sgd", "adam" or "adamw".
        schedule: Of the learning rate within an experience: "constant", or "cosine" to zero.
        clip: Largest gradient norm; 0: no clipping.
    """

    settings: ClassVar[frozenset[Setting]] = CLASSIFICATION

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = 0.0

    def __post_init__(self) -> None:
        require(self, "lr", above=0)
        require(self, "momentum", at_least=0, at_most=1)
        require(self, "weight_decay", "clip", at_least=0)

    def setup(self, model: nn.Module, context: Context) -> None:
        self.model, self.context = model, context
        self.model.eval()

    def predict(self, batch: Batch) -> Tensor:
        # Module by module: a method may keep parts in evaluation mode while it trains.
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        outputs = self.forward(batch.inputs)
        for module in training:
            module.training = True
        return outputs

    def before(self, experience: Experience) -> None:
        """See `Trainer`."""

    def begin(self, steps: int) -> None:
        self.model.train()
        self._step, self._steps = 0, max(steps, 1)
        self._optimizer = self.make_optimizer(self.trainable())

    def loss(self, batch: Batch) -> Tensor:
        return self.context.objective.loss(self.forward(batch.inputs), batch.targets)

    def update(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        self.context.differentiation.backward(loss)
        self.descend()

    def observe(self, batch: Batch) -> None:
        """See `Trainer`."""

    def after(self, experience: Experience) -> None:
        """See `Trainer`."""

    # What the seams are made of.

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the model, in fp32 whatever the precision of the run."""
        with self.context.autocast():
            outputs: Tensor = self.model(inputs)
        return outputs.float()

    def descend(self) -> None:
        """One optimizer step with the gradients that are there.

        A cosine schedule starts, in each group of the optimizer, at the group's own rate.
        """
        if self.clip:
            nn.utils.clip_grad_norm_(self.trainable(), self.clip)
        if self.schedule == "cosine":
            progress = self._step / self._steps
            for group in self._optimizer.param_groups:
                start = group.setdefault("initial_lr", group["lr"])
                group["lr"] = start * 0.5 * (1 + math.cos(math.pi * progress))
        self._step += 1
        self._optimizer.step()

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that require gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the hyper-parameters, in its fused form."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=True
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay, fused=True)


@dataclass(kw_only=True)
class Wrapper(Trainer, ABC):
    """A method around another method; it changes one seam and leaves the rest to its base.

    Attributes:
        base: The wrapped method; `strategy@strategy.base=<name>` chooses it.
    """

    settings: ClassVar[frozenset[Setting]] = CLASSIFICATION

    base: GradientStrategy

    def setup(self, model: nn.Module, context: Context) -> None:
        self.base.setup(model, context)

    def predict(self, batch: Batch) -> Tensor:
        return self.base.predict(batch)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        self.base.check(scenario)
        if has_own_loop(self.base):
            raise UserError(
                f"{type(self).__name__} can't wrap {type(self.base).__name__}, which has a loop of "
                "its own. Choose another strategy.base."
            )

    def before(self, experience: Experience) -> None:
        self.base.before(experience)

    def material(self, experience: Experience) -> Samples:
        return self.base.material(experience)

    def begin(self, steps: int) -> None:
        self.base.begin(steps)

    def batches(self, samples: Samples, epochs: int, batch_size: int) -> Iterator[Batch]:
        return self.base.batches(samples, epochs, batch_size)

    def loss(self, batch: Batch) -> Tensor:
        return self.base.loss(batch)

    def update(self, loss: Tensor) -> None:
        self.base.update(loss)

    def observe(self, batch: Batch) -> None:
        self.base.observe(batch)

    def after(self, experience: Experience) -> None:
        self.base.after(experience)

    @property
    def context(self) -> Context:  # type: ignore[override]
        """The base's."""
        return self.base.context

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The base's."""
        return self.base.model

    @property
    def memory_samples(self) -> int:
        return self.base.memory_samples

    def facts(self) -> Mapping[str, Any]:
        return self.base.facts()
