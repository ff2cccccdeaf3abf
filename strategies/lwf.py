"""LwF: learning without forgetting."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import LABELLED, Context, Experience, Setting, require


@dataclass(kw_only=True)
class LwF(GradientStrategy):
    """Answers new samples, among the old classes, as the model did before it met them.

    Paper: Li and Hoiem 2018, "Learning without Forgetting", arXiv 1606.09282.

    Equation: minimise CE(h(x), y) + lwf_lambda·KL(softmax(z/T) ‖ softmax(h(x)/T)), both softmaxes
    over the classes of earlier experiences, z the outputs of the model as it was at the end of
    the latest one, T the temperature; the mean over the samples of the batch, or over the tokens
    of their answers. Without the second term in the first experience.

    Attributes:
        lwf_lambda: Weight of the old answers.
        temperature: T.
        scale_t2: Multiply the second term by T², so that its gradient does not shrink with T.
        cross_entropy_over: Outputs that compete in the first term: those of the "new" classes of
            the experience, as the paper's head for each task has it, or "all".

    **Differs from the paper:** the paper has a head for each task, a softmax for each old head
    and no old head to compete at test time; here one head has all outputs, the old ones share
    one softmax, and all compete. No warm-up of the new head by itself. KL in place of the
    cross-entropy with soft targets: the same gradient, 0 where nothing has changed. The paper
    has lwf_lambda 1; the default is PyCIL's, for T 2 without T² and "new". Mammoth and
    Avalanche have "all"; Mammoth warms up, and asks the old model about samples that are not
    augmented.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    lwf_lambda: float = 3.0
    temperature: float = 2.0
    scale_t2: bool = False
    cross_entropy_over: Literal["new", "all"] = "new"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "lwf_lambda", at_least=0)
        require(self, "temperature", above=0)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self.known: list[int] = []

    def before(self, experience: Experience) -> None:
        outputs, device = self.context.n_outputs, self.context.device
        self._old = torch.tensor(self.known, dtype=torch.int64, device=device)
        self._barred = torch.zeros(outputs, dtype=torch.bool, device=device)
        if self.cross_entropy_over == "new":
            self._barred[:] = True
            self._barred[list(experience.classes)] = False

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)
        objective = self.context.objective
        competing = outputs.masked_fill(self._barred, -torch.inf)
        loss = objective.loss(competing, batch.targets)
        if not self.known:
            return loss
        with torch.no_grad(), self.context.autocast():
            answers = self.teacher(batch.inputs).float()
        now, then = (objective.predictions(h, batch.targets)[0] for h in (outputs, answers))
        return loss + self.lwf_lambda * self.distillation(now, then)

    def distillation(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """KL(softmax(answers/T) ‖ softmax(outputs/T)) over the old classes, the batch's mean."""
        soft = F.log_softmax(outputs[:, self._old] / self.temperature, 1)
        target = F.log_softmax(answers[:, self._old] / self.temperature, 1)
        divergence = F.kl_div(soft, target, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2 if self.scale_t2 else divergence

    def after(self, experience: Experience) -> None:
        self.teacher.load_state_dict(self.model.state_dict())
        self.known = sorted({*self.known, *experience.classes})
