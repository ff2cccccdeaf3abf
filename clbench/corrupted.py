"""Streams of test-time adaptation: clean images, corrupted in one way after another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clbench import cache, config, source_model
from clbench.chained import chained
from clbench.classification import Classification, Images, ImageScenario
from clbench.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt, frost_source
from clbench.division import held_out
from clbench.errors import UserError, did_you_mean
from clbench.nn.heads import Classifier
from clbench.nn.transforms import Transform
from clbench.progress import counting
from clbench.samples import Samples
from clbench.shifts import correlated, severities
from clbench.types import (
    LOCATION,
    Arrivals,
    Experience,
    Objective,
    Setting,
    Split,
    Stream,
    derive_seed,
    require,
)

#: Raised when other code below makes other images from the same options.
_VERSION = 1
#: Images corrupted between two looks at the progress.
_CHUNK = 500


@dataclass(kw_only=True)
class CorruptedImages(ImageScenario):
    """Base: the test images of a dataset, corrupted; a model that was trained on the clean ones.

    TUNE and EVALUATE share no test image and no corruption: TUNE has the four extra ones, or
    what `corruptions` names of them. Of the test images of each split a part is held out; on it
    the strategy answers after every experience without learning from it. The seed decides the
    order of arrival, never the images.

    Attributes:
        corruptions: Names, in the order of arrival; empty: the 15 (TUNE: the 4 extra ones).
        severity: 1 to 5.
        arrival: "domains", one after another; "gradual", each as severities 1, 2, ...
            `severity`, ..., 2, 1; "mixed", all shuffled and cut into as many experiences.
        labels: "shuffled", or "correlated": neighbours tend to have the same label.
        delta: How little "correlated" labels mix (Dirichlet); 0: one class after another.
        reset: When the strategy is put back: "never", before each "experience", or after each
            "batch".
        repeats: How often the whole stream comes.
        samples: Images of each domain that arrive (of each severity, if gradual); 0: all.
        held_out: Part of the images that is held out; 0: none, and only answers to what arrives
            are measured.
        tuning_fraction: Part of the dataset's test images that TUNE gets; 0: none.
        source_epochs: Where `backbone.weights` brings no model: passes of its training.
        source_lr: Largest learning rate of it.
        cache_dir: Where corrupted images and source models are kept; None: the user's.
        frost_folder: Folder of the published photos of frost; None: a procedural texture.
    """

    setting: ClassVar[Setting] = Setting.TEST_TIME_ADAPTATION

    corruptions: tuple[str, ...] = ()
    severity: int = 5
    arrival: Literal["domains", "gradual", "mixed"] = "domains"
    labels: Literal["shuffled", "correlated"] = "shuffled"
    delta: float = 0.1
    reset: Literal["never", "experience", "batch"] = "never"
    repeats: int = 1
    samples: int = 0
    held_out: float = 0.2
    tuning_fraction: float = 0.2
    source_epochs: int = 20
    source_lr: float = 3e-3
    cache_dir: Path | None = field(default=None, metadata=LOCATION)
    frost_folder: Path | None = field(default=None, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "severity", at_least=1, at_most=5)
        require(self, "repeats", "source_epochs", at_least=1)
        require(self, "samples", "delta", at_least=0)
        require(self, "held_out", "tuning_fraction", at_least=0, at_most=0.9)
        require(self, "source_lr", above=0)
        known = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
        for name in self.corruptions:
            if name not in known:
                raise UserError(
                    f"scenario.corruptions: there is no {name!r}. {did_you_mean(name, known)}"
                )
        if self.labels == "correlated" and self.arrival == "mixed":
            raise UserError(
                "scenario.labels=correlated is an order within a domain; it does not go with "
                "scenario.arrival=mixed."
            )

    @abstractmethod
    def clean(self) -> Images:
        """The clean dataset: its training part is the source's, its test part gets corrupted."""

    def images(self, split: Split) -> Images:  # noqa: ARG002
        return self.clean()

    def objective(self) -> Objective:
        return Classification(task_aware=False, apart=True)

    def check(self, split: Split) -> None:
        if split is Split.TUNE and not self.tuning_fraction:
            raise UserError("scenario.tuning_fraction=0 leaves no images for split=tune.")
        self.chosen(split)

    def chosen(self, split: Split) -> tuple[str, ...]:
        """Names of the corruptions of a split."""
        if not self.corruptions:
            return CORRUPTIONS if split is Split.EVALUATE else EXTRA_CORRUPTIONS
        if split is Split.EVALUATE:
            return self.corruptions
        left = tuple(c for c in EXTRA_CORRUPTIONS if c not in self.corruptions)
        if not left:
            raise UserError(
                "scenario.corruptions names all four extra ones, which leaves none for "
                f"split=tune. Leave out one of {', '.join(EXTRA_CORRUPTIONS)}."
            )
        return left

    def positions(self, images: Images, split: Split) -> tuple[Tensor, Tensor]:
        """Which test images of the dataset arrive, and which are held out: always the same ones.

        Returns:
            Two times positions in `images.test`: ascending ones, and those held out in an order
            that has nothing to do with their classes, as a dataset's own may: a batch of them is
            to have the statistics of its domain.
        """
        labels = images.test.targets
        parts = held_out(labels, self.tuning_fraction, "test-time tuning")
        mine = parts[0] if split is Split.EVALUATE else parts[1]
        online, held = (
            mine[part] for part in held_out(labels[mine], self.held_out, "test-time held out")
        )
        if 0 < self.samples < len(online):
            some = held_out(labels[online], self.samples / len(online), "test-time samples")[1]
            online = online[some]
        elif self.samples > len(online):
            raise UserError(
                f"scenario.samples={self.samples}, but {len(online)} images of each domain are "
                "there to arrive. Ask for fewer, or lower scenario.held_out or "
                "scenario.tuning_fraction."
            )
        generator = torch.Generator().manual_seed(derive_seed(0, "order of held-out images"))
        return online, held[torch.randperm(len(held), generator=generator)]

    def corrupted(
        self, images: Images, positions: Tensor, name: str, severity: int
    ) -> NDArray[np.uint8]:
        """Some test images of the dataset under one corruption.

        Args:
            images: The clean dataset.
            positions: Which test images, [N].
            name: Of the corruption.
            severity: 1 to 5.

        Returns:
            [N, C, H, W], perhaps mapped from a file.
        """
        key = {
            "version": _VERSION,
            "data": {**self.fingerprint(), **images.facts},
            "positions": source_model.sha256(positions),
            "corruption": [name, severity, frost_source(self.frost_folder)],
        }

        def make() -> dict[str, NDArray[Any]]:
            clean = self.uncorrupted(images, positions)
            out = np.empty(clean.shape, np.uint8)
            with counting(f"corrupting: {name} {severity}", "images") as tell:
                for start in range(0, len(clean), _CHUNK):
                    part = slice(start, start + _CHUNK)
                    out[part] = corrupt(
                        clean[part], name, severity, 0, start=start, frost_folder=self.frost_folder
                    )
                    tell(min(start + _CHUNK, len(clean)), len(clean))
            return {"images": out}

        folder = self.cache_dir or cache.default_folder()
        return cache.arrays(folder, "corrupted", key, make)["images"]

    def uncorrupted(self, images: Images, positions: Tensor) -> NDArray[np.uint8]:
        """Some test images of the dataset as they are, [N, C, H, W]; see `corrupted`."""
        pixels: NDArray[np.uint8] = images.test.gather(positions).numpy()
        return pixels

    def stream(self, split: Split, seed: int) -> Stream:
        images, names = self.clean(), self.chosen(split)
        online, held = self.positions(images, split)
        pool = torch.cat((online, held))
        levels = severities(self.severity) if self.arrival == "gradual" else [self.severity]
        segments = {(n, s): i for i, (n, s) in enumerate(product(names, sorted({*levels})))}
        parts = [self.corrupted(images, pool, *segment) for segment in segments]
        targets = images.test.targets[pool]
        labels = targets[: len(online)]
        source = chained(parts, targets.repeat(len(segments)))
        transform = self.transform(images)

        def rows(name: str, severity: int, within: Tensor) -> Tensor:
            return segments[name, severity] * len(pool) + within

        generator = torch.Generator().manual_seed(derive_seed(seed, "order of arrival"))
        arriving: list[tuple[str, Tensor, Tensor]] = []
        for repeat in range(self.repeats):
            later = f" ({repeat + 1})" if repeat else ""
            whole = [
                torch.cat([rows(n, s, self._order(labels, generator)) for s in levels])
                for n in names
            ]
            arranged = self._arrange(names, whole, generator)
            arriving += [(name + later, index, which) for name, index, which in arranged]
        held_out_rows = self._tests(names, rows, torch.arange(len(online), len(pool)))
        # The same rows are the same test, so that it is predicted once.
        tests = {id(index): Samples(source, index, transform) for index in held_out_rows}
        classes = tuple(range(len(images.class_names)))
        train = Samples(images.train, torch.arange(len(images.train)), transform)
        return Stream(
            [Experience(i, name, None, classes) for i, (name, _, _) in enumerate(arriving)],
            [tests[id(index)] for index in held_out_rows] * self.repeats,
            transform,
            len(classes),
            self._facts(images, len(online), len(held)),
            [Arrivals(Samples(source, index, transform), which) for _, index, which in arriving],
            names,
            train if len(train) else None,
            self._clean_test(images, held, transform),
            self.reset,
        )

    def model(self, seed: int, stream: Stream) -> nn.Module:
        model = super().model(seed, stream)
        assert isinstance(model, Classifier)
        if model.head_loaded:
            return model
        if self.backbone.starts_trained:
            raise UserError(
                f"The model before adaptation needs a head for these {stream.n_outputs} classes: "
                "set backbone.load_head=true, with weights that hold such a head, or leave out "
                "backbone.weights and a model is trained on the clean training images."
            )
        assert stream.source is not None, "a dataset without training images has a trained model"
        recipe = source_model.Recipe(epochs=self.source_epochs, lr=self.source_lr)
        options = {"name": self.backbone.title, **config.options(self.backbone)}
        augmentation = {"crop_padding": self.crop_padding, "flip": self.flip, "head": self.head}
        data = {**self.fingerprint(), **stream.facts}
        key = {"backbone": options, "augmentation": augmentation, "data": data}
        source_model.train(model, stream.source, recipe, key, self.cache_dir)
        return model

    def model_facts(self, model: nn.Module) -> Mapping[str, Any]:
        facts = dict(super().model_facts(model))
        return facts | {"source_model_sha256": source_model.digest(model)}

    def _order(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """In which the online images of a domain arrive."""
        if self.labels == "correlated":
            return correlated(labels, self.delta, generator)
        return torch.randperm(len(labels), generator=generator)

    def _arrange(
        self, names: Sequence[str], whole: Sequence[Tensor], generator: torch.Generator
    ) -> list[tuple[str, Tensor, Tensor]]:
        """Name, rows and domains of each experience, from the rows of each domain."""
        which = [torch.full_like(rows, i) for i, rows in enumerate(whole)]
        if self.arrival != "mixed":
            return list(zip(names, whole, which, strict=True))
        order = torch.randperm(sum(map(len, whole)), generator=generator)
        count = len(names)
        parts = (torch.cat(part)[order].tensor_split(count) for part in (list(whole), which))
        rows, domains = parts
        titles = [f"mixed {i + 1}/{count}" for i in range(count)]
        return list(zip(titles, rows, domains, strict=True))

    def _tests(
        self, names: Sequence[str], rows: Callable[[str, int, Tensor], Tensor], held: Tensor
    ) -> list[Tensor]:
        """Held-out rows for each experience; of a mixed stream always the same."""
        if not len(held):
            return []
        tests = [rows(name, self.severity, held) for name in names]
        if self.arrival != "mixed":
            return tests
        everything = torch.cat(tests)
        generator = torch.Generator().manual_seed(derive_seed(0, "order of held-out images"))
        return [everything[torch.randperm(len(everything), generator=generator)]] * len(names)

    def _clean_test(self, images: Images, held: Tensor, transform: Transform) -> Samples | None:
        """The held-out images without corruption."""
        if not len(held):
            return None
        source = chained([self.uncorrupted(images, held)], images.test.targets[held])
        return Samples(source, torch.arange(len(held)), transform)

    def _facts(self, images: Images, online: int, held: int) -> dict[str, Any]:
        return {
            **images.facts,
            "class_names": list(images.class_names),
            "image_shape": list(images.image_shape),
            "online_images": online,
            "held_out_images": held,
            "frost": frost_source(self.frost_folder),
        }
