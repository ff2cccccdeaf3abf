"""The minibatch loop shared by every strategy that takes gradient steps."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import Diverged
from clbench.samples import Batch, Samples
from clbench.types import CLASSIFICATION, Context, Experience, Setting, Strategy, require


@dataclass(kw_only=True)
class GradientStrategy(Strategy, ABC):
    """A method that minimises a loss over minibatches.

    A method changes as few of these seams as it needs, each named for its moment:

    | seam | when | default |
    |---|---|---|
    | `before(experience)` | once, before the first step | nothing |
    | `loss(batch)` | every step | the objective on the batch |
    | `update(loss)` | every step | zero, backward, optimizer step |
    | `observe(batch)` | after every step, once for each arriving batch | nothing |
    | `after(experience)` | once, after the last step | nothing |

    `before` and `after` run in evaluation mode, the steps between in training mode.
    The optimizer is made anew for each experience, over the parameters that require gradients
    after `before`.

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

    def learn(self, experience: Experience) -> None:
        if experience.train is None:
            return
        self.before(experience)
        self.fit(experience.train)
        self.after(experience)

    def predict(self, batch: Batch) -> Tensor:
        training = self.model.training
        self.model.eval()
        outputs = self.forward(batch.inputs)
        self.model.train(training)
        return outputs

    # The seams.

    def before(self, experience: Experience) -> None:
        """Once, before the first step of an experience."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one step, a scalar."""
        return self.context.objective.loss(self.forward(batch.inputs), batch.targets)

    def update(self, loss: Tensor) -> None:
        """Turns the loss of one step into new weights."""
        self._optimizer.zero_grad()
        loss.backward()
        self.descend()

    def observe(self, batch: Batch) -> None:
        """After the steps on an arriving batch: what a memory keeps of it."""

    def after(self, experience: Experience) -> None:
        """Once, after the last step of an experience."""

    # What the seams are made of.

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the model, in fp32 whatever the precision of the run."""
        with self.context.autocast():
            outputs: Tensor = self.model(inputs)
        return outputs.float()

    def descend(self) -> None:
        """One optimizer step with the gradients that are there."""
        if self.clip:
            nn.utils.clip_grad_norm_(self.trainable(), self.clip)
        if self.schedule == "cosine":
            progress = self._step / self._steps
            for group in self._optimizer.param_groups:
                group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        self._step += 1
        self._optimizer.step()

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that require gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def fit(
        self, samples: Samples, epochs: int | None = None, batch_size: int | None = None
    ) -> None:
        """The loop: every batch of every epoch through `loss`, `update`, `observe`.

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
        total = torch.zeros((), device=self.context.device)
        for batch in self.context.batches(samples, epochs, size):
            for _ in range(scenario.passes):
                loss = self.loss(batch)
                self.update(loss)
                total += loss.detach()
            self.observe(batch)
        self.model.eval()
        if not math.isfinite(total.item()):
            raise Diverged(f"the training loss is {total.item()}: lower lr (now {self.lr:g})")

    def begin(self, steps: int) -> None:
        """Training mode, a new optimizer, and the learning-rate schedule over `steps` steps."""
        self.model.train()
        self._step, self._steps = 0, max(steps, 1)
        self._optimizer = self.make_optimizer(self.trainable())

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the hyper-parameters, in its fused form."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=True
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay, fused=True)
