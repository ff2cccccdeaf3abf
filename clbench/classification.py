"""Streams of labelled images: how datasets become experiences, and how answers are scored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import Diverged, UserError
from clbench.nn.backbones import Backbone, describe
from clbench.nn.heads import Classifier, classifier
from clbench.nn.transforms import ImageTransform
from clbench.samples import Batch, MappedSource, Samples, Source, TensorSource, concatenate
from clbench.types import (
    Experience,
    Objective,
    Scenario,
    Setting,
    Split,
    Stream,
    derive_seed,
    require,
)


@dataclass(frozen=True)
class Images:
    """A labelled image dataset with a training and a test part.

    Attributes:
        train: Training images, uint8 [C, H, W] each.
        test: Test images.
        class_names: Name of each label.
        mean: Per channel, in [0, 1], of the training images.
        std: Per channel.
        facts: Plain data for the result file.
    """

    train: Source
    test: Source
    class_names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        part = self.train if len(self.train) else self.test
        channels, height, width = part.gather(part.targets.new_zeros(1)).shape[1:]
        return channels, height, width


class Classification(Objective):
    """Cross-entropy over all outputs; accuracy among the classes that may compete.

    "accuracy": all classes of the experiences met so far compete. With `task_aware`, from the
    same outputs, "task_aware_accuracy": only the classes of the sample's own experience do.

    Args:
        task_aware: Whether experiences have classes of their own.
        apart: Never predict samples of two tests at once, for methods that normalise with the
            statistics of a batch. A test that serves many experiences is predicted once.
    """

    def __init__(self, task_aware: bool, apart: bool = False) -> None:
        self.task_aware, self.apart = task_aware, apart

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def score(
        self,
        predict: Callable[[Batch], Tensor],
        tests: Sequence[Samples],
        experiences: Sequence[Experience],
        batch_size: int,
    ) -> dict[str, list[float]]:
        """See `Objective.score`. One pass over all tests, one wait for the device.

        Raises:
            Diverged: If an output is not finite.
        """
        if not self.apart:
            return self._together(predict, tests, experiences, batch_size)
        unique = {id(pair[0]): pair for pair in zip(tests, experiences, strict=True)}
        scores = {
            key: self._together(predict, [test], [experience], batch_size)
            for key, (test, experience) in unique.items()
        }
        names = next(iter(scores.values()))
        return {name: [scores[id(test)][name][0] for test in tests] for name in names}

    def _together(
        self,
        predict: Callable[[Batch], Tensor],
        tests: Sequence[Samples],
        experiences: Sequence[Experience],
        batch_size: int,
    ) -> dict[str, list[float]]:
        device = tests[0].index.device
        rules = {"accuracy": _columns([[c for e in experiences for c in e.classes]], device)}
        if self.task_aware:
            rules["task_aware_accuracy"] = _columns([e.classes for e in experiences], device)
        right = {name: torch.zeros(len(tests), device=device) for name in rules}
        finite = torch.ones((), dtype=torch.bool, device=device)
        for owner, batch in _owned_batches(tests, batch_size):
            outputs = predict(batch.unlabelled())
            finite &= torch.stack(outputs.aminmax()).isfinite().all()  # one pass, nothing written
            for name, columns in rules.items():
                answered = _answers(outputs, columns, owner) == batch.targets
                right[name].index_add_(0, owner, answered.float())
        if not finite:
            raise Diverged("an output of the model is not finite")
        sizes = torch.tensor([len(t) for t in tests], device=device)
        return {name: (count.double() / sizes).tolist() for name, count in right.items()}


def _owned_batches(tests: Sequence[Samples], batch_size: int) -> Iterator[tuple[Tensor, Batch]]:
    """Batches over all tests, each sample with the position of its test, [B] int64."""
    groups: dict[int, list[int]] = {}
    for position, test in enumerate(tests):
        groups.setdefault(id(test.source), []).append(position)
    for group in groups.values():
        samples = concatenate([tests[i] for i in group])
        device = samples.index.device
        sizes = torch.tensor([len(tests[i]) for i in group], device=device)
        owner = torch.tensor(group, device=device).repeat_interleave(sizes)
        everything = torch.arange(len(samples), device=device)
        yield from zip(
            owner.split(batch_size), samples.batches(everything, batch_size), strict=True
        )


def _columns(competing: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The classes that compete, in order: [1, C] in every test, or [T, C] in each.

    Where a test has fewer than another, its first one fills the row and decides nothing.
    """
    rows = [sorted(set(classes)) or [0] for classes in competing]
    width = max(map(len, rows))
    return torch.tensor([row + row[:1] * (width - len(row)) for row in rows], device=device)


def _answers(outputs: Tensor, columns: Tensor, owner: Tensor) -> Tensor:
    """The best of the classes that compete, [B]; only their outputs are looked at."""
    if len(columns) == 1:
        return columns[0, outputs.index_select(1, columns[0]).argmax(1)]
    mine = columns[owner]
    best = outputs.gather(1, mine).argmax(1, keepdim=True)
    return mine.gather(1, best).squeeze(1)


@dataclass(kw_only=True)
class ImageScenario(Scenario):
    """Base of the scenarios whose samples are labelled images.

    Attributes:
        backbone: Features of the model.
        head: "linear" or "cosine" classifier on top.
        crop_padding: Random crops from the image with this zero border, in training; 0: none.
        flip: Random mirror images in training.
    """

    backbone: Backbone
    head: Literal["linear", "cosine"] = "linear"
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "crop_padding", at_least=0)

    @abstractmethod
    def images(self, split: Split) -> Images:
        """The data of one split, on the CPU."""

    def model(self, seed: int, stream: Stream) -> nn.Module:  # noqa: ARG002
        shape = tuple(stream.facts["image_shape"])
        return classifier(self.backbone, shape, stream.n_outputs, self.head)

    def model_facts(self, model: nn.Module) -> Mapping[str, Any]:
        """The backbone's name, size, weights and normalisation."""
        assert isinstance(model, Classifier)
        return {"backbone": describe(self.backbone, model.features)}

    def transform(self, images: Images) -> ImageTransform:
        """Augmentation of the options, normalisation of the backbone's weights or of the data."""
        mean = self.backbone.mean or images.mean
        std = self.backbone.std or images.std
        return ImageTransform(mean, std, self.crop_padding, self.flip)


@dataclass(kw_only=True)
class ClassIncrementalImages(ImageScenario):
    """New classes in every experience; the seed decides their order.

    Attributes:
        n_experiences: Experiences, all with the same number of classes.
    """

    setting: ClassVar[Setting] = Setting.CLASS_INCREMENTAL

    n_experiences: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "n_experiences", at_least=1)

    def objective(self) -> Objective:
        return Classification(task_aware=True)

    def stream(self, split: Split, seed: int) -> Stream:
        images = self.images(split)
        n_classes = len(images.class_names)
        check_experiences(n_classes, self.n_experiences)
        order = class_order(n_classes, seed)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(n_classes)
        train = relabelled(images.train, rank)
        test = relabelled(images.test, rank)
        transform = self.transform(images)
        names = [images.class_names[c] for c in order.tolist()]
        width = n_classes // self.n_experiences
        experiences, tests = [], []
        for index in range(self.n_experiences):
            classes = tuple(range(index * width, (index + 1) * width))
            name = ", ".join(names[classes[0] : classes[-1] + 1][:4])
            name += ", ..." if width > 4 else ""
            samples = Samples(train, of_classes(train, classes), transform)
            experiences.append(Experience(index, name, samples, classes))
            tests.append(Samples(test, of_classes(test, classes), transform))
        facts = {**images.facts, "class_names": names, "image_shape": list(images.image_shape)}
        return Stream(experiences, tests, transform, n_classes, facts)


def check_experiences(n_classes: int, n_experiences: int) -> None:
    """Refuses experiences that cannot all have the same number of classes.

    Raises:
        UserError: With the numbers that work.
    """
    if n_classes % n_experiences:
        works = [str(n) for n in range(1, n_classes + 1) if n_classes % n == 0]
        raise UserError(
            f"scenario.n_experiences={n_experiences} does not divide the {n_classes} "
            f"classes. Use one of {', '.join(works)}."
        )


def class_order(n_classes: int, seed: int) -> Tensor:
    """Which class arrives first, second, ...: a permutation [n_classes] drawn from the seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "class order"))
    return torch.randperm(n_classes, generator=generator)


def relabelled(source: Source, labels: Tensor) -> Source:
    """The same samples with `labels[old]` in place of each old label."""
    targets = labels[source.targets]
    if isinstance(source, TensorSource):
        return TensorSource(source.inputs, targets)
    if isinstance(source, MappedSource):
        return MappedSource(source.inputs, targets, source.rows)
    raise TypeError(f"can't relabel a {type(source).__name__}")


def of_classes(source: Source, classes: Sequence[int]) -> Tensor:
    """Positions of all samples of some classes, in source order, [N] int64."""
    return torch.isin(source.targets, torch.tensor(classes)).nonzero().flatten()


def channel_statistics(images: Tensor, at_most: int = 20_000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1].

    Args:
        images: uint8 [N, C, H, W].
        at_most: Evenly spaced images that are looked at.
    """
    some = images[:: max(1, len(images) // at_most)].double() / 255
    return some.mean((0, 2, 3)).tolist(), some.std((0, 2, 3)).clamp_min(1e-3).tolist()
