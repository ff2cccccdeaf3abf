"""FPF: forgetting prioritized finetuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from clbench.finetuning import ModuleFinetuning
from clbench.samples import Batch
from clbench.types import LABELLED, Context, Experience, Setting, require


@dataclass(kw_only=True)
class FPF(ModuleFinetuning):
    """After any method, fine-tunes the few modules that forget on a balanced memory.

    Paper: Zhao, Zhou, Long, Jiang and Zhang 2023, "Does Continual Learning Equally Forget All
    Parameters?", ICML 2023, arXiv 2304.04158.

    Algorithm: let the base learn; then, with all modules but some S as they are, finetune_steps
    times θ_S ← θ_S − lr ∇CE on a class-balanced batch of the memory, batch norms of S in training
    mode. Here after each experience, so that every row of the accuracy matrix is of a model that
    is fine-tuned.

    Attributes:
        base: The method that learns the stream.
        finetune_steps: Steps of each fine-tuning; 0: sensitivity is measured, and no more.
        continues_from: Where the next experience starts: from the weights of the "base", so that
            every row is what the method, applied once at that point, makes of the base's run; or
            from what was "finetuned".

    **Differs from the paper:** its text and code were not at hand, its abstract and notes on it
    were. The form of the score, the default choice of modules by it, the number of steps, the
    cosine and the share are ours; notes on the paper name batch norms, the first convolution and
    the last layer as sensitive (on a ResNet of this suite `modules=[norm, statistics,
    features.conv1, head]`). Evaluations within an experience are of the base.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    finetune_steps: int = 300
    continues_from: Literal["base", "finetuned"] = "base"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "finetune_steps", at_least=0)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.base_weights: dict[str, Tensor] = {}

    def before(self, experience: Experience) -> None:
        if self.base_weights:
            self.model.load_state_dict(self.base_weights)
            self.base_weights = {}
        super().before(experience)

    def observe(self, batch: Batch) -> None:
        super().observe(batch)
        self.memory.add(batch)

    def after(self, experience: Experience) -> None:
        super().after(experience)
        if self.continues_from == "base":
            self.base_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.finetune(self.finetune_steps)
