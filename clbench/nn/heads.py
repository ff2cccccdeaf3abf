"""Classification heads, and classifiers made of a backbone and a head."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError, did_you_mean
from clbench.nn.backbones import Backbone, FeatureExtractor
from clbench.nn.weights import State, fit

_log = logging.getLogger(__name__)


class CosineHead(nn.Module):
    """Logits are scaled cosines between a feature vector and one weight vector per class.

    z_c = scale * <x, w_c> / (|x| |w_c|). Without a bias or norms, classes with many recent
    samples can't win by larger weights (Hou et al. 2019, LUCIR). A zero vector has cosine 0.

    **Differs from the paper:** the scale is fixed at 10, as in ER-ACE (Caccia et al. 2022,
    2104.05025); LUCIR learns it, starting at 1: `scale=1.0, learnable=True`.

    Args:
        in_features: Length of the feature vectors.
        out_features: Number of classes.
        scale: Largest logit; the start when it is learnable.
        learnable: Train the scale with the weights.
        generator: Draws the weights, on the CPU; default: torch's global one.

    Attributes:
        weight: [out_features, in_features], as in `nn.Linear`; uniform in ±1/sqrt(in_features).
        scale: Scalar tensor: a parameter if learnable, else a buffer.
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 10.0,
        learnable: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = in_features**-0.5
        weight = torch.empty(out_features, in_features)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        if learnable:
            self.scale = nn.Parameter(torch.tensor(scale))
        else:
            self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] to logits [B, out_features] in [-scale, scale]."""
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


_HEADS: dict[str, Callable[[int, int], nn.Module]] = {"linear": nn.Linear, "cosine": CosineHead}


class Classifier(nn.Module):
    """A head on features.

    Args:
        features: [B, C, H, W] to [B, n_features].
        head: [B, n_features] to logits [B, n_classes].
        head_loaded: Whether the head came with the backbone's weights.
    """

    def __init__(
        self, features: FeatureExtractor, head: nn.Module, head_loaded: bool = False
    ) -> None:
        super().__init__()
        self.features, self.head, self.head_loaded = features, head, head_loaded

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, n_classes]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def classifier(
    backbone: Backbone,
    image_shape: tuple[int, int, int],
    n_classes: int,
    head: Literal["linear", "cosine"] = "linear",
) -> Classifier:
    """A backbone with a new head, or, with `backbone.load_head`, the head of its weights.

    A loaded head needs as many outputs as there are classes; otherwise it is dropped with a
    warning in the log, and `head_loaded` stays False.

    Args:
        backbone: Options of the features.
        image_shape: (channels, height, width).
        n_classes: Outputs.
        head: "linear" (`nn.Linear`, PyTorch's initialisation) or "cosine" (`CosineHead`).

    Raises:
        UserError: If the head is unknown, or the weights hold no head to load or one of the
            other kind, or as `Backbone.build`.
    """
    if head not in _HEADS:
        raise UserError(f"There is no head {head!r}. {did_you_mean(head, _HEADS)}")
    if n_classes < 1:
        raise UserError(f"A classifier needs at least one class, not {n_classes}.")
    features, trained = backbone.build_with_head(image_shape)
    # Built even if it is replaced, so that loading a head draws the same random numbers.
    layer = _HEADS[head](features.n_features, n_classes)
    loaded = backbone.load_head and _load_head(layer, trained, n_classes, backbone)
    return Classifier(features, layer, loaded)


def _load_head(layer: nn.Module, trained: State, n_classes: int, backbone: Backbone) -> bool:
    """Loads the final layer of the backbone's weights. False: it has other classes."""
    source = backbone.weights or backbone.title
    if not trained:
        raise UserError(
            f"backbone.load_head=true, but {source} holds no final layer (linear, fc, head or "
            "classifier), or several: set backbone.load_head=false."
        )
    outputs = trained["weight"].shape[0]
    if outputs != n_classes:
        _log.warning(
            "The head of %s has %d outputs and the scenario %d classes: a new head is used.",
            source,
            outputs,
            n_classes,
        )
        return False
    fit(layer, trained, source)
    return True
