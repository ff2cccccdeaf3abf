"""Models of RobustBench's zoo, where that library is installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from clbench import cache, checksums
from clbench.errors import UserError
from clbench.nn.backbones import Backbone, FeatureExtractor, ModelFeatures
from clbench.nn.cutting import features_of, without_head
from clbench.nn.weights import State, brief
from clbench.types import LOCATION

_CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


@dataclass(kw_only=True)
class RobustBench(Backbone):
    """A trained model of RobustBench (Croce et al. 2021, arXiv 2010.09670) by name.

    The literature's source models of corrupted images: for CIFAR-10-C "Standard" (WideResNet-
    28-10), for CIFAR-100-C "Hendrycks2020AugMix_ResNeXt". They normalise their inputs themselves,
    so `mean` and `std` are 0 and 1 unless given. The library is imported, and downloads the
    weights, when the model is made; a file that has changed since then is refused.

    Attributes:
        weights: None: the zoo's.
        name: In the zoo, for the dataset and the threat model.
        dataset: That it was trained on.
        threat_model: The zoo's list: "corruptions", "Linf", "L2".
        model_dir: Where weights are kept; None: the user's cache folder.
    """

    load_head: bool = True
    name: str = "Standard"
    dataset: Literal["cifar10", "cifar100", "imagenet"] = "cifar10"
    threat_model: Literal["corruptions", "Linf", "L2"] = "corruptions"
    model_dir: Path | None = field(default=None, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            raise UserError(
                "backbone.weights does not go with backbone=robustbench, which has weights of its "
                "own: leave it out, or choose another backbone."
            )
        if self.mean is None:
            self.mean, self.std = (0.0,) * 3, (1.0,) * 3

    @property
    def starts_trained(self) -> bool:
        return True

    @property
    def title(self) -> str:
        return f"robustbench/{self.name}"

    def published(self) -> dict[str, Any] | None:
        return {"zoo": "RobustBench", "dataset": self.dataset, "threat_model": self.threat_model}

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        model = self._load()
        whose = f"RobustBench's {self.name}"
        head = dict(without_head(model, _CLASSES[self.dataset], whose).state_dict())
        return ModelFeatures(model, features_of(model, image_shape, whose)), head

    def _load(self) -> nn.Module:
        try:
            zoo = importlib.import_module("robustbench.utils")
        except ImportError as error:
            raise UserError(
                f"backbone=robustbench needs the package robustbench ({error}). Install it: "
                "pip install robustbench, or choose another backbone."
            ) from error
        folder = self.model_dir or cache.default_folder() / "robustbench"
        try:
            with checksums.watched(folder):
                model = zoo.load_model(
                    model_name=self.name,
                    model_dir=str(folder),
                    dataset=self.dataset,
                    threat_model=self.threat_model,
                )
        except UserError:
            raise
        # The zoo, its downloads and unpickling share no base class for what goes wrong here.
        except Exception as error:
            raise UserError(
                f"RobustBench can't load {self.name} for dataset={self.dataset} and "
                f"threat_model={self.threat_model}: {type(error).__name__}: {brief(error)}. "
                f"robustbench.utils.list_available_models lists the names; files are kept in "
                f"{folder}."
            ) from error
        assert isinstance(model, nn.Module)
        return model.eval()
