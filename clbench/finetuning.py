"""A few modules of a model, fine-tuned on stored samples: what methods that do so share."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.errors import Diverged, UserError
from clbench.nn.memory import Memory
from clbench.nn.sensitivity import Sensitivity, Unit
from clbench.samples import Batch, class_balanced
from clbench.training import Wrapper
from clbench.types import Context, Experience, Scenario, Strategy, require

#: Intervals in which change is measured where an experience has one epoch only.
INTERVALS = 4


@dataclass(kw_only=True)
class ModuleFinetuning(Wrapper, ABC):
    """Measures which modules a switch of experiences moves, and fine-tunes some on a memory.

    The memory is the base's, if it has one, else one of its own: `memory_size` samples in all.
    How modules are named and change is measured: `clbench.nn.sensitivity`, an interval being an
    epoch, or a quarter of an experience with one epoch. Only the base's own steps are measured.

    Attributes:
        modules: What is fine-tuned: what is most "sensitive" so far, "all", or a list of names,
            patterns such as `*.bn1*`, and kinds: convolution, linear, norm, statistics, other.
            The running statistics of a batch norm are a module, `<name>.statistics`: fine-tuned
            means estimated anew from the batches; else they stay, and are used.
        share: "sensitive": the modules with the highest scores that fit into this part of the
            model, in (0, 1], one module at least. Where scores are not known yet, or equal, the
            smallest come first.
        at_most: "sensitive": no more modules than this; 0: as many as fit.
        lr: Learning rate of the fine-tuning; null: the base's.
        schedule: Of that rate, within a fine-tuning: "cosine" to zero, or "constant".
    """

    modules: Literal["sensitive", "all"] | tuple[str, ...] = "sensitive"
    share: float = 0.05
    at_most: int = 0
    lr: float | None = None
    schedule: Literal["constant", "cosine"] = "cosine"

    def __post_init__(self) -> None:
        require(self, "share", above=0, at_most=1)
        require(self, "at_most", at_least=0)
        if self.lr is not None:
            require(self, "lr", above=0)
        if not self.modules:
            raise UserError(f"{type(self).__name__}: modules is empty; name one, or set it to all.")

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if not scenario.memory_size:
            raise UserError(
                f"{type(self).__name__} fine-tunes on stored samples, but scenario.memory_size=0."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.sensitivity = Sensitivity(self.model)
        self.finetuned = [0] * len(self.sensitivity.units)
        found = next((m for m in vars(self.base).values() if isinstance(m, Memory)), None)
        if found is None and keeps_samples(self.base):
            raise UserError(
                f"{type(self).__name__} can't read the samples that {type(self.base).__name__} "
                "keeps, and two memories would exceed scenario.memory_size. Choose another "
                "strategy.base."
            )
        size = context.scenario.memory_size if found is None else 0
        self.memory = Memory(size, context, name="finetuning")
        self._stored = self.memory if found is None else found
        self._matched = matching(self.sensitivity.units, self.modules)

    def begin(self, steps: int) -> None:
        super().begin(steps)
        epochs = self.context.scenario.epochs
        parts = epochs if epochs > 1 else INTERVALS
        self._steps, self._ends = 0, {part * steps // parts for part in range(1, parts + 1)}
        self.sensitivity.begin()

    def update(self, loss: Tensor) -> None:
        super().update(loss)
        self._steps += 1
        if self._steps in self._ends:
            self.sensitivity.mark()

    def after(self, experience: Experience) -> None:
        self.sensitivity.end()
        super().after(experience)

    def finetune(self, steps: int) -> None:
        """That many steps on class-balanced batches of the memory; only what is chosen moves.

        With a new optimizer of the base's kind, and as many samples in a batch as the scenario
        replays in a step.

        Raises:
            Diverged: If the loss was not finite; looked at after the last step.
        """
        if not (len(self._stored) and steps):
            return
        chosen = self.chosen()
        total = torch.zeros((), device=self.context.device)
        moving = [self.sensitivity.units[i] for i in chosen]
        with self.sensitivity.aside(), only(self.model, moving):
            parameters = self.base.trainable()
            # Where statistics alone are chosen, forward passes are all there is to do.
            optimizer = self.base.make_optimizer(parameters) if parameters else None
            for step, batch in enumerate(self.recalled(steps)):
                loss = self.finetune_loss(batch)
                total += loss.detach()
                if optimizer is None:
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = self.rate(step, steps)
                optimizer.zero_grad()
                self.context.differentiation.backward(loss)
                if self.base.clip:
                    nn.utils.clip_grad_norm_(parameters, self.base.clip)
                optimizer.step()
        if not math.isfinite(total.item()):
            raise Diverged(f"the fine-tuning loss is {total.item()}; lower strategy.lr")
        for i in chosen:
            self.finetuned[i] += 1

    def recalled(self, batches: int) -> Iterator[Batch]:
        """Class-balanced batches of the memory, augmented afresh; `index` holds the slots."""
        context, samples = self.context, self._stored.samples()
        size = min(context.memory_batch_size, len(samples))
        generator = context.generator("finetuning.recall")
        order = class_balanced(samples.targets, size, batches, generator)
        return samples.batches(order, size, context.generator("finetuning.augment"))

    def finetune_loss(self, batch: Batch) -> Tensor:
        """The loss of a step of a fine-tuning, a scalar: the objective."""
        return self.context.objective.loss(self.base.forward(batch.inputs), batch.targets)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, from 0, of a fine-tuning."""
        lr = self.base.lr if self.lr is None else self.lr
        if self.schedule == "constant":
            return lr
        return lr * 0.5 * (1 + math.cos(math.pi * step / steps))

    def chosen(self) -> list[int]:
        """Positions, among the units, of what a fine-tuning now would move."""
        units, trained = self.sensitivity.units, dict(self.model.named_parameters())
        able = [
            i
            for i in self._matched
            if units[i].kind == "statistics" or trained[units[i].tensors[0]].requires_grad
        ]
        if self.modules != "sensitive":
            return able
        return most_sensitive(units, self.sensitivity.scores(), able, self.share, self.at_most)

    @property
    def memory_samples(self) -> int:
        return self.base.memory_samples + len(self.memory)

    def facts(self) -> Mapping[str, Any]:
        rows = zip(self.sensitivity.facts(), self.finetuned, strict=True)
        measured = [{**fact, "finetuned": times} for fact, times in rows]
        return {**super().facts(), "sensitivity": measured}


def keeps_samples(base: Strategy) -> bool:
    """Whether a method says of itself that it stores samples of the stream."""
    return type(base).memory_samples is not Strategy.memory_samples


def matching(units: Sequence[Unit], modules: str | tuple[str, ...]) -> list[int]:
    """Positions of the units that the option `modules` allows, in the model's order.

    Raises:
        UserError: If an entry of a list matches none.
    """
    if isinstance(modules, str):
        return list(range(len(units)))
    found: set[int] = set()
    for entry in modules:
        matched = {i for i, u in enumerate(units) if u.kind == entry or fnmatchcase(u.name, entry)}
        if not matched:
            known = ", ".join(u.name for u in units)
            raise UserError(
                f"strategy.modules: no module matches '{entry}'. Use a name, a pattern such as "
                f"'*.bn1*' or a kind such as norm. There are: {known}."
            )
        found |= matched
    return sorted(found)


def most_sensitive(
    units: Sequence[Unit],
    scores: Sequence[float | None],
    able: Sequence[int],
    share: float,
    at_most: int,
) -> list[int]:
    """The units with the highest scores that together fit into a share of the model.

    Args:
        units: All of them.
        scores: Theirs; None: not known, after all others.
        able: Positions of those that can be chosen.
        share: Part of all numbers, in (0, 1].
        at_most: Units; 0: any number.

    Returns:
        Positions in the model's order. If none fits, the first in rank alone.
    """

    def rank(i: int) -> tuple[float, int]:
        score = scores[i]
        return (0.0 if score is None else -score, units[i].size)

    ranked = sorted(able, key=rank)
    room = share * sum(unit.size for unit in units)
    chosen: list[int] = []
    for i in ranked:
        if units[i].size <= room and (not at_most or len(chosen) < at_most):
            chosen.append(i)
            room -= units[i].size
    return sorted(chosen or ranked[:1])


@contextmanager
def only(model: nn.Module, chosen: Sequence[Unit]) -> Iterator[None]:
    """Training mode in which nothing but these units moves; afterwards all is as it was."""
    names = {name for unit in chosen for name in unit.tensors}
    others = [p for name, p in model.named_parameters() if p.requires_grad and name not in names]
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for path, module in model.named_modules():
        running = [name for name, _ in module.named_buffers(path, recurse=False)]
        if any(name.endswith("running_mean") and name not in names for name in running):
            module.training = False
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
