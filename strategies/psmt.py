"""PSMT: a teacher that keeps the parameters in which the student is most sensitive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clbench.adaptation import GradientAdaptation
from clbench.errors import UserError
from clbench.nn.batch_statistics import normalise_by_batch, train_only
from clbench.nn.fisher import fisher_of_answers
from clbench.nn.teacher import answer, consistency, follow, frozen_copy, weights_and_biases
from clbench.nn.test_time_augmentation import CoTTAViews
from clbench.samples import Batch
from clbench.types import require


@dataclass(kw_only=True)
class PSMT(GradientAdaptation):
    """Parameter-selective mean teacher.

    Tian and Lyu 2024, "Parameter-Selective Continual Test-Time Adaptation", ACCV, arXiv
    2407.02253. As in CoTTA: student θ, teacher θ' and anchor, all with batch statistics, and
    pseudo-labels ŷ = softmax(z), z the teacher's logits, averaged over random views where the
    anchor is unsure. The paper's form, of C classes, with F_t the squared gradient of the first
    term for the batch of step t:

        θ_{t+1} ← a step on −1/C Σ_c ŷ_c ln y_c + fisher_weight Σ_i F_{i,t−1} (θ_i − θ_{i,t−1})²
        θ' ← m∘θ' + (1 − m)∘(γ θ' + (1 − γ) θ_{t+1}),  m = 1 where F_t exceeds a threshold

    Scored is z; `predict` answers with the teacher, without views.

    The released code does something else. F is estimated on samples of the source, with the
    model's own answers for labels, and pulls to θ₀; the first term is the mean of cross-entropy
    and its reverse; of the views nothing is left but comments. After the step and θ' ← γ θ' +
    (1 − γ) θ, what has a *small* squared gradient (of both terms) goes back to θ₀ in the student,
    and is taken over by the teacher; the rest of the teacher follows once more. Scored are the
    sum of the teacher's logits and the student's, and so `predict` answers.

    **Differs from the paper:** its text could not be had here. The formulas are those of its
    abstract pages, its figure, and the code; λ, the threshold, the decision about views and what
    is scored are the code's, or CoTTA's. In the paper's form `share` is the part of the numbers
    whose F is largest, the code's 0.03. Dropout and stochastic depth are off.

    Attributes:
        form: "paper" or "code". The code's needs samples of the source.
        fisher_weight: λ; the code's value.
        share: Part of the numbers that the mask selects: the largest F (paper), the smallest
            (code).
        teacher_momentum: γ.
        confidence_threshold: As CoTTA's; paper's form.
        views: As many as are averaged; paper's form.
        source_samples: That estimate F, drawn at random; code's form.
    """

    form: Literal["paper", "code"] = "paper"
    fisher_weight: float = 500.0
    share: float = 0.03
    teacher_momentum: float = 0.999
    confidence_threshold: float = 0.92
    views: int = 32
    source_samples: int = 10000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "fisher_weight", "confidence_threshold", at_least=0)
        require(self, "share", "teacher_momentum", at_least=0, at_most=1)
        require(self, "views", "source_samples", at_least=1)

    def prepare(self) -> None:
        normalise_by_batch(self.model)
        self.teacher = frozen_copy(self.model)
        self._anchor = frozen_copy(self.model)
        self._source: list[Tensor] = [*weights_and_biases(self._anchor).values()]
        self._taught: list[Tensor] = [*weights_and_biases(self.teacher).values()]
        trained = train_only(self.model, weights_and_biases(self.model).values())
        self._trained: list[Tensor] = [*trained]
        self.descent = self.make_optimizer(trained)
        self._views = CoTTAViews(self.context)
        self.past = [p.clone() for p in self._source]
        self.importance = self.information()

    def adapt(self, batch: Batch) -> Tensor:
        paper = self.form == "paper"
        outputs = self.forward(batch.inputs)
        targets = self.pseudo_labels(batch.inputs)
        loss = consistency(outputs, targets, symmetric=not paper).mean()
        self.descent.zero_grad()
        (loss / outputs.shape[1] if paper else loss).backward()
        self.step()
        return targets if paper else targets + outputs.detach()

    @torch.no_grad()
    def step(self) -> None:
        """Of the student and the teacher, when the student has its gradients of the first term."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        first = [*torch._foreach_mul(gradients, gradients)]
        away = torch._foreach_sub(self._trained, self.past)
        torch._foreach_mul_(away, self.importance)
        torch._foreach_add_(gradients, away, alpha=2 * self.fisher_weight)
        if self.form == "paper":
            self.past, self.importance = [p.detach().clone() for p in self._trained], first
            self.descent.step()
            self.follow_selectively(first)
        else:
            both = [*torch._foreach_mul(gradients, gradients)]
            self.descent.step()
            self.follow_and_restore(both)

    def predict(self, batch: Batch) -> Tensor:
        outputs = answer(self.teacher, batch.inputs, self.context)
        if self.form == "code":
            outputs = outputs + answer(self.model, batch.inputs, self.context)
        return outputs

    def pseudo_labels(self, inputs: Tensor) -> Tensor:
        """z, [B, K]."""

        def teacher(images: Tensor) -> Tensor:
            return answer(self.teacher, images, self.context)

        if self.form == "paper":
            anchor = answer(self._anchor, inputs, self.context)
            if anchor.softmax(1).amax(1).mean() < self.confidence_threshold:
                return self._views.average(teacher, inputs, self.views)
        return teacher(inputs)

    def follow_selectively(self, squares: list[Tensor]) -> None:
        """The paper's teacher: what has the largest squared gradients stays."""
        limit = quantile(squares, 1 - self.share)
        rates = [(f <= limit).to(f.dtype).mul_(1 - self.teacher_momentum) for f in squares]
        torch._foreach_lerp_(self._taught, self._trained, rates)

    def follow_and_restore(self, squares: list[Tensor]) -> None:
        """The code's teacher and student: what has the smallest squared gradients is restored."""
        limit = quantile(squares, self.share)
        follow(self.teacher, self.model, self.teacher_momentum)
        rates = []
        for parameter, old, f in zip(self._trained, self._source, squares, strict=True):
            small = f < limit
            torch.where(small, old, parameter, out=parameter)
            rates.append(small.to(f.dtype).clamp_min_(1 - self.teacher_momentum))
        torch._foreach_lerp_(self._taught, self._trained, rates)

    def information(self) -> list[Tensor]:
        """F before the first step: none in the paper's form, the source's in the code's.

        Raises:
            UserError: Where there are no samples of the source for it.
        """
        if self.form == "paper":
            return [torch.zeros_like(p) for p in self._source]
        source = self.context.source
        if source is None:
            raise UserError(
                "PSMT's released code estimates the Fisher information on samples of the source, "
                "and this scenario offers none. Use strategy=psmt, the paper's form."
            )
        generator = self.context.generator("fisher")
        order = torch.randperm(len(source), generator=generator, device=self.context.device)
        return fisher_of_answers(
            self.forward,
            self._trained,
            source,
            order[: self.source_samples],
            self.context.scenario.batch_size,
        )


def quantile(values: list[Tensor], share: float) -> Tensor:
    """The number below which a share of all numbers lies, interpolated; a scalar tensor."""
    flat = torch.cat([v.flatten() for v in values])
    place = share * (len(flat) - 1)
    low = int(place)
    least = flat.kthvalue(low + 1).values
    most = flat.kthvalue(min(low + 2, len(flat))).values
    return least.lerp(most, place - low)
