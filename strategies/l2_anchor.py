"""L2 anchor: all weights are held alike to where the last experience left them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.anchor import Anchor
from clbench.pretrained import positions, require_classifier
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import (
    CLASSIFICATION,
    LABELLED,
    Context,
    Experience,
    Scenario,
    Setting,
    require,
)


@dataclass(kw_only=True)
class L2Anchor(GradientStrategy):
    """EWC with the identity in the place of the Fisher information.

    Paper: Smith, Tian, Halbe, Hsu and Kira 2023, "A Closer Look at Rehearsal-Free Continual
    Learning", arXiv 2203.17269: with pre-training it does better than EWC, and better than
    prompts where only the queries, keys and values of a vision transformer train:
    `strategy=l2_attention`.

    Equation: minimise classification loss + l2_lambda Σ_i (θ_i − θ_i*)², θ* the weights at the
    end of the latest experience; from_start: in the first experience those that it starts with,
    which are pre-trained where the backbone is. Rows of the head are held from the end of the
    experience that brings their class; before, there is nothing to hold.

    Attributes:
        l2_lambda: Weight of the penalty. SGD diverges once lr·l2_lambda > 1.
        from_start: Hold the weights in the first experience too.
        loss_over: Classes in the classification loss: those of the "experience", or "all".
        outputs: "softmax" cross-entropy, or "sigmoid": the binary cross-entropy of each class,
            summed over classes ("all": those met so far).

    **Differs from the paper:** nothing in the penalty. Its loss is "sigmoid" where it trains
    ResNets; of its vision transformers, and of their weight of the penalty, no detail could be
    confirmed: 0.05 is in related code of the authors. "softmax" over the "experience" is what
    the prompts that it is compared with have; with loss_over=all it is what `ewc` has here.
    Its combinations with distillation are left out. For answers in words, ours: the loss is the
    scenario's, over all tokens, and everything that trains is held.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    l2_lambda: float = 0.05
    from_start: bool = True
    loss_over: Literal["experience", "all"] = "experience"
    outputs: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "l2_lambda", at_least=0)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if scenario.setting not in CLASSIFICATION and self.outputs == "sigmoid":
            raise UserError("l2_anchor: answers in words are no classes. Set outputs=softmax.")

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self._classifies = context.scenario.setting in CLASSIFICATION
        head = require_classifier("l2_anchor", model).head if self._classifies else nn.Identity()
        self._head = {id(p) for p in head.parameters()}
        self.met = torch.zeros(context.n_outputs, dtype=torch.bool, device=context.device)
        self.anchor = Anchor(model)
        if self.from_start:
            self.anchor.move(self.curvature())

    def before(self, experience: Experience) -> None:
        self.met[list(experience.classes)] = True
        classes = experience.classes
        if self.loss_over == "all":
            chosen = self.met if self.outputs == "sigmoid" else torch.ones_like(self.met)
            classes = tuple(chosen.nonzero().flatten().tolist())
        self._columns = torch.tensor(classes, device=self.context.device)
        self._positions = positions(classes, self.context)

    def loss(self, batch: Batch) -> Tensor:
        if not self._classifies:
            return super().loss(batch) + self.anchor.penalty()
        outputs = self.forward(batch.inputs)[:, self._columns]
        targets = self._positions[batch.targets]
        if self.outputs == "softmax":
            loss = self.context.objective.loss(outputs, targets)
        else:
            wanted = F.one_hot(targets, len(self._columns)).float()
            each = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
            loss = each.sum(1).mean()
        return loss + self.anchor.penalty()

    def after(self, experience: Experience) -> None:  # noqa: ARG002
        self.anchor.move(self.curvature())

    def curvature(self) -> list[Tensor]:
        """2 l2_lambda for what is held, 0 for rows of the head whose class has not come."""
        curvatures = []
        for parameter in self.anchor.parameters:
            curvature = torch.full_like(parameter, 2 * self.l2_lambda, requires_grad=False)
            if id(parameter) in self._head:
                by_row = parameter.ndim and len(parameter) == len(self.met)
                curvature[~self.met if by_row else ~self.met.any()] = 0
            curvatures.append(curvature)
        return curvatures
