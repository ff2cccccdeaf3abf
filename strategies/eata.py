"""EATA and ETA: only samples that are reliable and new teach, and important weights stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.adaptation import GradientAdaptation
from clbench.errors import UserError
from clbench.nn.batch_statistics import affine_parameters, normalise_by_batch, train_only
from clbench.nn.entropy import entropy, threshold
from clbench.samples import Batch
from clbench.types import require


@dataclass(kw_only=True)
class EATA(GradientAdaptation):
    """Efficient anti-forgetting test-time adaptation; without its last part it is ETA.

    Niu et al. 2022, "Efficient Test-Time Model Adaptation without Forgetting", ICML, arXiv
    2204.02610, and its code. As TENT (statistics of the batch, scales and shifts trained, outputs
    scored before the step), but the loss of a batch is

        L = mean_{x in S} w(x) H(p(x)) + beta Σ_i F_i (θ_i − θ⁰_i)²,   w = exp(E₀ − H),

    with E₀ = entropy_margin · ln K and w held constant. S has the samples with H(p) < E₀ and
    |cos(m, p)| < epsilon, m being the moving average of the mean p over S, m ← decay m + (1 −
    decay) mean; before there is an m, the second condition falls away. Without a sample in S
    nothing is done, for which the host looks at the number of them in every batch.

    F is the mean over batches of source samples of the squared gradient of the cross-entropy with
    the model's own answers, under the statistics of these batches; θ⁰ are the weights as they
    came. `strategy=eta` is beta = 0, which needs no source samples.

    `predict` answers as TENT's does.

    **Differs from the paper:** F is estimated on clean training samples of the source, where the
    paper takes test samples of it: those are kept for scoring here. Which layers adapt, and
    dropout: as in `strategy=tent`. Defaults are those of the CIFAR-10 experiments of the
    re-implementation in mariodoebler/test-time-adaptation (CIFAR-100: epsilon 0.1); the paper's
    ImageNet has SGD with lr 2.5e-4, epsilon 0.05, beta 2000.

    Attributes:
        entropy_margin: Largest entropy of a reliable sample, as a share of ln K.
        epsilon: Largest |cosine| with the average answer of a sample that is not redundant.
        beta: Weight of the pull back to the source.
        reweight: Weigh samples by w; False: all alike.
        decay: Of the moving average of answers, in [0, 1].
        fisher_samples: Source samples that estimate F, drawn at random; all, if there are fewer.
        fisher_batch_size: How many of them at once; F is of batches, so this changes it.
    """

    entropy_margin: float = 0.4
    epsilon: float = 0.4
    beta: float = 1.0
    reweight: bool = True
    decay: float = 0.9
    fisher_samples: int = 2000
    fisher_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "entropy_margin", "epsilon", "beta", at_least=0)
        require(self, "decay", at_least=0, at_most=1)
        require(self, "fisher_samples", "fisher_batch_size", at_least=1)

    def prepare(self) -> None:
        normalise_by_batch(self.model)
        scales = train_only(self.model, affine_parameters(self.model).values())
        self.descent = self.make_optimizer(scales)
        self.average: Tensor | None = None
        self._margin = threshold(self.entropy_margin, self.context.n_outputs)
        # Constant from here on, and made again whenever a run is continued.
        self._scales: list[Tensor] = list(scales)
        self._source = [p.detach().clone() for p in scales]
        self._fisher = self.information() if self.beta else []

    def adapt(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)
        everyone = entropy(outputs)
        answers = outputs.detach().softmax(1)
        kept = self.select(answers, everyone.detach())
        losses = everyone[kept]
        if len(losses):
            self.remember(answers[kept].mean(0))
            if self.reweight:
                losses = losses * (self._margin - losses.detach()).exp()
            losses.mean().backward()
            self.pull()
            self.descent.step()
            self.descent.zero_grad()
        return outputs.detach()

    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs)

    def select(self, answers: Tensor, entropies: Tensor) -> Tensor:
        """Which samples are reliable and not redundant: probabilities [B, K] to [B] bool."""
        reliable = entropies < self._margin
        if self.average is None:
            return reliable
        cosine = F.cosine_similarity(self.average[None], answers)
        return reliable & (cosine.abs() < self.epsilon)

    def remember(self, mean: Tensor) -> None:
        """Moves the average answer towards that of the chosen samples."""
        old = self.average
        self.average = mean if old is None else self.decay * old + (1 - self.decay) * mean

    @torch.no_grad()
    def pull(self) -> None:
        """Adds the gradient of the second part of the loss, 2 beta F (θ − θ⁰)."""
        if not self._fisher:
            return
        away = torch._foreach_sub(self._scales, self._source)
        torch._foreach_mul_(away, self._fisher)
        gradients = [p.grad for p in self._scales if p.grad is not None]
        torch._foreach_add_(gradients, away, alpha=2 * self.beta)

    def information(self) -> list[Tensor]:
        """F, one tensor for each scale or shift.

        Raises:
            UserError: Where there are no samples of the source.
        """
        source, device = self.context.source, self.context.device
        if source is None:
            raise UserError(
                "EATA estimates the Fisher information on samples of the source, and this "
                "scenario offers none. Set strategy.beta=0, or use strategy=eta."
            )
        generator = self.context.generator("eata.fisher")
        order = torch.randperm(len(source), generator=generator, device=device)
        order = order[: self.fisher_samples]
        total = [torch.zeros_like(p) for p in self._scales]
        for batch in source.batches(order, self.fisher_batch_size):
            outputs = self.forward(batch.inputs)
            loss = F.cross_entropy(outputs, outputs.detach().argmax(1))
            gradients = torch.autograd.grad(loss, self._scales, materialize_grads=True)
            torch._foreach_addcmul_(total, gradients, gradients)
        torch._foreach_div_(total, -(-len(order) // self.fisher_batch_size))
        return total
