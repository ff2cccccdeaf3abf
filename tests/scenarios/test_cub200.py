"""CUB-200-2011, a small one in the layout of its archive."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import draw

from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.testing import check_scenario
from clbench.types import Split
from scenarios.cub200 import CUB200

SPECIES = (
    "001.Black_footed_Albatross",
    "002.Laysan_Albatross",
    "003.Sooty_Albatross",
    "004.Groove_billed_Ani",
    "005.Crested_Auklet",
    "006.Least_Auklet",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "CUB_200_2011"
    images, labels, parts = [], [], []
    for label, name in enumerate(SPECIES, 1):
        for i in range(14):
            number = len(images) + 1
            file = f"{name}/{name.partition('.')[2]}_{i:04}_{number}.jpg"
            draw(root / "images" / file, (10, 9 + i % 3), "L" if i == 5 else "RGB")
            images.append(f"{number} {file}")
            labels.append(f"{number} {label}")
            parts.append(f"{number} {int(i % 7 != 6)}")
    write(root, "images.txt", images)
    write(root, "image_class_labels.txt", labels)
    write(root, "train_test_split.txt", parts)
    write(root, "classes.txt", [f"{i} {name}" for i, name in enumerate(SPECIES, 1)])
    return root


def write(root: Path, name: str, lines: list[str]) -> None:
    (root / name).write_text("\n".join(lines) + "\n")


def scenario(root: Path, classes: int = 0) -> CUB200:
    return CUB200(
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


def test_labels_and_parts_are_those_of_the_lists(root: Path) -> None:
    files = scenario(root).files
    assert files.class_names[:2] == ("Black footed Albatross", "Laysan Albatross")
    assert files.n_train == 72
    assert len(files.entries) == 84
    for name, label, testing in files.entries:
        assert name.split("/")[1] == SPECIES[label]
        assert testing == (int(name.split("_")[-2]) % 7 == 6)


@pytest.mark.parametrize(
    "name", ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"]
)
def test_every_list_is_needed(name: str, root: Path) -> None:
    (root / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is not there.*caltech"):
        scenario(root).check(Split.EVALUATE)


@pytest.mark.parametrize("name", ["image_class_labels.txt", "train_test_split.txt"])
def test_lists_that_disagree_are_refused(name: str, root: Path) -> None:
    lines = (root / name).read_text().splitlines()
    write(root, name, lines[:-1])
    with pytest.raises(UserError, match=r"image 84 \(006\.Least.*\) has no class or no part"):
        scenario(root).check(Split.EVALUATE)


def test_a_missing_image_is_named(root: Path) -> None:
    next((root / "images" / SPECIES[2]).iterdir()).unlink()
    with pytest.raises(UserError, match=r"Sooty_Albatross_.*jpg should be there"):
        scenario(root).check(Split.EVALUATE)


def test_a_missing_dataset_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere\. Get the dataset from .*caltech"):
        scenario(tmp_path / "nowhere").check(Split.EVALUATE)
