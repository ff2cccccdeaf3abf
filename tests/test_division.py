"""The rule by which every dataset is divided into a part to tune on and a part to evaluate on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clbench.classification import Images
from clbench.division import check_division, divide, division, held_out, selected
from clbench.errors import UserError
from clbench.samples import MappedSource, Source, TensorSource
from clbench.types import Split


def dataset(train: list[int], test: list[int]) -> Images:
    """So many images of each class; an image is its class and its number, both visible."""

    def part(counts: list[int], first: int) -> TensorSource:
        targets = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(first))
        targets = targets[order]
        numbers = first + torch.arange(len(targets))
        inputs = torch.stack((targets, numbers // 256, numbers % 256), 1).to(torch.uint8)
        return TensorSource(inputs.view(-1, 3, 1, 1), targets)

    names = [f"class {c}" for c in range(len(train))]
    return Images(part(train, 0), part(test, 30_000), names, (0.5,) * 3, (0.3,) * 3)


def content(source: Source) -> Tensor:
    """[N, 2]: the old class and the number of every image."""
    raw = source.gather(torch.arange(len(source))).flatten(1).long()
    return torch.stack((raw[:, 0], raw[:, 1] * 256 + raw[:, 2]), 1)


def numbers(source: Source) -> set[int]:
    return set(content(source)[:, 1].tolist())


def both(images: Images, classes: int, fraction: float) -> tuple[Images, Images]:
    tune, evaluate = (divide(images, split, classes, fraction) for split in Split)
    return tune, evaluate


def test_classes_enough_for_two_are_divided() -> None:
    images = dataset([20] * 10, [5] * 10)
    tune, evaluate = both(images, 5, 0.2)
    for part in (tune, evaluate):
        assert len(part.class_names) == 5
        assert part.facts["division"] == "disjoint classes"
        assert len(part.train) == part.facts["n_train"] == 100
        assert len(part.test) == part.facts["n_test"] == 25
        for source in (part.train, part.test):
            old = content(source)[:, 0].tolist()
            named = [f"class {c}" for c in old]
            assert named == [part.class_names[t] for t in source.targets.tolist()]
    assert not set(tune.class_names) & set(evaluate.class_names)
    assert sorted({*tune.class_names, *evaluate.class_names}) == list(images.class_names)


@pytest.mark.parametrize(("classes", "rule"), [(5, "disjoint classes"), (6, "disjoint samples")])
def test_the_rule_changes_where_the_classes_are_too_few(classes: int, rule: str) -> None:
    tune, evaluate = both(dataset([20] * 10, [5] * 10), classes, 0.2)
    assert tune.facts["division"] == evaluate.facts["division"] == rule
    assert (tune.class_names == evaluate.class_names) == (rule == "disjoint samples")


def test_which_classes_evaluate_has_is_drawn_not_the_first() -> None:
    evaluate = divide(dataset([4] * 40, [2] * 40), Split.EVALUATE, 20, 0.2)
    found = {int(name.split()[1]) for name in evaluate.class_names}
    assert 5 <= len(found & set(range(20))) <= 15


def test_shared_classes_share_no_sample_and_lose_none() -> None:
    images = dataset([100, 40, 60], [10, 20, 30])
    tune, evaluate = both(images, 0, 0.2)
    assert Counter(evaluate.train.targets.tolist()) == {0: 80, 1: 32, 2: 48}
    assert Counter(tune.train.targets.tolist()) == {0: 16, 1: 6, 2: 10}
    assert Counter(tune.test.targets.tolist()) == {0: 4, 1: 2, 2: 2}
    parts = [numbers(s) for s in (tune.train, tune.test, evaluate.train)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    assert set.union(*parts) == numbers(images.train)
    assert torch.equal(content(evaluate.test), content(images.test))


def test_nothing_but_the_options_decides_the_division() -> None:
    images = dataset([30] * 6, [6] * 6)
    torch.manual_seed(1)
    one = both(images, 0, 0.2)
    torch.manual_seed(2)
    two = both(images, 0, 0.2)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(content(a.train), content(b.train))
        assert torch.equal(content(a.test), content(b.test))


def test_fraction_zero_leaves_evaluate_the_whole_dataset() -> None:
    images = dataset([30] * 4, [6] * 4)
    evaluate = divide(images, Split.EVALUATE, 0, 0.0)
    assert torch.equal(content(evaluate.train), content(images.train))
    with pytest.raises(UserError, match=r"nothing to tune on.*tuning_fraction=0\.2"):
        divide(images, Split.TUNE, 0, 0.0)
    assert divide(images, Split.TUNE, 2, 0.0).facts["division"] == "disjoint classes"


@pytest.mark.parametrize(
    ("n", "split", "classes", "fraction", "message"),
    [
        (10, Split.EVALUATE, 11, 0.2, "have 10 classes"),
        (10, Split.TUNE, 6, 0.0, "scenario.classes to 5 or less"),
        (1, Split.TUNE, 0, 0.0, r"tuning_fraction=0\.2\."),
    ],
)
def test_impossible_divisions_are_refused_before_loading(
    n: int, split: Split, classes: int, fraction: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_division(n, split, classes, fraction)


def test_a_class_without_an_image_in_some_part_is_named() -> None:
    images = dataset([20, 1, 20], [5, 5, 5])
    with pytest.raises(UserError, match="'class 1' would have no training image"):
        divide(images, Split.TUNE, 0, 0.2)
    assert len(divide(images, Split.EVALUATE, 0, 0.2).train) == 33
    with pytest.raises(UserError, match="'class 2' and 1 more would have no test image"):
        divide(dataset([20] * 4, [5, 5, 0, 0]), Split.EVALUATE, 0, 0.2)


def test_memory_maps_are_divided_like_tensors(tmp_path: Path) -> None:
    images = dataset([30] * 4, [6] * 4)
    mapped = []
    for name, source in (("train", images.train), ("test", images.test)):
        np.save(tmp_path / f"{name}.npy", source.gather(torch.arange(len(source))).numpy())
        mapped.append(MappedSource(np.load(tmp_path / f"{name}.npy", "r"), source.targets))
    other = Images(*mapped, images.class_names, images.mean, images.std)
    for split in Split:
        for classes in (0, 2):
            a = divide(images, split, classes, 0.3)
            b = divide(other, split, classes, 0.3)
            assert isinstance(b.train, MappedSource)
            assert torch.equal(content(a.train), content(b.train))
            assert torch.equal(content(a.test), content(b.test))
            assert torch.equal(a.train.targets, b.train.targets)


def test_a_selection_of_a_selection(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1))
    labels = torch.arange(50) % 5
    sources: list[Source] = [
        TensorSource(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), labels),
        MappedSource(np.load(tmp_path / "x.npy", "r"), labels),
    ]
    new = torch.tensor([9, 8, 7, 6, 5])
    for source in sources:
        once = selected(source, torch.arange(0, 50, 2), torch.arange(5))
        twice = selected(once, torch.tensor([3, 1, 20]), new)
        assert twice.gather(torch.tensor([0, 1, 2])).flatten().tolist() == [6, 2, 40]
        assert twice.targets.tolist() == [8, 7, 9]


def test_strata_finer_than_classes() -> None:
    """Frames of films: each film gives its last fifth, and the last fifth of that is for tests."""
    films = torch.arange(4).repeat_interleave(50)
    labels = films % 2
    empty = torch.empty(0, dtype=torch.int64)
    names = ["a", "b"]
    tests = torch.tensor([0, 1])
    tune = division(labels, tests, names, Split.TUNE, 0, 0.2, strata=films, in_order=True)
    rest = division(labels, tests, names, Split.EVALUATE, 0, 0.2, strata=films, in_order=True)
    assert empty.equal(rest.train[(rest.train % 50) >= 40])
    assert (tune.train % 50).tolist() == [*range(40, 48)] * 4
    assert (tune.test % 50).tolist() == [48, 49] * 4
    assert tune.test_from_train
    assert not rest.test_from_train


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.floats(0.01, 0.9),
    st.booleans(),
)
def test_what_is_held_out(sizes: list[int], fraction: float, in_order: bool) -> None:
    strata = torch.tensor([s for s, n in enumerate(sizes) for _ in range(n)], dtype=torch.int64)
    rest, held = held_out(strata, fraction, "property", in_order)
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(len(strata)))
    assert rest.tolist() == sorted(rest.tolist())
    counts = strata[held].bincount(minlength=len(sizes)).tolist()
    for size, count in zip(sizes, counts, strict=True):
        assert abs(count - fraction * size) < 1 or count == 1
        assert count >= 1 or size < 2
        assert count < size or size == 0, "nothing is left"
    if min(sizes) * fraction >= 1 and min(sizes) * (1 - fraction) >= 1:
        assert abs(len(held) - fraction * len(strata)) <= 0.5 + 1e-9  # halves fall either way
    if in_order:
        for s in range(len(sizes)):
            mine = (strata == s).nonzero().flatten().tolist()
            assert mine[len(mine) - counts[s] :] == [i for i in held.tolist() if strata[i] == s]


def test_a_fifth_of_imagenet_r_is_6000() -> None:
    """30,000 images in 200 classes of 51 to 249: the published parts have 24,000 and 6,000."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(51, 250, (100,), generator=generator)
    sizes = torch.cat((half, 300 - half))
    strata = torch.arange(200).repeat_interleave(sizes)
    rest, held = held_out(strata, 0.2, "test")
    assert (len(rest), len(held)) == (24_000, 6_000)


def test_random_parts_are_spread_and_purposes_are_independent() -> None:
    strata = torch.zeros(1000, dtype=torch.int64)
    one, two = (set(held_out(strata, 0.5, purpose)[1].tolist()) for purpose in ("one", "two"))
    assert 200 < len([i for i in one if i < 500]) < 300
    assert 200 < len(one & two) < 300
