"""DER: dark experience replay."""

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
class DER(GradientStrategy):
    """Keeps the logits of stored samples where they were when these arrived.

    Paper: Buzzega, Boschini, Porrello, Abati and Calderara 2020, "Dark Experience for General
    Continual Learning: a Strong, Simple Baseline", arXiv 2004.07211, algorithm 1.

    Equation: minimise CE(h(x), y) on the arriving batch + alpha * MSE(h(x'), z'), the mean over
    all elements, with (x', z') drawn from the memory; a forward pass each. Then offer (x, z) to
    a reservoir, z = h(x) being the logits of the step just taken.

    Attributes:
        alpha: Weight of the stored logits.

    **Differs from the paper:** nothing in the equations; as in the official code z belongs to
    the augmented sample while the memory keeps the sample without augmentation, z spans classes
    that have not come yet, and every epoch offers the sample anew. Where a sample has several
    predictions (an answer's tokens), the mean is over the elements of those that have a label.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    alpha: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", at_least=0)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.memory = Memory(context.scenario.memory_size, context)

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)
        self._logits = outputs.detach()
        loss = self.context.objective.loss(outputs, batch.targets)
        if not len(self.memory):
            return loss
        recalled = self.memory.draw(self.context.memory_batch_size)
        both = (self.forward(recalled.inputs), recalled.extras["logits"])
        now, then = (self.context.objective.predictions(h, recalled.targets)[0] for h in both)
        return loss + self.alpha * F.mse_loss(now, then)

    def observe(self, batch: Batch) -> None:
        self.memory.add(batch, {"logits": self._logits})

    @property
    def memory_samples(self) -> int:
        return len(self.memory)
