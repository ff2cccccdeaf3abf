"""Two parts of a dataset, one to tune on and one to evaluate on: the rule for all datasets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clbench.classification import (
    ClassIncrementalImages,
    Images,
    check_experiences,
    relabelled,
)
from clbench.errors import UserError
from clbench.samples import MappedSource, Source, TensorSource
from clbench.types import Split, derive_seed, require

#: Of the images that tuning gets where the splits share classes, the part it tests on.
TUNING_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Division:
    """One split of a dataset, as positions in its parts.

    Attributes:
        classes: The classes of the split in ascending order, [K] int64; the new label of a
            class is its position here.
        train: Positions in the training part, ascending, [N] int64.
        test: Positions in the test part, or in the training part if `test_from_train`.
        test_from_train: Whether the test samples were training samples of the dataset.
        rule: "disjoint classes" or "disjoint samples".
    """

    classes: Tensor
    train: Tensor
    test: Tensor
    test_from_train: bool
    rule: str


def divide(images: Images, split: Split, classes: int, tuning_fraction: float) -> Images:
    """One split of a dataset.

    With classes enough for two (twice `classes` are there), TUNE and EVALUATE get different
    classes, as many each. Else they share classes and no sample: TUNE gets `tuning_fraction` of
    each class's training images, a fifth of which it tests on; EVALUATE gets the other training
    images and the whole test part. Which class and which image goes where is drawn once and for
    all: it depends on nothing but the dataset and these two options.

    Args:
        images: The whole dataset.
        split: Which part of it.
        classes: Classes of a split; 0: all.
        tuning_fraction: See above; 0: no TUNE split unless the classes are enough for two.

    Returns:
        The part, its classes renumbered from 0 in their old order.

    Raises:
        UserError: If the options ask for what is not there, or a class has too few images.
    """
    train, test = images.train.targets, images.test.targets
    names = images.class_names
    found = division(train, test, names, split, classes, tuning_fraction)
    new = torch.full((len(names),), -1)
    new[found.classes] = torch.arange(len(found.classes))
    source = images.train if found.test_from_train else images.test
    facts = {"division": found.rule, "n_train": len(found.train), "n_test": len(found.test)}
    return replace(
        images,
        train=selected(images.train, found.train, new),
        test=selected(source, found.test, new),
        class_names=[names[c] for c in found.classes.tolist()],
        facts={**images.facts, **facts},
    )


def division(
    train: Tensor,
    test: Tensor,
    class_names: Sequence[str],
    split: Split,
    classes: int,
    tuning_fraction: float,
    strata: Tensor | None = None,
    in_order: bool = False,
) -> Division:
    """What `divide` does, as positions.

    Args:
        train: Label of each training sample, [N] int64.
        test: Label of each test sample, [M] int64.
        class_names: Of the dataset.
        split: See `divide`.
        classes: See `divide`.
        tuning_fraction: See `divide`.
        strata: Groups of training samples of which TUNE gets its fraction each, [N] int64;
            default: the classes.
        in_order: TUNE gets the last samples of each stratum, not random ones: for frames of a
            film, whose neighbours are nearly the same picture.
    """
    check_division(len(class_names), split, classes, tuning_fraction)
    wanted = classes or len(class_names)
    order = torch.randperm(len(class_names), generator=_generator("classes"))
    if 2 * wanted <= len(class_names):
        mine = order[:wanted] if split is Split.EVALUATE else order[wanted : 2 * wanted]
        mine = mine.sort().values
        parts = _positions(train, mine), _positions(test, mine)
        return _checked(Division(mine, *parts, False, "disjoint classes"), train, test, class_names)
    mine = order[:wanted].sort().values
    candidates = _positions(train, mine)
    groups = (train if strata is None else strata)[candidates]
    rest, tuning = held_out(groups, tuning_fraction, "tuning", in_order)
    if split is Split.EVALUATE:
        found = Division(mine, candidates[rest], _positions(test, mine), False, "disjoint samples")
        return _checked(found, train, test, class_names)
    learn, check = held_out(groups[tuning], TUNING_TEST_FRACTION, "tuning test", in_order)
    candidates = candidates[tuning]
    found = Division(mine, candidates[learn], candidates[check], True, "disjoint samples")
    return _checked(found, train, train, class_names)


def check_division(n_classes: int, split: Split, classes: int, tuning_fraction: float) -> None:
    """Refuses options that ask for a split that is not there, before anything is loaded.

    Raises:
        UserError: With what would work.
    """
    if classes > n_classes:
        raise UserError(
            f"scenario.classes={classes}, but the data have {n_classes} classes. "
            f"Use 1 to {n_classes}, or 0 for all."
        )
    if split is Split.TUNE and not tuning_fraction and 2 * (classes or n_classes) > n_classes:
        raise UserError(
            "There is nothing to tune on: scenario.tuning_fraction=0 leaves all samples to "
            "split=evaluate. Set scenario.tuning_fraction=0.2"
            + (f", or scenario.classes to {n_classes // 2} or less." if n_classes > 1 else ".")
        )


def held_out(
    strata: Tensor, fraction: float, purpose: str, in_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Two parts of some samples, the second with this fraction of every stratum.

    The second part has round(fraction * N) samples, each stratum its share to within one
    (largest remainders), and at least one of every stratum of two samples or more.

    Args:
        strata: Group of each sample, [N] int64.
        fraction: In [0, 1); 0 puts all samples into the first part.
        purpose: Draws with different purposes are independent; the same draw is always the same.
        in_order: The second part gets the last samples of each stratum, not random ones.

    Returns:
        Positions of both parts, ascending.
    """
    n = len(strata)
    everyone = torch.arange(n)
    if not fraction or not n:
        return everyone, everyone[:0]
    sizes = strata.bincount()
    counts = _shares(sizes, fraction)
    turn = everyone.flip(0) if in_order else torch.randperm(n, generator=_generator(purpose))
    grouped = turn[strata[turn].argsort(stable=True)]
    rank = torch.empty_like(grouped)
    starts = sizes.cumsum(0) - sizes
    rank[grouped] = everyone - starts[strata[grouped]]
    chosen = rank < counts[strata]
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def selected(source: Source, index: Tensor, labels: Tensor) -> Source:
    """The samples at `index`, with `labels[old]` in place of each old label.

    Args:
        source: Tensors are copied, memory maps are not.
        index: Positions in the source, [N] int64.
        labels: New label of each old one.
    """
    if torch.equal(index, torch.arange(len(source))):
        return relabelled(source, labels)
    targets = labels[source.targets[index]]
    if isinstance(source, TensorSource):
        return TensorSource(source.inputs[index], targets)
    if isinstance(source, MappedSource):
        rows = index if source.rows is None else source.rows[index]
        return MappedSource(source.inputs, targets, rows)
    raise TypeError(f"can't select from a {type(source).__name__}")


@dataclass(kw_only=True)
class DividedImages(ClassIncrementalImages):
    """Base of the class-incremental scenarios that divide a dataset by the rule of `divide`.

    Attributes:
        classes: Classes of the stream; 0: all.
        tuning_fraction: Part of each class's training images that is for tuning, where the
            classes are too few for splits without a common class; 0: none.
    """

    classes: int = 0
    tuning_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "classes", at_least=0)
        require(self, "tuning_fraction", at_least=0, at_most=0.9)

    @property
    @abstractmethod
    def n_classes(self) -> int:
        """Classes of the dataset, known before it is loaded."""

    @abstractmethod
    def whole(self) -> Images:
        """The dataset, on the CPU."""

    def images(self, split: Split) -> Images:
        return divide(self.whole(), split, self.classes, self.tuning_fraction)

    def check(self, split: Split) -> None:
        check_division(self.n_classes, split, self.classes, self.tuning_fraction)
        check_experiences(self.classes or self.n_classes, self.n_experiences)


def _generator(purpose: str) -> torch.Generator:
    """Always the same: which sample belongs to which split must never depend on a run's seed."""
    return torch.Generator().manual_seed(derive_seed(0, f"division {purpose}"))


def _positions(labels: Tensor, classes: Tensor) -> Tensor:
    return torch.isin(labels, classes).nonzero().flatten()


def _shares(sizes: Tensor, fraction: float) -> Tensor:
    """How many of each stratum are held out, [S] int64."""
    exact = sizes.double() * fraction
    counts = exact.floor().long().clamp_min(1).minimum((sizes - 1).clamp_min(0))
    left = round(float(exact.sum())) - int(counts.sum())
    if left > 0:
        neediest = (exact - counts).argsort(descending=True, stable=True)
        counts[neediest[:left]] += 1
    return counts.minimum((sizes - 1).clamp_min(0))


def _checked(found: Division, train: Tensor, test: Tensor, class_names: Sequence[str]) -> Division:
    """The same division; refused if a class has nothing to learn or nothing to be tested on."""
    for part, labels, index in (("training", train, found.train), ("test", test, found.test)):
        have = labels[index].bincount(minlength=len(class_names))
        empty = found.classes[have[found.classes] == 0].tolist()
        if empty:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            raise UserError(
                f"Class {class_names[empty[0]]!r}{more} would have no {part} image in this split. "
                "Add images, leave the class out, or change scenario.tuning_fraction."
            )
    return found
