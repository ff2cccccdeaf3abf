"""Any folder of classes becomes a stream, or a message says what is wrong with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import SHARED, draw, draw_folder

from clbench.conditions import Conditions, identify
from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.testing import check_scenario
from clbench.types import Split
from scenarios.image_folder import ImageFolder
from strategies.finetune import Finetune

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "pictures", CLASSES, train=10, test=4)


def scenario(root: Path | None, **options: Any) -> ImageFolder:
    place = root.parent / "cache" if root else None
    options = {"n_experiences": 2, **options}
    return ImageFolder(backbone=MLP(hidden=(8,)), root=root, cache_dir=place, **options)


@pytest.mark.parametrize("classes", [0, 4])
def test_conforms(classes: int, tmp_path: Path) -> None:
    root = draw_folder(tmp_path / "pictures", "abcdefgh", train=10, test=4)
    check_scenario(scenario(root, classes=classes))


def test_all_classes_share_no_sample_between_the_splits(root: Path) -> None:
    tune, evaluate = (scenario(root).stream(split, 0) for split in Split)
    assert tune.facts["class_names"] == evaluate.facts["class_names"]
    sizes = [len(e.train or ()) for e in evaluate.experiences]
    assert (sizes, [len(t) for t in evaluate.tests]) == ([16, 16], [8, 8])
    sizes = [len(e.train or ()) for e in tune.experiences]
    assert (sizes, [len(t) for t in tune.tests]) == ([2, 2], [2, 2])
    assert evaluate.facts["image_shape"] == [3, 8, 8]


def test_half_of_the_classes_share_no_class(root: Path) -> None:
    tune, evaluate = (scenario(root, classes=2).stream(split, 0) for split in Split)
    names = [*tune.facts["class_names"], *evaluate.facts["class_names"]]
    assert sorted(names) == list(CLASSES)
    assert [len(e.train or ()) for e in tune.experiences] == [10, 10]


def test_labels_follow_the_folders(root: Path) -> None:
    """Every picture of the stream is one of the folder that its class is named after."""
    for name in CLASSES:
        for part in ("train", "test"):
            shutil.rmtree(root / part / name)
            draw_one_colour(root / part / name, CLASSES.index(name), 10)
    stream = scenario(root).stream(Split.EVALUATE, 3)
    names = stream.facts["class_names"]
    for samples in [e.train for e in stream.experiences] + list(stream.tests):
        assert samples is not None
        batch = samples.take(torch.arange(len(samples)))
        painted = [CLASSES[v] for v in batch.raw[:, 0, 0, 0].tolist()]
        assert painted == [names[t] for t in batch.targets.tolist()]


def draw_one_colour(folder: Path, value: int, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (value, i, 0)).save(folder / f"{i}.png")


def test_endings_hidden_files_and_other_files(root: Path) -> None:
    for part in ("train", "test"):
        draw(root / part / "ant" / "UPPER.JPG")
        draw(root / part / "ant" / "x.jpeg")
        (root / part / "ant" / "notes.txt").write_text("not an image")
        (root / part / "ant" / "._UPPER.JPG").write_bytes(b"a Mac left this")
        (root / part / ".cache").mkdir()
        (root / part / "list.txt").write_text("not a class")
    (root / ".DS_Store").write_bytes(b"")
    found = scenario(root)
    assert found.files.class_names == CLASSES
    count = Counter((CLASSES[e.label], e.testing) for e in found.files.entries)
    assert count[("ant", False)] == 12
    assert count[("ant", True)] == 6
    assert count[("bee", False)] == 10


def test_without_a_test_folder_a_part_of_every_class_is_held_out(root: Path) -> None:
    shutil.rmtree(root / "test")
    found = scenario(root, test_fraction=0.3)
    count = Counter((CLASSES[e.label], e.testing) for e in found.files.entries)
    assert set(count.values()) == {7, 3}
    assert found.files.entries == scenario(root, test_fraction=0.3).files.entries
    check_scenario(scenario(root, test_fraction=0.3, tuning_fraction=0.4))


def _without(path: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / path)


def _emptied(path: str) -> Callable[[Path], None]:
    def empty(root: Path) -> None:
        shutil.rmtree(root / path)
        (root / path).mkdir()

    return empty


def _new_class(part: str) -> Callable[[Path], None]:
    return lambda root: draw(root / part / "eel" / "0.png")


def _a_file(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").write_text("a file")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without(""), r"There is no folder .*pictures\. Set scenario\.root"),
        (_without("train"), r"Can't read the folder .*train: No such file.*root/train/<class>"),
        (_a_file, r"Can't read the folder .*train: Not a directory"),
        (_emptied("train"), r"train has no class folders\. Expected root/train/<class>"),
        (_emptied("train/bee"), r"train/bee has no image \(\.jpg, \.jpeg, \.png\)"),
        (_emptied("test/bee"), r"test/bee has no image"),
        (_without("test/bee"), r"test lacks the class folder 'bee'"),
        (_without("train/bee"), r"train lacks the class folder 'bee'"),
        (_new_class("train"), r"test lacks the class folder 'eel'"),
        (_new_class("test"), r"train lacks the class folder 'eel'"),
    ],
)
def test_a_wrong_folder_is_refused_before_anything_is_decoded(
    damage: Callable[[Path], None], message: str, root: Path
) -> None:
    damage(root)
    with pytest.raises(UserError, match=message):
        scenario(root).check(Split.EVALUATE)
    assert not (root.parent / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experiences": 3}, "does not divide the 4 classes"),
        ({"n_experiences": 4, "classes": 2}, "does not divide the 2 classes"),
        ({"classes": 5}, "have 4 classes"),
        ({"classes": 3, "n_experiences": 3, "tuning_fraction": 0.0}, "nothing to tune on"),
    ],
)
def test_contradicting_options_are_refused_before_anything_is_decoded(
    options: dict[str, Any], message: str, root: Path
) -> None:
    with pytest.raises(UserError, match=message):
        scenario(root, **options).check(Split.TUNE)
    assert not (root.parent / "cache").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": -1},
        {"classes": -1},
        {"tuning_fraction": -0.1},
        {"tuning_fraction": 0.95},
        {"tuning_fraction": float("nan")},
        {"test_fraction": 0.0},
        {"n_experiences": 0},
        {"train_per_class": -1},
        {"test_per_class": -1},
    ],
)
def test_numbers_out_of_range_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}=.* is out of range"):
        scenario(None, **options)


def test_no_root_is_a_message() -> None:
    with pytest.raises(UserError, match=r"scenario\.root=FOLDER"):
        scenario(None).check(Split.EVALUATE)


def test_a_run_is_known_by_its_files_not_by_their_place(root: Path) -> None:
    def run_id(place: Path) -> str:
        return str(identify(scenario(place), Finetune(), Conditions())["run_id"])

    before = run_id(root)
    moved = root.parent / "elsewhere" / "pictures"
    shutil.copytree(root, moved)
    assert run_id(moved) == before
    draw(moved / "train" / "ant" / "another.png")
    assert run_id(moved) != before


def test_a_smaller_stream_takes_the_first_images_of_each_class(root: Path) -> None:
    files = scenario(root, train_per_class=3, test_per_class=1).list_files(root)
    assert Counter((e.label, e.testing) for e in files.entries) == {
        (label, testing): 1 if testing else 3 for label in range(4) for testing in (False, True)
    }
    assert {Path(e.name).name for e in files.entries} == {"000.png", "001.png", "002.png"}
    assert [files.sizes[i] for i in range(len(files.entries))] == [
        (root / e.name).stat().st_size for e in files.entries
    ]
    everything = scenario(root).list_files(root)
    assert scenario(root, train_per_class=10).list_files(root) == everything


def test_a_damaged_file_is_counted_in_the_result(root: Path) -> None:
    (root / "train" / "bee" / "003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"003\.png \(empty\)"):
        scenario(root).stream(Split.EVALUATE, 0)
    facts = scenario(root, skip_corrupt=True).stream(Split.EVALUATE, 0).facts
    assert facts["skipped_corrupt_files"] == 1
    assert facts["n_train"] == 31


def test_a_class_of_damaged_files_is_named(root: Path) -> None:
    for file in (root / "train" / "bee").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="'bee' would have no training image"):
        scenario(root, skip_corrupt=True).stream(Split.EVALUATE, 0)


def test_grey_and_resized(root: Path) -> None:
    stream = scenario(root, channels=1, image_size=5).stream(Split.EVALUATE, 0)
    assert stream.facts["image_shape"] == [1, 5, 5]
    assert stream.facts["resized_files"] == 56


Command = Callable[..., subprocess.CompletedProcess[str]]


def test_runs_from_the_command_line(command: Command, work: Path) -> None:
    draw_folder(work / "pictures", CLASSES, train=10, test=4)
    arguments = ("scenario=image_folder", "strategy=finetune", "backbone=mlp", "cache_dir=kept")
    arguments = (*arguments, "scenario.n_experiences=2", "scenario.epochs=1")
    assert command(*arguments).returncode == 2
    assert not (work / "kept").exists()
    done = command(*arguments, "scenario.root=pictures")
    assert done.returncode == 0, done.stderr
    assert [p.name.split("-")[0] for p in (work / "kept").glob("[!.]*")] == ["images"]
    (result,) = (work / "results" / "runs").glob("*/result.json")
    facts = json.loads(result.read_text())["scenario_facts"]
    assert facts["files"] == 56
    assert facts["division"] == "disjoint samples"
    assert sorted(facts["class_names"]) == list(CLASSES)


def test_real_photographs(tmp_path: Path) -> None:
    """Twenty CIFAR-10 images of each class, as JPEG files."""
    archive = SHARED / "cifar10-images.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive.name} is not in {SHARED}")
    taken: Counter[Path] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and path.parent.parent.name == "test" and taken[path.parent] < 20:
                taken[path.parent] += 1
                place = tmp_path / "root" / "train" / path.parent.name / path.name
                place.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                place.write_bytes(source.read())
            if sum(taken.values()) == 200:
                break
    found = scenario(tmp_path / "root", test_fraction=0.2)
    check_scenario(found)
    images = found.whole()
    assert images.image_shape == (3, 32, 32)
    assert images.facts["resized_files"] == 0
    assert len(images.train) == 160
    assert all(0.3 < m < 0.7 for m in images.mean), "photographs are neither black nor white"
