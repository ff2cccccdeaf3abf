"""CoTTA: a student learns from a cautious teacher, and parts of it go back to the source."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clbench.adaptation import GradientAdaptation
from clbench.nn.batch_statistics import normalise_by_batch, train_only
from clbench.nn.teacher import (
    answer,
    consistency,
    follow,
    frozen_copy,
    restore_stochastically,
    weights_and_biases,
)
from clbench.nn.test_time_augmentation import CoTTAViews
from clbench.samples import Batch
from clbench.types import require


@dataclass(kw_only=True)
class CoTTA(GradientAdaptation):
    """Continual test-time adaptation.

    Wang et al. 2022, "Continual Test-Time Domain Adaptation", CVPR, arXiv 2203.13591. A student θ,
    a teacher θ' and an anchor, the source model θ₀, all of them with batch statistics. For each
    batch:

        z = teacher(x) if the anchor's confidence, the mean of its largest probabilities, is at
            least `confidence_threshold`; else the mean of the teacher's logits for `views`
            random views of the batch (see `CoTTAViews`)
        θ ← a step on −Σ softmax(z) ln student(x)
        θ' ← m θ' + (1 − m) θ
        θ ← M∘θ₀ + (1 − M)∘θ,  each element of M being 1 with a probability

    Scored is z. `predict` answers with the teacher, without views. All weights and biases are
    trained. The threshold is a decision for which a GPU is waited for, once per batch.

    **Differs from the paper:** dropout and stochastic depth are off, where its code leaves them
    on. The confidence is that of a whole batch, as in the code. Views are made only where they are
    used, as in the code for ImageNet; that for CIFAR makes them always.

    Attributes:
        lr: Learning rate; the code has 0.001 with Adam, for ImageNet 0.01 with SGD.
        teacher_momentum: m.
        restore_probability: Of each number of the student; 0.001 for ImageNet.
        confidence_threshold: 0.92 for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet; above 1:
            views always.
        views: As many as are averaged.
        symmetric: Add the reverse cross-entropy and halve, as the code does for ImageNet.
    """

    teacher_momentum: float = 0.999
    restore_probability: float = 0.01
    confidence_threshold: float = 0.92
    views: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "teacher_momentum", "restore_probability", at_least=0, at_most=1)
        require(self, "confidence_threshold", at_least=0)
        require(self, "views", at_least=1)

    def prepare(self) -> None:
        normalise_by_batch(self.model)
        self.teacher = frozen_copy(self.model)
        self._anchor = frozen_copy(self.model)
        self._source = list(weights_and_biases(self._anchor).values())
        self._trained = train_only(self.model, weights_and_biases(self.model).values())
        self.descent = self.make_optimizer(self._trained)
        self._views = CoTTAViews(self.context)
        self._restoring = self.context.generator("restore")

    def adapt(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)
        targets = self.pseudo_labels(batch.inputs)
        self.descent.zero_grad()
        consistency(outputs, targets, self.symmetric).mean().backward()
        self.descent.step()
        follow(self.teacher, self.model, self.teacher_momentum)
        restore_stochastically(
            self._trained, self._source, self.restore_probability, self._restoring
        )
        return targets

    def predict(self, batch: Batch) -> Tensor:
        return answer(self.teacher, batch.inputs, self.context)

    def pseudo_labels(self, inputs: Tensor) -> Tensor:
        """z, [B, K]."""

        def teacher(images: Tensor) -> Tensor:
            return answer(self.teacher, images, self.context)

        anchor = answer(self._anchor, inputs, self.context)
        if anchor.softmax(1).amax(1).mean() < self.confidence_threshold:
            return self._views.average(teacher, inputs, self.views)
        return teacher(inputs)
