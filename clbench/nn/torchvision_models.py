"""Models of torchvision by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from clbench import checksums, downloads
from clbench.errors import UserError, did_you_mean
from clbench.nn.backbones import Backbone, FeatureExtractor, ModelFeatures
from clbench.nn.cutting import features_of, without_head
from clbench.nn.weights import WRAPPERS, State, brief, fit, read, unwrap

#: Classes of ImageNet, which all of torchvision's classifiers know.
_CLASSES = 1000


@dataclass(kw_only=True)
class TorchVision(Backbone):
    """Any image classifier of torchvision by name, without its last linear layer.

    With trained weights and no `mean`, `mean` and `std` become those that torchvision records for
    the weights. Weight files are state dicts of the whole classifier, as torchvision publishes
    them.

    Attributes:
        name: As in `torchvision.models.list_models(torchvision.models)`.
        pretrained: Download torchvision's weights, or take them from torch's cache.
        tag: Which weights, as in "IMAGENET1K_V2"; "DEFAULT": the newest. Also says what `mean`
            and `input_size` a weight file goes with.
        input_size: "images": the model reads them in the size that they come in; "weights": they
            are resized (bicubic, antialiased, on the device) to the size that the weights were
            trained for.
    """

    name: str
    pretrained: bool = False
    tag: str = "DEFAULT"
    input_size: Literal["images", "weights"] = "images"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained and self.weights is not None:
            raise UserError("backbone.pretrained=true and backbone.weights: give one of them.")
        preset = _preset(self.name, self.tag)
        if self.starts_trained and self.mean is None:
            self.mean, self.std = tuple(preset.mean), tuple(preset.std)

    @property
    def starts_trained(self) -> bool:
        return self.pretrained or self.weights is not None

    @property
    def title(self) -> str:
        return f"torchvision/{self.name}"

    def published(self) -> dict[str, Any] | None:
        if not self.pretrained:
            return None
        weights = _weights(self.name, self.tag)
        return {"tag": str(weights), "hub": None, "url": weights.url}

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        whose = f"torchvision's {self.name}"
        if image_shape[0] != 3:
            raise UserError(
                f"{whose} reads three channels, and the images have {image_shape[0]}. Set "
                "scenario.channels=3, or choose another backbone."
            )
        size = None
        if self.input_size == "weights":
            (side,) = _preset(self.name, self.tag).crop_size
            size = side, side
        model = self._create(whose)
        if self.weights is not None:
            fit(model, unwrap(read(self.weights), WRAPPERS), self.weights)
        head = dict(without_head(model, _CLASSES, whose).state_dict())
        n_features = features_of(model, (3, *(size or image_shape[1:])), whose)
        return ModelFeatures(model, n_features, size), head if self.starts_trained else {}

    def _create(self, whose: str) -> nn.Module:
        from torchvision import models

        chosen = _weights(self.name, self.tag) if self.pretrained else None
        if chosen is not None:
            _require_tensors(chosen.url)
        try:
            model: nn.Module = models.get_model(self.name, weights=chosen)
        except Exception as error:
            raise UserError(
                f"torchvision couldn't build {self.name}: {brief(error)}. Change backbone.name or "
                "its options."
            ) from error
        if getattr(model, "aux_logits", False):
            raise UserError(f"{whose} has several outputs. Choose another backbone.name.")
        return model


def _require_tensors(address: str) -> None:
    """Fetches a file of weights to where torchvision takes it from, and looks at it before.

    Its name ends in the first digits of its SHA-256. torchvision compares them when it fetches
    the file, never later, and would unpickle whatever is there.

    Raises:
        UserError: If it can't be fetched, is another file, or holds more than tensors.
    """
    folder, name = Path(torch.hub.get_dir()) / "checkpoints", address.rpartition("/")[2]
    stated = torch.hub.HASH_REGEX.search(name)
    ours = checksums.known().get(name)
    expected = ours or (stated.group(1) if stated else "")
    path, there = folder / name, (folder / name).is_file()
    with nullcontext() if there else downloads.fetching(folder):
        downloads.kept(path, [address], expected, "the suite" if ours else "its name")
        if there:
            checksums.compare(folder, [path])
        else:
            checksums.remember(folder, [path])
    read(str(path))


def _weights(name: str, tag: str) -> Any:
    """torchvision's record of weights.

    Raises:
        UserError: If it knows no such classifier, or no such weights of it.
    """
    import torchvision
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        guess = did_you_mean(name, known)
        raise UserError(
            f"backbone.name={name}: torchvision {torchvision.__version__} has no such classifier. "
            f"{guess}"
        )
    every = models.get_model_weights(name)
    if tag not in every.__members__:
        guess = did_you_mean(tag, every.__members__)
        raise UserError(f"backbone.tag={tag}: there are no such weights of {name}. {guess}")
    return every[tag]


def _preset(name: str, tag: str) -> Any:
    """How images are prepared for these weights: mean, std, crop_size."""
    transforms: Callable[[], Any] = _weights(name, tag).transforms
    return transforms()
