"""EASE: expandable subspace ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nn.adapters import Adapters, AdapterSets
from clbench.nn.heads import CosineHead
from clbench.nn.prototypes import Prototypes, only
from clbench.nn.vit import vision_transformer
from clbench.pretrained import (
    in_order,
    positions,
    require_classifier,
    require_vision_transformer,
)
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario, Setting, require


@dataclass(kw_only=True)
class EASE(GradientStrategy):
    """A new set of adapters for each experience; prototypes in the features of all of them.

    Paper: Zhou, Sun, Ye and Zhan 2024, "Expandable Subspace Ensemble for Pre-Trained Model-Based
    Class-Incremental Learning", arXiv 2403.12030; code: sun-hailong/LAMDA-PILOT.

    Training: adapters A_j, new ones in a frozen vision transformer, minimise with a temporary
    cosine classifier (its scale learned from 1 on) the cross-entropy over the classes of
    experience j; then they are frozen. f_j are the features with A_j.

    Prototypes: p_j(c) is the mean of f_j over class c. For a class c of an experience i < j, whose
    samples are gone when A_j comes, it is made from its likeness to classes k that came with A_j
    or later, all of them measured in both: p_j(c) = Σ_k w_k p_j(k), w = softmax_k cos(p_i(c),
    p_i(k)). All of these are made anew after every experience.

    Output for a class of experience i, of b experiences:
    cos(f_i(x), p_i(c)) + alpha / (b - 1) Σ_{j≠i} cos(f_j(x), p_j(c)).

    Attributes:
        bottleneck: Rows of W_d in an adapter A(x) = s (W_u ReLU(W_d x + b_d) + b_u).
        adapter_scale: s.
        dropout: On the hidden units of the adapters, in training.
        alpha: Weight of the subspaces of other experiences.

    **Differs from the paper:** as in the code, whose defaults these are, the softmax is over the
    classes k and alpha is divided by b - 1. The learning rate follows its cosine after every step,
    where the code follows it after every epoch; the passes are the scenario's. The frozen model's
    own features, which the code can add to the concatenation and by default does not, are left
    out. During an experience the answers are those of the experience before. b passes through the
    model for every image.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.CLASS_INCREMENTAL})

    bottleneck: int = 64
    adapter_scale: float = 0.1
    dropout: float = 0.1
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "bottleneck", at_least=1)
        require(self, "adapter_scale", above=0)
        require(self, "dropout", at_least=0, at_most=1)
        require(self, "alpha", at_least=0)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        require_vision_transformer("ease", scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self._features = require_classifier("ease", model).features
        self._vit = vision_transformer(model)
        model.requires_grad_(False)
        self._renew(torch.Generator())
        self.adapters = AdapterSets(self._adapters)
        self.owners = torch.full((context.n_outputs,), -1, device=context.device)
        shape = 0, context.n_outputs, self._features.n_features
        self.measured = torch.zeros(shape, device=context.device)

    def before(self, experience: Experience) -> None:
        """New adapters and a classifier for the classes of this experience."""
        generator = self.context.generator("adapters", torch.device("cpu"))
        self._renew(generator)
        width, count = self._features.n_features, len(experience.classes)
        head = CosineHead(width, count, 1.0, learnable=True, generator=generator)
        self._head = head.to(self.context.device)
        self._positions = positions(experience.classes, self.context)

    def _renew(self, generator: torch.Generator) -> None:
        scale, dropout = self.adapter_scale, self.dropout
        adapters = Adapters(self._vit, self.bottleneck, scale, dropout, generator)
        self._adapters = adapters.to(self.context.device)
        self.model.add_module("adapters", self._adapters)

    def begin(self, steps: int) -> None:
        super().begin(steps)
        self._features.eval()

    def trainable(self) -> list[nn.Parameter]:
        return [*super().trainable(), *self._head.parameters()]

    def loss(self, batch: Batch) -> Tensor:
        logits = self._head(self.features(batch.inputs, self._adapters))
        return F.cross_entropy(logits, self._positions[batch.targets])

    @torch.no_grad()
    def after(self, experience: Experience) -> None:
        """The means of the new classes in all subspaces; of the old ones there are no samples."""
        assert experience.train is not None
        self.adapters.add(self._adapters)
        self.owners[list(experience.classes)] = len(self.adapters) - 1
        shape = len(self.owners), self._features.n_features
        means = [Prototypes(*shape).to(self.context.device) for _ in self.adapters]
        for batch in in_order(experience.train, self.context.scenario.batch_size):
            for prototypes, features in zip(means, self.subspaces(batch.inputs), strict=True):
                prototypes.add(features, batch.targets)
        self.measured = torch.cat((self.measured, torch.zeros_like(means[0].means())[None]))
        self.measured += torch.stack([prototypes.means() for prototypes in means])

    def predict(self, batch: Batch) -> Tensor:
        count, classes = len(self.adapters), len(self.owners)
        scores = torch.zeros(len(batch), classes, device=self.context.device)
        prototypes = synthesised(self.measured, self.owners)
        for j, features in enumerate(self.subspaces(batch.inputs)):
            cosines = F.normalize(features) @ F.normalize(prototypes[j], dim=1).T
            scores += cosines * torch.where(self.owners == j, 1, self.alpha / max(count - 1, 1))
        return only(self.owners >= 0, scores)

    @torch.no_grad()
    def subspaces(self, inputs: Tensor) -> list[Tensor]:
        """f_j(x) of every experience so far, [B, n_features] each."""
        return [self.features(inputs, self.adapters.of(j)) for j in range(len(self.adapters))]

    def features(self, inputs: Tensor, adapters: Adapters) -> Tensor:
        """Features with a set of adapters, [B, n_features] in fp32."""
        with adapters.put_into(self._vit), self.context.autocast():
            features: Tensor = self._features(inputs)
        return features.float()


def synthesised(measured: Tensor, owners: Tensor) -> Tensor:
    """Prototypes of every class in every subspace.

    Args:
        measured: p_j(c) where there were samples: in the subspaces up to that of the class's own
            experience, [b, C, D].
        owners: The experience of each class, [C] int64; -1: it has not come.

    Returns:
        [b, C, D], with those that could not be measured made from classes that could.
    """
    whole = measured.clone()
    for j in range(1, len(measured)):
        later = owners >= j
        for i in range(j):
            mine = owners == i
            likeness = F.normalize(measured[i, mine], dim=1) @ (
                F.normalize(measured[i, later], dim=1).T
            )
            whole[j, mine] = likeness.softmax(1) @ measured[j, later]
    return whole
