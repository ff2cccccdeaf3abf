"""What methods for pre-trained models share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.classification import ImageScenario
from clbench.errors import UserError
from clbench.nn.adapters import SSF, VPT, Adapters
from clbench.nn.heads import Classifier, CosineHead
from clbench.nn.vit import BACKBONES, vision_transformer
from clbench.samples import Batch, Samples
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario, require


def require_vision_transformer(strategy: str, scenario: Scenario) -> None:
    """For `Strategy.check`: refuses a scenario whose model is no vision transformer of timm.

    Args:
        strategy: The name that the message gives the method.
        scenario: What it is asked to work on.

    Raises:
        UserError: With the backbones that work.
    """
    if isinstance(scenario, ImageScenario) and scenario.backbone.is_vision_transformer:
        return
    made = f"backbone {scenario.backbone.title}" if isinstance(scenario, ImageScenario) else "model"
    raise UserError(
        f"{strategy} needs a vision transformer of timm, not the {made} of this scenario. "
        f"{BACKBONES}"
    )


def require_classifier(strategy: str, model: nn.Module) -> Classifier:
    """The model, if it has features and a head.

    Raises:
        UserError: If it is of another kind.
    """
    if not isinstance(model, Classifier):
        raise UserError(
            f"{strategy} needs a model with features and a head (clbench.nn.heads.Classifier), "
            f"but this scenario makes a {type(model).__name__}."
        )
    return model


def in_order(samples: Samples, batch_size: int) -> Iterator[Batch]:
    """All samples once, as they lie, without augmentation."""
    everything = torch.arange(len(samples), device=samples.index.device)
    return samples.batches(everything, batch_size)


def positions(classes: tuple[int, ...], context: Context) -> Tensor:
    """Where each class stands in `classes`, [n_outputs] int64; -1 for the others."""
    where = torch.full((context.n_outputs,), -1)
    where[list(classes)] = torch.arange(len(classes))
    return where.to(context.device)


@dataclass(kw_only=True)
class TunedOnce(GradientStrategy, ABC):
    """A pre-trained model tuned in the first experience and frozen from then on.

    The tuning minimises the cross-entropy of a cosine classifier over the classes of the first
    experience, its scale learned from 1 on; the classifier is then thrown away. What is tuned is
    put beside or between the frozen weights, which stay as they are, or, with "full", it is a
    copy of all weights. `after` comes then, and in every later
    experience alone.

    Attributes:
        tuning: "adapter", "ssf", "vpt_shallow", "vpt_deep" (see `clbench.nn.adapters`), "full",
            or "none": no tuning.
        bottleneck: Hidden units of an adapter.
        adapter_scale: Factor s of an adapter.
        dropout: On the hidden units of an adapter, in training.
        prompt_length: Tokens of a prompt.
    """

    tuning: Literal["none", "adapter", "ssf", "vpt_shallow", "vpt_deep", "full"] = "adapter"
    bottleneck: int = 64
    adapter_scale: float = 0.1
    dropout: float = 0.1
    prompt_length: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "bottleneck", "prompt_length", at_least=1)
        require(self, "adapter_scale", above=0)
        require(self, "dropout", at_least=0, at_most=1)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if self.tuning not in ("none", "full"):
            name = f"{type(self).__name__} with strategy.tuning={self.tuning}"
            require_vision_transformer(name, scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        classifier = require_classifier(type(self).__name__, model)
        self._features, self._n_features = classifier.features, classifier.features.n_features
        self.tuned = self.tuning == "none"
        self._parts = self._make_parts()
        self.frozen = copy.deepcopy(self._features) if self.tuning == "full" else nn.Identity()
        if self._parts is not None:
            model.add_module("tuning", self._parts.to(context.device))
        for module in (model, self.frozen):
            module.requires_grad_(False).eval()

    def _make_parts(self) -> Adapters | SSF | VPT | None:
        if self.tuning in ("none", "full"):
            return None
        vit = self._vit = vision_transformer(self.model)
        generator = self.context.generator("tuning", torch.device("cpu"))
        if self.tuning == "adapter":
            return Adapters(vit, self.bottleneck, self.adapter_scale, self.dropout, generator)
        if self.tuning == "ssf":
            return SSF(vit, generator)
        return VPT(vit, self.prompt_length, deep=self.tuning == "vpt_deep")

    @property
    def keeps_features(self) -> bool:
        return self.tuning == "none"

    def learn(self, experience: Experience) -> None:
        if experience.train is None:
            return
        self._counted = not self.tuned
        if not self.tuned:
            self.before(experience)
            self.fit(self.material(experience))
            self.model.requires_grad_(False)
            self.tuned = True
        self.after(experience)

    def look(self, samples: Samples) -> Iterator[Batch]:
        """All samples once, as they lie; a step each, but for those that were tuned on."""
        for batch in in_order(samples, self.context.scenario.batch_size):
            yield batch
            if not self._counted:
                self.context.on_step(len(batch))

    def before(self, experience: Experience) -> None:
        """A classifier for the classes of the first experience."""
        generator = self.context.generator("tuning", torch.device("cpu"))
        head = CosineHead(
            self._n_features, len(experience.classes), 1.0, learnable=True, generator=generator
        )
        self._head = head.to(self.context.device)
        self._positions = positions(experience.classes, self.context)
        (self._features if self._parts is None else self._parts).requires_grad_(True)

    def begin(self, steps: int) -> None:
        super().begin(steps)
        if self._parts is not None:
            self._features.eval()

    def trainable(self) -> list[nn.Parameter]:
        return [*super().trainable(), *self._head.parameters()]

    def loss(self, batch: Batch) -> Tensor:
        logits = self._head(self.tuned_features(batch.inputs))
        return F.cross_entropy(logits, self._positions[batch.targets])

    def tuned_features(self, inputs: Tensor) -> Tensor:
        """Features of the model as it was tuned, [B, n_features] in fp32."""
        with self._tuned_model(), self.context.autocast():
            features: Tensor = self._features(inputs)
        return features.float()

    def frozen_features(self, inputs: Tensor) -> Tensor:
        """Features of the model as it came, [B, n_features] in fp32."""
        model = self.frozen if self.tuning == "full" else self._features
        with self.context.autocast():
            features: Tensor = model(inputs)
        return features.float()

    def _tuned_model(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._parts is None else self._parts.put_into(self._vit)

    @abstractmethod
    def after(self, experience: Experience) -> None:
        """Every experience, the first one after its tuning: what is learned from its features."""

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor: ...
