"""CORe50, new instances: objects in the hand, in other surroundings every time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from clbench import image_files
from clbench.division import check_division, division, selected
from clbench.domains import DomainIncrementalImages, Domains, domain_order
from clbench.folders import chosen, image_names
from clbench.image_files import Entry, ImageFiles, listed
from clbench.types import LOCATION, Split, require

LAYOUT = "core50_128x128/s<1..11>/o<1..50>/*.png"
PAGE = "https://vlomonaco.github.io/core50/ (core50_128x128.zip)"
N_SESSIONS, N_OBJECTS = 11, 50
TEST_SESSIONS = (3, 7, 10)
TRAINING_SESSIONS = tuple(s for s in range(1, N_SESSIONS + 1) if s not in TEST_SESSIONS)
#: Five objects of each, in this order.
CATEGORIES = (
    "plug adapter",
    "mobile phone",
    "scissors",
    "light bulb",
    "can",
    "glasses",
    "ball",
    "marker",
    "cup",
    "remote control",
)


@dataclass(kw_only=True)
class CORe50(DomainIncrementalImages):
    """50 things of 10 kinds, filmed in 11 sessions; by default 8 experiences, a session each.

    Source: Lomonaco and Maltoni 2017, "CORe50: a New Dataset and Benchmark for Continuous Object
    Recognition", arXiv 1705.03550, https://vlomonaco.github.io/core50/: core50_128x128.zip,
    unpacked: s<session>/o<object>/*.png.
    Licence: CC BY 4.0.
    Sizes: 164,866 images of 128x128, about 300 of each object in each session.
    Splits: sessions 3, 7 and 10 are for testing, as published; the seed orders the other eight.
    EVALUATE: each experience is tested on an n-th of the test sessions (every n-th frame of each
    film), so that the average accuracy is, but for the rounding of these sizes, the accuracy on
    the published test set; what is lost on an earlier experience is lost on unseen sessions.
    TUNE: the last `tuning_fraction` of every training film, the last fifth of it for testing,
    which is easier, being the same session; EVALUATE learns from the rest. `tuning_fraction=0` is
    the published NI protocol, but for the order of the sessions.

    Attributes:
        task: "objects": 50 classes; "categories": 10.
        tuning_fraction: Part of each training film that is for tuning; 0: none.
        root: Folder of the dataset.
        cache_dir: Where decoded images are kept; None: the user's cache folder.
        image_size: Side in pixels of the images that the model gets; 0: 128.
        skip_corrupt: Leave files out that can't be decoded, and count them in the result.
    """

    task: Literal["objects", "categories"] = "objects"
    n_experiences: int = len(TRAINING_SESSIONS)
    tuning_fraction: float = 0.2
    root: Path | None = field(default=None, metadata=LOCATION)
    cache_dir: Path | None = field(default=None, metadata=LOCATION)
    image_size: int = 0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "n_experiences", at_most=len(TRAINING_SESSIONS))
        require(self, "tuning_fraction", at_least=0, at_most=0.9)
        require(self, "image_size", at_least=0)

    @cached_property
    def files(self) -> ImageFiles:
        """The files as they were when this was first asked for; a label is a film."""
        root = chosen(self.root, PAGE)
        entries = []
        for session in range(1, N_SESSIONS + 1):
            folder = root / f"s{session}"
            for thing in range(1, N_OBJECTS + 1):
                label = (session - 1) * N_OBJECTS + thing - 1
                entries += [
                    Entry(f"s{session}/o{thing}/{file}", label, session in TEST_SESSIONS)
                    for file in image_names(folder / f"o{thing}", LAYOUT)
                ]
        films_of = [f"s{s}/o{o}" for s in range(1, N_SESSIONS + 1) for o in range(1, N_OBJECTS + 1)]
        return listed(root, entries, films_of)

    @property
    def class_names(self) -> list[str]:
        """Of the stream's classes."""
        if self.task == "categories":
            return list(CATEGORIES)
        return [f"{CATEGORIES[o // 5]} {o % 5 + 1}" for o in range(N_OBJECTS)]

    def fingerprint(self) -> Mapping[str, Any]:
        return {"files": self.files.fingerprint}

    def check(self, split: Split) -> None:
        check_division(len(self.class_names), split, 0, self.tuning_fraction)
        assert self.files

    def domains(self, split: Split, seed: int) -> Domains:
        whole = image_files.load(self.files, self.image_size, 3, self.cache_dir, self.skip_corrupt)
        things = torch.arange(N_SESSIONS * N_OBJECTS) % N_OBJECTS
        label_of = things // 5 if self.task == "categories" else things
        films, tests = whole.train.targets, whole.test.targets
        part = division(
            label_of[films],
            label_of[tests],
            self.class_names,
            split,
            0,
            self.tuning_fraction,
            strata=films,
            in_order=True,
        )
        # Session of each experience, and experience of each session.
        order = domain_order(self.n_experiences, seed)
        arrival = torch.full((N_SESSIONS,), -1)
        sessions = torch.tensor(TRAINING_SESSIONS)[order]
        arrival[sessions - 1] = torch.arange(self.n_experiences)
        source = whole.train if part.test_from_train else whole.test
        test_films = source.targets[part.test]
        images = replace(
            whole,
            train=selected(whole.train, part.train, label_of),
            test=selected(source, part.test, label_of),
            class_names=self.class_names,
            facts={**whole.facts, "division": part.rule},
        )
        return Domains(
            images,
            [f"session {s}" for s in sessions.tolist()],
            arrival[films[part.train] // N_OBJECTS],
            arrival[test_films // N_OBJECTS]
            if part.test_from_train
            else _turns(test_films, self.n_experiences),
        )


def _turns(films: torch.Tensor, n: int) -> torch.Tensor:
    """0, 1, ..., n-1, 0, ... along the frames of each film: [N] int64."""
    counts = films.bincount()
    starts = counts.cumsum(0) - counts
    grouped = films.argsort(stable=True)
    frame = torch.empty_like(films)
    frame[grouped] = torch.arange(len(films)) - starts[films[grouped]]
    return frame % n
