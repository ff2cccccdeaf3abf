"""Fine-tuning of adapters in a frozen vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clbench.nn.adapters import Adapters
from clbench.nn.vit import vision_transformer
from clbench.pretrained import require_classifier, require_vision_transformer
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario, require


@dataclass(kw_only=True)
class AdapterFinetune(GradientStrategy):
    """Trains one set of adapters and the head on every experience; the rest never changes.

    Paper: the baseline "FT-Adapter" of Sun et al. 2025, "MOS: Model Surgery for Pre-Trained
    Model-Based Class-Incremental Learning", arXiv 2412.09441, with the adapters of Chen et al.
    2022, "AdaptFormer", arXiv 2205.13535.

    Equation: in every block x + MLP(norm(x)) + A(x), A(x) = s (W_u ReLU(W_d x + b_d) + b_u);
    minimise the cross-entropy over the adapters and the head.

    Attributes:
        bottleneck: Rows of W_d.
        adapter_scale: s.
        dropout: On the hidden units of the adapters, in training.
        compete: Whose outputs enter the cross-entropy: those of the "experience"'s own classes,
            or "all".

    **Differs from the paper:** it says little of this baseline. "experience" is what the
    fine-tuning of its code base does (sun-hailong/LAMDA-PILOT); bottleneck and learning rate are
    those of APER there. The frozen part is in evaluation mode.
    """

    bottleneck: int = 64
    adapter_scale: float = 0.1
    dropout: float = 0.1
    compete: Literal["experience", "all"] = "experience"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "bottleneck", at_least=1)
        require(self, "adapter_scale", above=0)
        require(self, "dropout", at_least=0, at_most=1)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        require_vision_transformer("adapter_finetune", scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self._features = require_classifier("adapter_finetune", model).features
        vit = vision_transformer(model)
        self._features.requires_grad_(False)
        generator = context.generator("adapters", torch.device("cpu"))
        adapters = Adapters(vit, self.bottleneck, self.adapter_scale, self.dropout, generator)
        model.add_module("adapters", adapters.to(context.device))
        adapters.put_into(vit)

    def before(self, experience: Experience) -> None:
        self._absent = torch.ones(self.context.n_outputs, dtype=torch.bool)
        if self.compete == "experience":
            self._absent[list(experience.classes)] = False
        else:
            self._absent[:] = False
        self._absent = self._absent.to(self.context.device)

    def begin(self, steps: int) -> None:
        super().begin(steps)
        self._features.eval()

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs).masked_fill(self._absent, -torch.inf)
        return self.context.objective.loss(outputs, batch.targets)
