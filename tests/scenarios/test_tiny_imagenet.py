"""Tiny ImageNet, a small one in the layout of its archive."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import draw

from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.testing import check_scenario
from clbench.types import Split
from scenarios.tiny_imagenet import TinyImageNet

WNIDS = ("n03", "n01", "n04", "n02", "n06", "n05")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    for wnid in WNIDS:
        for i in range(10):
            grey = i == 3  # as some of the real ones are
            draw(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", mode="L" if grey else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("n_0.JPEG\t0\t0\t62\t62\n")
    lines = []
    for i in range(24):
        draw(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 6]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    draw(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n00\tentity\nn02\tgoldfish, Carassius auratus\nn01\tant\n")
    return root


def scenario(root: Path | None, classes: int = 0) -> TinyImageNet:
    place = root.parent / "cache" if root else None
    backbone = MLP(hidden=(8,))
    return TinyImageNet(
        backbone=backbone, root=root, cache_dir=place, n_experiences=3, classes=classes
    )


@pytest.mark.parametrize("classes", [0, 3])
def test_conforms(root: Path, classes: int) -> None:
    check_scenario(scenario(root, classes))


def test_labels_are_those_of_folders_and_annotations(root: Path) -> None:
    files = scenario(root).files
    wnids = sorted(WNIDS)
    assert files.class_names == ("ant (n01)", "goldfish (n02)", "n03", "n04", "n05", "n06")
    for name, label, testing in files.entries:
        if testing:
            number = int(Path(name).stem.split("_")[1])
            assert wnids[label] == WNIDS[number % 6]
        else:
            assert name.split("/")[1] == wnids[label]
    assert files.n_train == 60
    assert len(files.entries) == 84


def test_validation_images_are_the_test_part(root: Path) -> None:
    images = scenario(root).images(Split.EVALUATE)
    assert (len(images.train), len(images.test)) == (48, 24)
    assert images.image_shape == (3, 8, 8)


def test_an_incomplete_dataset_is_refused(root: Path) -> None:
    (root / "val" / "images" / "val_7.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_7\.JPEG should be there"):
        scenario(root).check(Split.EVALUATE)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"val_annotations\.txt is not there.*cs231n"):
        scenario(root).check(Split.EVALUATE)


def test_an_unknown_class_is_named_with_its_line(root: Path) -> None:
    with (root / "val" / "val_annotations.txt").open("a") as file:
        file.write("val_24.JPEG\tn99\t0\t0\t1\t1\n")
    with pytest.raises(UserError, match=r"line 25: 'n99' is no folder"):
        scenario(root).check(Split.EVALUATE)


def test_a_missing_dataset_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere\. Get the dataset from http.*cs231n"):
        scenario(tmp_path / "nowhere").check(Split.EVALUATE)
