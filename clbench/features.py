"""Features of a backbone that nothing changes: made once, kept, and learned from ever after."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench import cache, machine
from clbench.classification import ImageScenario
from clbench.config import options
from clbench.errors import UserError
from clbench.nn.backbones import FeatureExtractor
from clbench.nn.heads import Classifier
from clbench.nn.transforms import Identity, Transform
from clbench.progress import counting
from clbench.rows import Rows
from clbench.samples import MappedSource, Samples, Source, TensorSource
from clbench.source_model import digest
from clbench.types import Scenario, Strategy, Stream

_VERSION = 1
#: Images embedded at once: decides speed, memory and the last bits, so it never changes.
_AT_ONCE = 256
#: Samples whose inputs tell one transform from another.
_PROBED = 64
_OFF = "or set cache_features=false."


def check(scenario: Scenario, strategy: Strategy) -> None:
    """Refuses a pair that can't learn from kept features, before anything is loaded.

    Raises:
        UserError: With what would work.
    """
    if not strategy.keeps_features:
        raise UserError(
            f"cache_features=true, but {type(strategy).__name__} with these options changes the "
            "features or looks into the backbone, so there are none to keep. Choose a method that "
            f"leaves them as they are (one that tunes once does with strategy.tuning=none), {_OFF}"
        )
    if not isinstance(scenario, ImageScenario):
        raise UserError(
            f"cache_features=true, but {type(scenario).__name__} has no backbone. Choose a "
            f"scenario of images, {_OFF}"
        )


class Kept(FeatureExtractor):
    """In the place of a backbone: features come as they are.

    Args:
        n_features: Length of a feature vector.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.n_features = n_features

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_features] to the same."""
        return x


class _OfStored(Identity):
    """Features of images as they are stored; those of augmented ones are not there."""

    def __init__(self, augments: bool) -> None:
        self._augments = augments

    @property
    def augments(self) -> bool:
        return self._augments

    def train(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        if self._augments:
            raise UserError(
                "cache_features=true keeps one feature vector of each image, but this method asks "
                f"for augmented images. Switch the scenario's augmentation off, {_OFF}"
            )
        return super().train(raw, generator)


def kept(
    scenario: Scenario,
    stream: Stream,
    model: torch.nn.Module,
    precision: str,
    cache_dir: Path | None,
) -> tuple[Stream, Classifier]:
    """A stream of features, and a model for it: the head, behind features that come ready.

    The features are those of every image as it is stored, made by the model in evaluation mode at
    the first call and read from the cache folder from then on. They are told by the content of
    the images, the transform, the weights and options of the backbone, the precision, and what
    else decides bits: device, threads, kind of processor, versions.

    Args:
        scenario: Where both come from.
        stream: On the device.
        model: On the device.
        precision: Of the run.
        cache_dir: The cache folder; None: the user's.

    Raises:
        UserError: If the model has no features, or the cache can't be written.
    """
    if not isinstance(model, Classifier) or not isinstance(scenario, ImageScenario):
        raise UserError(
            f"cache_features=true needs a model with features and a head, but this scenario makes "
            f"a {type(model).__name__}. Choose another scenario, {_OFF}"
        )
    store = _Store(model.features.eval(), options(scenario.backbone), precision, cache_dir)
    transform = _OfStored(stream.transform.augments)
    known: dict[tuple[int, int], Source] = {}

    def embed(samples: Samples) -> Samples:
        key = id(samples.source), id(samples.transform)
        if key not in known:
            known[key] = store.embedded(samples.source, samples.transform)
        return Samples(known[key], samples.index, transform)

    embedded = replace(stream.mapped(embed), transform=transform)
    return embedded, Classifier(Kept(model.features.n_features), model.head, model.head_loaded)


class _Store:
    """The features of one backbone.

    Args:
        features: In evaluation mode, on the device.
        backbone: Its options, plain data.
        precision: Of the run.
        cache_dir: The cache folder; None: the user's.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        backbone: Mapping[str, Any],
        precision: str,
        cache_dir: Path | None,
    ) -> None:
        self.features, self.precision = features, precision
        self.folder = cache_dir or cache.default_folder()
        self.key = {
            "version": _VERSION,
            "backbone": dict(backbone),
            "weights": digest(features),
            "precision": precision,
            "at_once": _AT_ONCE,
        }

    def embedded(self, source: Source, transform: Transform) -> Source:
        """The same samples as features, with the same labels."""
        shape = len(source), self.features.n_features
        key = {
            **self.key,
            "samples": _content(source),
            "transform": _described(transform, source),
            "machine": _machine(source.device),
        }

        def make(lend: cache.Lend) -> dict[str, Rows]:
            out = lend("features", shape, np.float32)
            with counting("embedding", "images") as tell:
                for rows, found in self._batches(source, transform):
                    out[rows] = found
                    tell(rows.stop, len(source))
            return {"features": out}

        large = 4 * shape[0] * shape[1] > machine.available_memory() / 2
        found = cache.filled(self.folder, "features", key, make, mmap=large)["features"]
        if large:
            return MappedSource(Rows.behind(found), source.targets)
        return TensorSource(torch.from_numpy(found).to(source.device), source.targets)

    @torch.inference_mode()
    def _batches(
        self, source: Source, transform: Transform
    ) -> Iterator[tuple[slice, NDArray[Any]]]:
        device = source.device
        mixed = torch.autocast(
            device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )
        for rows, raw in _chunks(source):
            with mixed:
                features = self.features(transform.test(raw))
            yield rows, features.float().cpu().numpy()


def _chunks(source: Source) -> Iterator[tuple[slice, Tensor]]:
    """All stored samples in order, some at once."""
    for start in range(0, len(source), _AT_ONCE):
        rows = slice(start, min(start + _AT_ONCE, len(source)))
        yield rows, source.gather(torch.arange(rows.start, rows.stop, device=source.device))


def _content(source: Source) -> str:
    """SHA-256 of all stored samples."""
    sha = hashlib.sha256()
    for rows, raw in _chunks(source):
        if not rows.start:
            sha.update(f"{len(source)} {[*raw.shape[1:]]} {raw.dtype}\n".encode())
        sha.update(raw.cpu().contiguous().numpy().data)
    return sha.hexdigest()


def _described(transform: Transform, source: Source) -> dict[str, str]:
    """The transform's class, and what it makes of a few samples."""
    few = torch.arange(min(_PROBED, len(source)), device=source.device)
    inputs = transform.test(source.gather(few)).cpu().contiguous()
    kind = type(transform)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "inputs": hashlib.sha256(inputs.numpy().data).hexdigest(),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of features besides numbers and code."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {name: machine.version(name) for name in ("torch", "torchvision", "timm")}
    processor = torch.backends.cpu.get_cpu_capability()
    return {"device": kind, "processor": processor, "threads": torch.get_num_threads(), **versions}
