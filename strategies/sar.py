"""SAR: entropy minimisation towards flat minima on reliable samples, with a way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.adaptation import GradientAdaptation
from clbench.nn.batch_statistics import affine_parameters, normalise_by_batch, train_only
from clbench.nn.entropy import entropy, threshold
from clbench.samples import Batch
from clbench.types import require

#: Added to the norm of the gradient, as the code does.
_TINY = 1e-12


@dataclass(kw_only=True)
class SAR(GradientAdaptation):
    """Sharpness-aware and reliable entropy minimisation.

    Niu et al. 2023, "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR, arXiv
    2302.12400, and its code. As TENT (statistics of the batch, scales and shifts trained, outputs
    scored before the step), with E₀ = entropy_margin · ln K, for each batch:

    1. S₁ are the samples with H(p) < E₀; g the gradient of their mean entropy;
       θ' = θ + rho g / ‖g‖, over all trained tensors together.
    2. S₂ are those of S₁ that have H < E₀ under θ' too, ℓ is their mean entropy there. θ takes an
       optimizer's step with the gradient of ℓ at θ'.
    3. e ← decay e + (1 − decay) ℓ, at first ℓ. Where e < recovery, the model has begun to
       collapse: everything is put back to where it was before the stream.

    The host looks at the sizes of S₁ and S₂ and at ℓ in every batch: they decide what is done.
    `predict` answers as TENT's does. The result's facts have the number of resets by step 3.

    Made for layer and group norms. For batches of n images the paper's lr is 2.5e-4 for ResNets
    (n < 32: 2.5e-4 · n/32; n = 1: twice that), 1e-3 · n/64 for ViTs; here it is that of the CIFAR
    experiments in mariodoebler/test-time-adaptation.

    **Differs from the paper:** two slips of the code are mended. Where S₁ or S₂ is empty, nothing
    is done: the code takes a step with a gradient of zero, by which momentum still moves the
    weights. After a reset e is empty: the code puts the old e back, which is below the threshold,
    and so resets after every batch until e has climbed over it. Layers that stay as they came are
    named by paths (`frozen`) that are these of the code where it has such layers: the last stage
    of a ResNet of four, the last quarter and the last norm of a ViT of 12 blocks. Instance norms
    adapt too, and dropout is off, as in `strategy=tent`.

    Attributes:
        entropy_margin: Largest entropy of a reliable sample, as a share of ln K.
        rho: Length of the step uphill.
        recovery: Least moving average of the loss, in nats; 0: no resets.
        decay: Of that average, in [0, 1].
        frozen: Parts of the model whose normalisation layers do not adapt, as pieces of paths.
    """

    optimizer: Literal["adam", "sgd"] = "sgd"
    entropy_margin: float = 0.4
    rho: float = 0.05
    recovery: float = 0.2
    decay: float = 0.9
    frozen: tuple[str, ...] = ("layer4", "blocks.9", "blocks.10", "blocks.11", "model.norm")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "entropy_margin", "rho", "recovery", at_least=0)
        require(self, "decay", at_least=0, at_most=1)

    def prepare(self) -> None:
        normalise_by_batch(self.model)
        chosen = affine_parameters(self.model, self.frozen)
        scales = train_only(self.model, chosen.values())
        self._scales: list[Tensor] = list(scales)
        self.descent = self.make_optimizer(scales)
        self.average: float | None = None
        self.resets = 0
        self._margin = threshold(self.entropy_margin, self.context.n_outputs)

    def adapt(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)
        entropies = entropy(outputs)
        reliable = entropies.detach() < self._margin
        if reliable.any():
            loss = self.step(batch.inputs, entropies[reliable].mean(), reliable)
            if loss is not None:
                self.watch(loss)
        return outputs.detach()

    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs)

    def step(self, inputs: Tensor, first: Tensor, reliable: Tensor) -> float | None:
        """Uphill, then down from where it started.

        Args:
            inputs: [B, ...], all of the batch.
            first: Mean entropy of S₁.
            reliable: S₁, [B] bool.

        Returns:
            ℓ; None where S₂ is empty and nothing was done.
        """
        uphill = torch.autograd.grad(first, self._scales, materialize_grads=True)
        before = [p.detach().clone() for p in self._scales]
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(uphill)).norm()
            far = torch._foreach_mul(list(uphill), self.rho / (norm + _TINY))
            torch._foreach_add_(self._scales, list(far))
        entropies = entropy(self.forward(inputs))[reliable]
        entropies = entropies[entropies.detach() < self._margin]
        loss = entropies.mean() if len(entropies) else None
        if loss is not None:
            loss.backward()
        with torch.no_grad():
            torch._foreach_copy_(self._scales, before)
        if loss is None:
            return None
        self.descent.step()
        self.descent.zero_grad()
        return loss.item()

    def watch(self, loss: float) -> None:
        """Resets where the moving average of the loss says that the model collapses."""
        old = self.average
        self.average = loss if old is None else self.decay * old + (1 - self.decay) * loss
        if self.average < self.recovery:
            resets = self.resets + 1
            self.reset()
            self.resets = resets

    def facts(self) -> Mapping[str, Any]:
        return {"resets": self.resets}
