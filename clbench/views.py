"""Domains made of one dataset by looking at it in several ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clbench import datasets
from clbench.division import check_division, divide
from clbench.domains import DomainIncrementalImages, Domains
from clbench.samples import Source
from clbench.types import LOCATION, Split, require


class View(ABC):
    """A fixed way of looking at images: what makes a domain of a dataset."""

    @abstractmethod
    def __call__(self, raw: Tensor) -> Tensor:
        """The images as they look in this domain, uint8 [B, C, H, W] to the same."""

    @abstractmethod
    def to(self, device: torch.device) -> View:
        """The same view for images on `device`."""


class ViewedSource(Source):
    """Every sample of a source in every view, made when it is asked for.

    Sample v * N + i is sample i of the N in view v, so one position stands for one sample as it
    was seen, and the memory holds the dataset once.

    Args:
        base: The samples, uint8 [N, C, H, W].
        views: At least one.
    """

    def __init__(self, base: Source, views: Sequence[View]) -> None:
        self.base, self.views = base, list(views)
        self.targets = base.targets.repeat(len(self.views))

    @property
    def domain(self) -> Tensor:
        """View of each sample, [V * N] int64."""
        views = torch.arange(len(self.views), device=self.device)
        return views.repeat_interleave(len(self.base))

    def gather(self, index: Tensor) -> Tensor:
        raw = self.base.gather(index % len(self.base))
        view = index // len(self.base)
        present: list[int] = view.unique().tolist()
        if len(present) == 1:
            return self.views[present[0]](raw)
        for v in present:
            rows = (view == v).nonzero().flatten()
            raw[rows] = self.views[v](raw[rows])
        return raw

    def to(self, device: torch.device) -> Source:
        if device == self.device:
            return self
        return ViewedSource(self.base.to(device), [view.to(device) for view in self.views])


@dataclass(kw_only=True)
class ViewedDomains(DomainIncrementalImages):
    """Base of the scenarios that show one dataset in several views, all its images in each.

    Attributes:
        dataset: Which one.
        tuning_fraction: Part of each class's training images that is for tuning; 0: none.
        data_dir: Folder of the datasets, laid out as torchvision does.
        download: Let torchvision fetch what is missing.
    """

    dataset: datasets.Name = "digits"
    n_experiences: int = 10
    tuning_fraction: float = 0.2
    data_dir: Path = field(default=Path("data"), metadata=LOCATION)
    download: bool = field(default=False, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "tuning_fraction", at_least=0, at_most=0.9)

    @abstractmethod
    def views(self, split: Split, seed: int, shape: tuple[int, int, int]) -> Mapping[str, View]:
        """As many views as experiences, by name, in the order of their arrival.

        Args:
            split: The splits share no view.
            seed: The run's.
            shape: Of an image: (channels, height, width).
        """

    def domains(self, split: Split, seed: int) -> Domains:
        whole = datasets.load(self.dataset, self.data_dir, self.download)
        images = divide(whole, split, 0, self.tuning_fraction)
        views = self.views(split, seed, images.image_shape)
        train = ViewedSource(images.train, list(views.values()))
        test = ViewedSource(images.test, list(views.values()))
        seen = replace(images, train=train, test=test)
        return Domains(seen, list(views), train.domain, test.domain)

    def check(self, split: Split) -> None:
        datasets.check(self.dataset, self.data_dir, self.download)
        check_division(datasets.n_classes(self.dataset), split, 0, self.tuning_fraction)

    def fingerprint(self) -> Mapping[str, Any]:
        return datasets.fingerprint(self.dataset, self.data_dir, self.download)
