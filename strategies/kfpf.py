"""k-FPF: k forgetting prioritized finetunings in place of replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.finetuning import ModuleFinetuning, keeps_samples
from clbench.samples import Batch
from clbench.types import LABELLED, Context, Scenario, Setting, require


@dataclass(kw_only=True)
class KFPF(ModuleFinetuning):
    """Learns the stream without replay, and k times fine-tunes the few modules that forget.

    Paper: Zhao, Zhou, Long, Jiang and Zhang 2023, "Does Continual Learning Equally Forget All
    Parameters?", ICML 2023, arXiv 2304.04158.

    Algorithm: the base, plain SGD, learns the stream while a reservoir fills. Of the N mini-batches
    of the whole stream, after number ⌊jN/k⌋, j = 1..k, so the last time at the very end and
    wherever experiences begin or end: with all modules but some S as they are, finetune_steps
    times θ_S ← θ_S − lr ∇L on a class-balanced batch of the reservoir, batch norms of S in
    training mode.

    L = CE(h(x), y), and for k-FPF-KD + distillation·MSE(h(x), z): z are the logits of x when it
    was stored, the mean is over the outputs of classes that had been met by then.

    N is the number of batches that the budget gives (`Context.stream_batches`): how long the
    stream is has to be known, how it divides into experiences has not.

    Attributes:
        base: The method that learns the stream; one that stores samples itself is refused.
        triggers: k; a stream of fewer batches than that has a fine-tuning after each.
        finetune_steps: Steps of each fine-tuning; 0: ⌊N / 2k⌋, half as many in all as the stream
            has batches, so that a run costs 1.5 passes for each sample where replay costs 2.
        distillation: Weight of the second term; above 0 it is k-FPF-KD.

    **Differs from the paper:** its text and code were not at hand, its abstract and notes on it
    were. The form of the score, the default choice of modules by it, k, the number of steps, the
    cosine, the share and the weight of the distillation are ours. z is of the augmented sample in
    training mode, and the memory is offered a sample in every epoch, as in the suite's DER. An
    optimizer of the base with momentum keeps it over a fine-tuning; only the base's own steps
    enter its learning-rate schedule.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    triggers: int = 10
    finetune_steps: int = 0
    distillation: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "triggers", at_least=1)
        require(self, "finetune_steps", "distillation", at_least=0)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if keeps_samples(self.base):
            raise UserError(
                f"kfpf takes the place of replay, but {type(self.base).__name__} stores samples "
                "itself. Choose another strategy.base, or strategy=fpf around this one."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        batches = context.stream_batches
        if not batches:
            raise UserError(
                "kfpf spreads its fine-tunings over the whole stream, and nobody says how long "
                "that is: Context.stream_batches is 0."
            )
        self._due = {j * batches // self.triggers for j in range(1, self.triggers + 1)} - {0}
        self.arrived = 0
        self.finetuned_after: list[int] = []
        self.met = torch.zeros(context.n_outputs, dtype=torch.bool, device=context.device)

    def begin(self, steps: int) -> None:
        batches = self.context.stream_batches
        if self.arrived + steps // self.context.scenario.passes > batches:
            raise UserError(
                f"kfpf: {type(self.base).__name__} takes more steps than the {batches} batches of "
                "the stream, so its end can't be planned. Choose another strategy.base."
            )
        super().begin(steps)

    def loss(self, batch: Batch) -> Tensor:
        if not self.distillation:
            return super().loss(batch)
        caught: list[Tensor] = []
        hook = self.model.register_forward_hook(lambda *call: caught.append(call[-1]))
        loss = super().loss(batch)
        hook.remove()
        # All methods pass the arriving batch first, by itself or before anything else.
        self._logits = caught[0][: len(batch)].detach().float()
        return loss

    def observe(self, batch: Batch) -> None:
        super().observe(batch)
        self.met[batch.targets[batch.targets >= 0]] = True
        extras = {}
        if self.distillation:
            extras["logits"] = self._logits.masked_fill(~self.met, -torch.inf)
        self.memory.add(batch, extras)
        self.arrived += 1
        if self.arrived in self._due:
            planned = self.context.stream_batches // (2 * self.triggers)
            self.finetune(self.finetune_steps or max(1, planned))
            self.finetuned_after.append(self.arrived)

    def finetune_loss(self, batch: Batch) -> Tensor:
        outputs = self.base.forward(batch.inputs)
        loss = self.context.objective.loss(outputs, batch.targets)
        if not self.distillation:
            return loss
        stored = self.memory.extras["logits"].index_select(0, batch.index)
        objective = self.context.objective
        now, then = (objective.predictions(h, batch.targets)[0] for h in (outputs, stored))
        known = then > -torch.inf
        squares = torch.where(known, now - then, 0).square()
        return loss + self.distillation * squares.sum() / known.sum()

    def facts(self) -> Mapping[str, Any]:
        return {**super().facts(), "finetuned_after": self.finetuned_after}
