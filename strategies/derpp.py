"""DER++: dark experience replay with labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nn.memory import Memory
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import LABELLED, Context, Setting, require


@dataclass(kw_only=True)
class DERpp(GradientStrategy):
    """Replays stored samples twice: against the logits they had and against their labels.

    Paper: Buzzega, Boschini, Porrello, Abati and Calderara 2020, "Dark Experience for General
    Continual Learning: a Strong, Simple Baseline", arXiv 2004.07211, algorithm 2.

    Equation: minimise CE(h(x), y) on the arriving batch + alpha * MSE(h(x'), z') +
    beta * CE(h(x''), y''), the MSE a mean over all elements, (x', z') and (x'', y'') drawn
    independently from the memory; a forward pass each. Then offer (x, y, z) to a reservoir,
    z = h(x) being the logits of the step just taken.

    Attributes:
        alpha: Weight of the stored logits.
        beta: Weight of the stored labels.

    **Differs from the paper:** nothing in the equations; as in the official code z belongs to
    the augmented sample while the memory keeps the sample without augmentation, z spans classes
    that have not come yet, and every epoch offers the sample anew. Where a sample has several
    predictions (an answer's tokens), the mean is over the elements of those that have a label.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    alpha: float = 0.1
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", "beta", at_least=0)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.memory = Memory(context.scenario.memory_size, context)

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)
        self._logits = outputs.detach()
        loss = self.context.objective.loss(outputs, batch.targets)
        if not len(self.memory):
            return loss
        dark = self.memory.draw(self.context.memory_batch_size)
        both = (self.forward(dark.inputs), dark.extras["logits"])
        now, then = (self.context.objective.predictions(h, dark.targets)[0] for h in both)
        loss = loss + self.alpha * F.mse_loss(now, then)
        labelled = self.memory.draw(self.context.memory_batch_size)
        return loss + self.beta * self.context.objective.loss(
            self.forward(labelled.inputs), labelled.targets
        )

    def observe(self, batch: Batch) -> None:
        self.memory.add(batch, {"logits": self._logits})

    @property
    def memory_samples(self) -> int:
        return len(self.memory)
