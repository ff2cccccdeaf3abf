"""ImageNet-R, a small one in the layout of its archive."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pictures import draw

from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.testing import check_scenario
from clbench.types import Split
from scenarios.imagenet_r import ImageNetR

SIZES = {"n01": 20, "n02": 31, "n03": 25, "n04": 24, "n05": 15, "n06": 35}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for wnid, count in SIZES.items():
        for i in range(count):
            kind = ("art", "sketch", "toy")[i % 3]
            draw(tmp_path / "imagenet-r" / wnid / f"{kind}_{i}.jpg", (12 + i % 4, 10 + i % 5))
    (tmp_path / "imagenet-r" / "README.txt").write_text("n01 a\nn02 b\n")
    return tmp_path / "imagenet-r"


def scenario(root: Path, classes: int = 0) -> ImageNetR:
    return ImageNetR(
        backbone=MLP(hidden=(8,)),
        root=root,
        cache_dir=root.parent / "cache",
        image_size=8,
        n_experiences=3,
        classes=classes,
    )


@pytest.mark.parametrize("classes", [0, 3])
def test_conforms(root: Path, classes: int) -> None:
    check_scenario(scenario(root, classes))


def test_a_fifth_of_each_class_is_for_testing(root: Path) -> None:
    files = scenario(root).files
    assert files.class_names == tuple(SIZES)
    count = Counter((files.class_names[e.label], e.testing) for e in files.entries)
    assert sum(n for (_, testing), n in count.items() if testing) == 30, "a fifth of 150"
    for wnid, size in SIZES.items():
        assert abs(count[(wnid, True)] - size / 5) < 1
    assert all(e.name.startswith(f"{files.class_names[e.label]}/") for e in files.entries)


def test_which_images_are_for_testing_never_changes(root: Path) -> None:
    """A later release that drew others would publish other numbers under the same name."""
    testing = [e.name for e in scenario(root).files.entries if e.testing]
    assert [name for name in testing if name.startswith("n05")] == [
        "n05/art_0.jpg",
        "n05/sketch_7.jpg",
        "n05/toy_2.jpg",
    ]


def test_images_of_all_shapes_get_one(root: Path) -> None:
    images = scenario(root).images(Split.EVALUATE)
    assert images.image_shape == (3, 8, 8)
    assert images.facts["resized_files"] == images.facts["files"] == 150


def test_a_missing_dataset_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere\. Get the dataset from .*hendrycks"):
        scenario(tmp_path / "nowhere").check(Split.EVALUATE)
