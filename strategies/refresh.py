"""Refresh learning: unlearn the arriving batch a little, then learn it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.nn.fisher import Fisher, diagonal_fisher
from clbench.nn.noise import GaussianNoise
from clbench.samples import Batch
from clbench.training import Wrapper
from clbench.types import LABELLED, Context, Experience, Setting, require


@dataclass(kw_only=True)
class Refresh(Wrapper):
    """Climbs the loss for some steps, then lets the base take its own step from there.

    Paper: Wang, Li, Shen and Huang 2024, "A Unified and General Framework for Continual
    Learning", arXiv 2403.13249; code: joey-wang123/CL-refresh-learning. The paper's general
    objective and the methods here that are cases of it: docs/unified-objective.md.

    Equation: in each step, unlearn_steps times

    - "sde": θ ← θ + gamma·F̃⁻¹∇L(θ) + ε, ε ~ N(0, noise²·2 gamma·F̃⁻¹), F̃ = F + damping;
    - "relative": θ ← θ + gamma·damping·F̃⁻¹(ĝ + noise·ξ), ξ ~ N(0, 1), ĝ being ∇L with each
      tensor rescaled to the norm of its weights;

    then one step of the base on its own loss. F is diagonal: 0 in the first experience (so F̃ is
    damping times the identity), and after each F ← decay·F + F_new, with F_new the Fisher
    information on its samples under the weights at its end. What is climbed stays climbed: the
    base starts from there. To first order its gradient is that of L + ½ gamma·∇LᵀF̃⁻¹∇L.

    Unlearning draws the memory samples, augmentations and dropout masks that the base's step will
    draw again, and leaves no trace in batch statistics. One pass of the base's loss for each.

    Attributes:
        base: The method that is refreshed.
        form: "sde", the paper's, or "relative", the code's.
        unlearned: What is climbed, L: the base's whole "objective", as in the paper, or the
            cross-entropy on the "arriving" batch alone, as in the code.
        unlearn_steps: Steps uphill before each step of the base.
        gamma: Length of such a step; "relative": as a part of the norm of the weights.
        noise: Standard deviation of the noise in units of the equation's; 1: the paper's.
        damping: Added to F. "relative": with F at this value the step is half as long.
        decay: What one more experience leaves of the old F, in [0, 1].
        fisher: "exact", "empirical", "weighted" or "batch"; see `clbench.nn.fisher`.
        fisher_samples: Samples of each experience that estimate F, drawn at random; 0: all.

    **Differs from the paper:** nothing in the equations of "sde" but the damping, without which
    F⁻¹ has no bound. The paper's gamma, J and estimate of F could not be confirmed; the defaults
    are ours, but for the code's decay. gamma is small because the equation's noise moves every
    weight by √(2 gamma / F̃) in every step, 0.0014 with the defaults where F is small, and adds up
    over steps; damping is about the F of the most important weights of a small network. The
    released code, DER++ only, is `strategy=refresh_code`: "relative", "arriving", gamma 1e-5,
    noise 0.001, damping 1000 (its 1/(1 + 0.001 F)), decay 1e-5, "weighted". Its F is of single
    augmented samples in training mode, each normalised by itself; here it is in evaluation mode
    and nothing is augmented. As in the code, "relative" moves a tensor whose gradient is mere
    rounding (a bias before a batch norm) as far as any. On a CPU the noise is drawn from a pool:
    `clbench.nn.noise`.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    form: Literal["sde", "relative"] = "sde"
    unlearned: Literal["objective", "arriving"] = "objective"
    unlearn_steps: int = 1
    gamma: float = 1e-9
    noise: float = 1.0
    damping: float = 1e-3
    decay: float = 1e-5
    fisher: Fisher = "empirical"
    fisher_samples: int = 1000

    def __post_init__(self) -> None:
        require(self, "unlearn_steps", "gamma", "noise", "fisher_samples", at_least=0)
        require(self, "damping", above=0)
        require(self, "decay", at_least=0, at_most=1)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        named = self.model.named_parameters()
        self.information = {name: torch.zeros_like(p) for name, p in named if p.requires_grad}
        count = sum(t.numel() for t in self.information.values())
        self._noise = GaussianNoise(count, context.generator("refresh.noise"))

    @torch.no_grad()
    def begin(self, steps: int) -> None:
        super().begin(steps)
        named = dict(self.model.named_parameters())
        names = [name for name in self.information if named[name].requires_grad]
        self._weights: list[Tensor] = [named[name] for name in names]
        scale = self.gamma * (self.damping if self.form == "relative" else 1)
        self._drift = [scale / (self.information[name] + self.damping) for name in names]
        self._spread = [
            self.noise * (d if self.form == "relative" else (2 * d).sqrt()) for d in self._drift
        ]

    def loss(self, batch: Batch) -> Tensor:
        for _ in range(self.unlearn_steps):
            self.unlearn(batch)
        return super().loss(batch)

    def unlearn(self, batch: Batch) -> None:
        """One step uphill."""
        for weight in self._weights:
            weight.grad = None  # of the last step: its memory serves again
        with unnoticed(self.model, self.context):
            if self.unlearned == "objective":
                loss = self.base.loss(batch)
            else:
                outputs = self.base.forward(batch.inputs)
                loss = self.context.objective.loss(outputs, batch.targets)
            uphill = self.context.differentiation.gradients(loss, self._weights)
        with torch.no_grad():
            if self.form == "relative":
                uphill = rescaled(uphill, self._weights)
            torch._foreach_addcmul_(self._weights, self._drift, uphill)
            if self.noise:
                self._noise.add(self._weights, self._spread)

    def after(self, experience: Experience) -> None:
        super().after(experience)
        assert experience.train is not None
        count, generator = len(experience.train), self.context.generator("refresh.fisher")
        order = torch.randperm(count, generator=generator, device=self.context.device)
        found = diagonal_fisher(
            self.model,
            experience.train,
            self.fisher,
            names=self.information.keys(),
            order=order[: self.fisher_samples or count],
            batch_size=self.context.scenario.batch_size if self.fisher == "batch" else 128,
        )
        for name, old in self.information.items():
            old.mul_(self.decay).add_(found[name])


def rescaled(gradients: tuple[Tensor, ...], weights: list[Tensor]) -> tuple[Tensor, ...]:
    """Each gradient with the direction that it has and the norm of its weights."""
    norms = zip(torch._foreach_norm(weights), torch._foreach_norm(gradients), strict=True)
    tiny = torch.finfo(gradients[0].dtype).tiny
    return tuple(g * (w / (n + tiny)) for g, (w, n) in zip(gradients, norms, strict=True))


@contextmanager
def unnoticed(model: nn.Module, context: Context) -> Iterator[None]:
    """Afterwards batch statistics and all random streams, dropout's too, are as they were."""
    buffers = list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    states = {key: generator.get_state() for key, generator in context.generators.items()}
    with torch.random.fork_rng([context.device] if context.device.type == "cuda" else []):
        yield
    for key, generator in context.generators.items():
        if key in states:
            generator.set_state(states[key])
        else:
            generator.manual_seed(generator.initial_seed())
    if buffers:
        torch._foreach_copy_(buffers, kept)
