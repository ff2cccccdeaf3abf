"""RoTTA: slowly moving statistics, a balanced memory, and a teacher that sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clbench.adaptation import GradientAdaptation
from clbench.errors import UserError
from clbench.nn.batch_statistics import (
    MovingBatchNorm,
    affine_parameters,
    batch_norms,
    replace_batch_norms,
    train_only,
)
from clbench.nn.category_memory import CategoryMemory
from clbench.nn.teacher import answer, consistency, follow, frozen_copy
from clbench.nn.test_time_augmentation import CoTTAViews
from clbench.samples import Batch
from clbench.types import Scenario, require


@dataclass(kw_only=True)
class RoTTA(GradientAdaptation):
    """Robust test-time adaptation, for streams whose neighbours are alike.

    Yuan et al. 2023, "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR, arXiv 2303.13899.
    Batch norms whose stored statistics move slowly (`MovingBatchNorm`); a teacher answers with
    them. What it takes each sample for, and how sure it is, decides who is in the memory
    (`CategoryMemory`). After every `update_every` samples student and teacher meet the memory,
    which moves the statistics of both:

        w_i = exp(−a_i) / (1 + exp(−a_i)),  a_i the age as a part of the memory's size
        θ ← a step on mean_i w_i CE(teacher(x_i), student(view of x_i))
        θ' ← (1 − nu) θ' + nu θ

    Scored is the teacher's answer to a batch, before the batch is offered to the memory; a batch
    may see several updates. `predict` answers with the teacher, too. Trained are scales and shifts
    of the normalisation layers. A GPU is waited for once per batch: labels and entropies decide
    about the memory.

    **Differs from the paper:** scales and shifts of layer and group norms are trained as well,
    where a model has such; the paper has batch norms only. Dropout and stochastic depth stay off,
    where its code turns them on for an update.

    Attributes:
        lr: Learning rate.
        memory_size: Samples in the memory, N; at most the scenario's budget.
        update_every: Samples between two updates.
        nu: Share of the student in the teacher.
        statistics_momentum: Share of the memory in the statistics, at each update.
        timeliness: Weight of the age in what a sample is worth.
        uncertainty: Weight of the entropy.
    """

    memory_size: int = 64
    update_every: int = 64
    nu: float = 0.001
    statistics_momentum: float = 0.05
    timeliness: float = 1.0
    uncertainty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "memory_size", "update_every", at_least=1)
        require(self, "nu", "statistics_momentum", at_least=0, at_most=1)
        require(self, "timeliness", "uncertainty", at_least=0)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if scenario.memory_size < self.memory_size:
            raise UserError(
                f"RoTTA keeps {self.memory_size} samples and scenario.memory_size="
                f"{scenario.memory_size} allows fewer: raise it, or lower strategy.memory_size."
            )

    def prepare(self) -> None:
        if batch_norms(self.model):
            replace_batch_norms(
                self.model, lambda layer: MovingBatchNorm(layer, self.statistics_momentum)
            )
        self.teacher = frozen_copy(self.model)
        trained = train_only(self.model, affine_parameters(self.model).values())
        self.descent = self.make_optimizer(trained)
        self.memory = CategoryMemory(
            self.memory_size, self.context.n_outputs, self.timeliness, self.uncertainty
        )
        self.met = 0
        self._views = CoTTAViews(self.context)
        both = [*self.model.modules(), *self.teacher.modules()]
        self._norms = [module for module in both if isinstance(module, MovingBatchNorm)]

    @property
    def memory_samples(self) -> int:
        return len(self.memory)

    def adapt(self, batch: Batch) -> Tensor:
        outputs = self.predict(batch)
        p = outputs.softmax(1)
        entropy = -(p * (p + 1e-6).log()).sum(1)
        labels, entropies = torch.stack((p.argmax(1).to(p.dtype), entropy)).tolist()
        start = 0
        while start < len(batch):
            stop = min(len(batch), start + self.update_every - self.met % self.update_every)
            part = slice(start, stop)
            self.memory.add(batch.raw[part], [int(v) for v in labels[part]], entropies[part])
            self.met += stop - start
            if self.met % self.update_every == 0:
                self.update()
            start = stop
        return outputs

    def predict(self, batch: Batch) -> Tensor:
        return answer(self.teacher, batch.inputs, self.context)

    def update(self) -> None:
        """One step of student and teacher on the memory."""
        raw, ages = self.memory.content()
        inputs = self.context.transform.test(raw)
        for norm in self._norms:
            norm.train()
        targets = answer(self.teacher, inputs, self.context)
        outputs = self.forward(next(self._views(inputs, 1)))
        for norm in self._norms:
            norm.eval()
        self.descent.zero_grad()
        (consistency(outputs, targets) * (-ages).sigmoid()).mean().backward()
        self.descent.step()
        follow(self.teacher, self.model, 1 - self.nu)
