"""Streams in which the classes stay and their appearance changes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clbench.classification import Classification, Images, ImageScenario
from clbench.samples import Samples
from clbench.types import (
    Experience,
    Objective,
    Setting,
    Split,
    Stream,
    derive_seed,
    require,
)


@dataclass(frozen=True)
class Domains:
    """Images of the same classes in several domains.

    Attributes:
        images: All domains together.
        names: Name of each domain, in the order of their arrival.
        train: Domain of each training image, [N] int64.
        test: Domain in whose test each test image is, [M] int64.
    """

    images: Images
    names: Sequence[str]
    train: Tensor
    test: Tensor


@dataclass(kw_only=True)
class DomainIncrementalImages(ImageScenario):
    """Base: all classes in every experience, each experience another domain.

    Attributes:
        n_experiences: Domains of the stream.
    """

    setting: ClassVar[Setting] = Setting.DOMAIN_INCREMENTAL

    n_experiences: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "n_experiences", at_least=1)

    @abstractmethod
    def domains(self, split: Split, seed: int) -> Domains:
        """The domains of one split, on the CPU; the seed decides their order."""

    def images(self, split: Split) -> Images:
        return self.domains(split, 0).images

    def objective(self) -> Objective:
        return Classification(task_aware=False)

    def stream(self, split: Split, seed: int) -> Stream:
        domains = self.domains(split, seed)
        images = domains.images
        transform = self.transform(images)
        classes = tuple(range(len(images.class_names)))
        experiences, tests = [], []
        for index, name in enumerate(domains.names):
            train, test = (
                Samples(source, (domain == index).nonzero().flatten(), transform)
                for source, domain in ((images.train, domains.train), (images.test, domains.test))
            )
            experiences.append(Experience(index, name, train, classes))
            tests.append(test)
        facts = {
            **images.facts,
            "class_names": list(images.class_names),
            "image_shape": list(images.image_shape),
        }
        return Stream(experiences, tests, transform, len(classes), facts)


def domain_order(n_domains: int, seed: int) -> Tensor:
    """Which domain arrives first, second, ...: a permutation [n_domains] drawn from the seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "domain order"))
    return torch.randperm(n_domains, generator=generator)
