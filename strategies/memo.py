"""MEMO: for each image on its own, one step towards agreement over copies, then forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from clbench.adaptation import Adaptation
from clbench.nn.batch_statistics import MixedBatchNorm, batch_norms, replace_batch_norms
from clbench.nn.entropy import marginal_entropy
from clbench.nn.test_time_augmentation import AugMixViews
from clbench.samples import Batch
from clbench.types import require

#: Numbers in the copies that are made together, and that a GPU adapts to at once.
_CHUNK = 2**21
_ADAM_EPSILON = 1e-8

Weights = Mapping[str, Tensor]


@dataclass(kw_only=True)
class MEMO(Adaptation):
    """Marginal entropy minimisation with one test point.

    Zhang et al. 2022, "MEMO: Test Time Robustness via Adaptation and Augmentation", NeurIPS, arXiv
    2110.09506. For each image on its own, whatever comes with it:

        θ' = a step from the source's θ on H(1/B Σ_b p(· | x_b; θ)),  x_b copies of the image
        answer p(· | x; θ')

    and θ' is forgotten. Copies are made by AugMix (`AugMixViews`). Batch norms divide by a mixture
    of the stored statistics, which count like `prior` samples, and those of the copies or of the
    image, which count like one; statistics are constants to the gradient. Scored is the answer
    after the step; all weights are trained. As no image leaves a trace, the label-correlated or
    mixed stream is the same to it as any other, and nothing is to be reset.

    `predict` answers without the step: with the source's weights and, image by image, with mixed
    statistics. The accuracy matrix and the accuracy on the source are those of that; only the
    online error is that of the method.

    On a CPU images follow one another: their steps have nothing to share, and one at a time is
    faster. A GPU adapts to many at once, each with weights of its own.

    **Differs from the paper:** the variance of the copies is their mean squared deviation, where
    the code takes the unbiased one. AdamW starts anew with each image; the code carries its
    moments over from the images before.

    Attributes:
        lr: Of the step: 0.005 for CIFAR-10 (group norm), 0.00025 for ImageNet; AdamW 0.00001.
        optimizer: "sgd" without momentum, or "adamw" (betas 0.9 and 0.999).
        weight_decay: L2 coefficient of SGD, decoupled one of AdamW.
        copies: B; 64 for ImageNet.
        prior: Samples that the stored statistics of batch norms count like; .inf: only these.
        crop: Of the copies, "padded" or "resized", as the paper has it for CIFAR and ImageNet.
    """

    lr: float = 0.005
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 0.0
    copies: int = 32
    prior: float = 16.0
    crop: Literal["padded", "resized"] = "padded"

    def __post_init__(self) -> None:
        require(self, "lr", "weight_decay", "prior", at_least=0)
        require(self, "copies", at_least=1)

    def prepare(self) -> None:
        if batch_norms(self.model):
            alpha = 1 / (1 + self.prior)
            replace_batch_norms(self.model, lambda layer: MixedBatchNorm(layer, alpha))
        self.model.requires_grad_(False)
        self._weights = {name: p.detach() for name, p in self.model.named_parameters()}
        self._copies = AugMixViews(self.context, self.crop)

    @torch.no_grad()
    def adapt(self, batch: Batch) -> Tensor:
        together = max(1, _CHUNK // (self.copies * batch.inputs[0].numel()))
        at_once = 1 if self.context.device.type == "cpu" else together
        answers = []
        for start in range(0, len(batch), together):
            some = slice(start, start + together)
            copies = self._copies(batch.raw[some], self.copies)
            parts = zip(copies.split(at_once), batch.inputs[some].split(at_once), strict=True)
            answers += [self.episode(*part) for part in parts]
        return torch.cat(answers)

    def predict(self, batch: Batch) -> Tensor:
        return _each(self._answer, (None, 0), self._weights, batch.inputs)

    def episode(self, copies: Tensor, inputs: Tensor) -> Tensor:
        """Adapts to some images, each on its own, and answers.

        Args:
            copies: [N, B, C, H, W].
            inputs: [N, C, H, W].

        Returns:
            Logits [N, K].
        """

        def step(weights: Weights, views: Tensor) -> dict[str, Tensor]:
            slopes = grad(self._loss)(weights, views)
            return {name: self._stepped(weight, slopes[name]) for name, weight in weights.items()}

        if len(inputs) == 1:
            return self._answer(step(self._weights, copies[0]), inputs[0])[None]
        adapted = vmap(step, (None, 0))(self._weights, copies)
        return _each(self._answer, (0, 0), adapted, inputs)

    def _stepped(self, weight: Tensor, slope: Tensor) -> Tensor:
        if self.optimizer == "sgd":
            return weight - self.lr * (slope + self.weight_decay * weight)
        decayed = weight * (1 - self.lr * self.weight_decay)
        # Of Adam's first step: both of its corrected moments are those of this gradient.
        return decayed - self.lr * slope / (slope.abs() + _ADAM_EPSILON)

    def _loss(self, weights: Weights, copies: Tensor) -> Tensor:
        return marginal_entropy(self._outputs(weights, copies))

    def _answer(self, weights: Weights, image: Tensor) -> Tensor:
        return self._outputs(weights, image[None])[0]

    def _outputs(self, weights: Weights, inputs: Tensor) -> Tensor:
        with self.context.autocast():
            outputs: Tensor = functional_call(self.model, dict(weights), (inputs,))
        return outputs.float()


def _each(
    answer: Callable[[Weights, Tensor], Tensor],
    over: tuple[int | None, int],
    weights: Weights,
    images: Tensor,
) -> Tensor:
    """Answers to images as if each had come alone."""
    answers: Tensor = vmap(answer, over)(weights, images)
    return answers
