"""Arrays, folders and DataFrames as scenarios, and what is said of those that can't be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clbench import UserError, run
from clbench.data import OwnArrays, from_arrays, from_folder, from_frame
from clbench.nn.backbones import MLP, ConvNet, SlimResNet18
from clbench.samples import Samples
from clbench.testing import check_scenario
from clbench.training import GradientStrategy
from clbench.types import Split

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (120, 6, 5), dtype=np.uint8)
LABELS = np.repeat(np.arange(6), 20)
MLP_8 = MLP(hidden=(8,))


class Learner(GradientStrategy):
    """Plain fine-tuning."""


def everything(scenario: OwnArrays, split: Split = Split.EVALUATE) -> tuple[Samples, Samples]:
    """All training and all test samples of a one-experience stream."""
    stream = replace(scenario, n_experiences=1).stream(split, 0)
    assert stream.experiences[0].train is not None
    return stream.experiences[0].train, stream.tests[0]


def test_arrays_are_a_scenario_like_any_other() -> None:
    scenario = from_arrays(PIXELS, LABELS, PIXELS[::2] // 2, LABELS[::2], n_experiences=3)
    check_scenario(scenario)
    found = run(replace(scenario, backbone=MLP_8, epochs=1), Learner(), threads=1)
    assert found.status == "complete"
    assert len(found.accuracy_matrix) == 3
    assert found.scenario_facts["image_shape"] == [1, 6, 5]


def test_nothing_is_lost_or_relabelled() -> None:
    """Every image arrives once, as it is, under the class that it had."""
    names = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])[LABELS]
    scenario = from_arrays(PIXELS, names, PIXELS[::4], names[::4])
    train, test = everything(replace(scenario, tuning_fraction=0.0))
    stream = replace(scenario, n_experiences=1, tuning_fraction=0.0).stream(Split.EVALUATE, 0)
    for part, pixels, labels in ((train, PIXELS, names), (test, PIXELS[::4], names[::4])):
        batch = part.take(torch.arange(len(part)))
        found = {
            (raw.numpy().tobytes(), stream.facts["class_names"][target])
            for raw, target in zip(batch.raw, batch.targets.tolist(), strict=True)
        }
        there = zip(pixels, labels, strict=True)
        assert found == {(image.tobytes(), str(name)) for image, name in there}
        assert len(batch) == len(pixels)


def test_tuning_and_evaluation_share_no_sample() -> None:
    scenario = from_arrays(PIXELS, LABELS, n_experiences=3)
    parts = [everything(scenario, split) for split in Split]
    rows = [
        {r.tobytes() for s in pair for r in s.take(torch.arange(len(s))).raw.numpy()}
        for pair in parts
    ]
    assert not rows[0] & rows[1]
    assert sum(map(len, rows)) == len(PIXELS)


LAYOUTS: dict[str, tuple[Callable[[], Any], list[int]]] = {
    "grey": (lambda: PIXELS, [1, 6, 5]),
    "channels last": (lambda: np.stack([PIXELS] * 3, 3), [3, 6, 5]),
    "channels first": (lambda: np.stack([PIXELS] * 3, 1), [3, 6, 5]),
    "tensor": (lambda: torch.from_numpy(PIXELS), [1, 6, 5]),
    "lists": (lambda: (PIXELS / 255).tolist(), [1, 6, 5]),
    "vectors": (lambda: PIXELS.reshape(120, 30).astype(float), [30, 1, 1]),
}


@pytest.mark.parametrize(("make", "shape"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_images_may_lie_in_memory_in_any_usual_way(
    make: Callable[[], Any], shape: list[int]
) -> None:
    scenario = from_arrays(make(), LABELS, n_experiences=3, backbone=MLP_8, epochs=1)
    assert list(scenario.data.image_shape) == shape
    assert run(scenario, Learner(), threads=1).status == "complete"


def test_channels_are_told_apart() -> None:
    colour = RANDOM.integers(0, 256, (120, 6, 5, 3), dtype=np.uint8)
    last, first = from_arrays(colour, LABELS), from_arrays(colour.transpose(0, 3, 1, 2), LABELS)
    assert last.digest == first.digest
    (train, _), (again, _) = everything(last), everything(first)
    one, other = train.take(torch.arange(9)).raw, again.take(torch.arange(9)).raw
    assert torch.equal(one, other)
    with pytest.raises(UserError, match="are the channels in front or last"):
        from_arrays(np.zeros((12, 3, 5, 3), np.uint8), np.arange(12) % 6)
    told = from_arrays(np.zeros((12, 3, 5, 3), np.uint8), np.arange(12) % 6, layout="channels_last")
    assert told.data.image_shape == (3, 3, 5)


def test_floats_reach_the_model_as_they_are() -> None:
    vectors = RANDOM.normal(size=(120, 4)).astype(np.float32)
    train, _ = everything(from_arrays(vectors, LABELS))
    batch = train.take(torch.arange(len(train)), torch.Generator())
    assert {tuple(x.flatten().tolist()) for x in batch.inputs} <= set(map(tuple, vectors.tolist()))
    with pytest.raises(UserError, match="crop_padding and flip are for images"):
        replace(from_arrays(vectors, LABELS), flip=True)
    images = from_arrays(RANDOM.normal(size=(120, 8, 8)), LABELS)
    train, _ = everything(replace(images, flip=True, crop_padding=2))
    generator = torch.Generator().manual_seed(0)
    batch = train.take(torch.arange(len(train)), generator)
    assert not torch.equal(batch.inputs, batch.raw)


def test_uint8_images_are_normalised_by_their_own_statistics() -> None:
    train, _ = everything(replace(from_arrays(PIXELS, LABELS), tuning_fraction=0.0))
    inputs = train.take(torch.arange(len(train))).inputs
    assert inputs.mean().item() == pytest.approx(0, abs=0.05)
    assert inputs.std().item() == pytest.approx(1, abs=0.05)


def test_without_test_arrays_the_same_part_of_each_class_is_held_out() -> None:
    one, other = (from_arrays(PIXELS, LABELS, test_fraction=0.25) for _ in range(2))
    assert one.digest == other.digest
    assert one.data.test.targets.bincount().tolist() == [5] * 6


def test_other_content_is_another_run() -> None:
    changed = PIXELS.copy()
    changed[0, 0, 0] ^= 1
    first, same, other = (from_arrays(p, LABELS) for p in (PIXELS, PIXELS.copy(), changed))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    swapped = LABELS.copy()
    swapped[[0, 119]] = swapped[[119, 0]]
    assert from_arrays(PIXELS, swapped).fingerprint() != first.fingerprint()


def test_the_backbone_suits_the_images_unless_it_is_given() -> None:
    large = np.zeros((12, 32, 32, 3), np.uint8)
    assert isinstance(from_arrays(PIXELS, LABELS).backbone, MLP)
    assert isinstance(from_arrays(large, np.arange(12) % 6).backbone, SlimResNet18)
    given = from_arrays(large, np.arange(12) % 6, backbone=ConvNet())
    assert isinstance(given.backbone, ConvNet)


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "length": (lambda: from_arrays(PIXELS, LABELS[1:]), "120 train_images and 119 train_labels"),
    "type": (lambda: from_arrays(PIXELS.astype(int), LABELS), r"has type int64.*astype\('uint8'\)"),
    "text": (lambda: from_arrays(PIXELS.astype(str), LABELS), "train_images has type"),
    "shape": (lambda: from_arrays(PIXELS.ravel(), LABELS), "train_images has shape"),
    "empty": (lambda: from_arrays(PIXELS[:0], LABELS[:0]), "at least one"),
    "not finite": (lambda: from_arrays(np.full((6, 3), np.nan), LABELS[:6]), "not finite"),
    "float labels": (lambda: from_arrays(PIXELS, LABELS / 2), "The labels have shape"),
    "one-hot labels": (lambda: from_arrays(PIXELS, np.eye(6)[LABELS]), "The labels have shape"),
    "half a test": (lambda: from_arrays(PIXELS, LABELS, PIXELS), "or neither"),
    "fraction": (lambda: from_arrays(PIXELS, LABELS, test_fraction=1.5), "between 0 and 1"),
    "other size": (lambda: from_arrays(PIXELS, LABELS, PIXELS[:, 1:], LABELS), "Give both alike"),
    "new class": (lambda: from_arrays(PIXELS, LABELS, PIXELS, LABELS + 1), "has the class 6"),
    "experiences": (
        lambda: run(from_arrays(PIXELS, LABELS, n_experiences=4), Learner()),
        "n_experiences=4 does not divide the 6 classes",
    ),
}


@pytest.mark.parametrize(("make", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_can_t_be_is_refused_with_the_reason(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


# Files.


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """root/train/<class>/*.png for the six classes."""
    root = tmp_path / "photos"
    for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        place = root / "train" / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i:03}.png")
    return root


def table(root: Path) -> pd.DataFrame:
    names = sorted(str(file.relative_to(root)) for file in root.rglob("*.png"))
    return pd.DataFrame({"path": names, "label": [name.split("/")[1] for name in names]})


def test_a_folder_and_a_table_of_its_files_are_the_same_stream(
    photos: Path, tmp_path: Path
) -> None:
    options = {"n_experiences": 3, "backbone": MLP_8, "epochs": 1, "channels": 1}
    cache = tmp_path / "cache"
    folder = from_folder(photos, cache_dir=cache, **options)  # type: ignore[arg-type]
    frame = from_frame(table(photos), root=photos, cache_dir=cache, **options)  # type: ignore[arg-type]
    check_scenario(folder)
    one, other = (run(s, Learner(), threads=1) for s in (folder, frame))
    assert one.accuracy_matrix == other.accuracy_matrix
    assert one.run["run_id"] == other.run["run_id"]
    assert one.experiences[0].startswith("class ")


def test_a_table_says_what_is_for_testing(photos: Path, tmp_path: Path) -> None:
    frame = table(photos)
    frame["part"] = ["test" if i % 5 == 0 else "train" for i in range(len(frame))]
    scenario = from_frame(frame, root=photos, part="part", cache_dir=tmp_path, channels=1)
    stream = replace(scenario, n_experiences=1, tuning_fraction=0.0).stream(Split.EVALUATE, 0)
    assert stream.experiences[0].train is not None
    assert (len(stream.experiences[0].train), len(stream.tests[0])) == (96, 24)


def test_a_table_may_hold_the_pixels_themselves() -> None:
    columns = [f"pixel{i}" for i in range(30)]
    frame = pd.DataFrame(PIXELS.reshape(120, 30).astype(int), columns=columns)
    frame["digit"] = LABELS
    images = from_frame(frame, label="digit", values=columns, shape=(6, 5))
    assert isinstance(images, OwnArrays)
    assert images.digest == from_arrays(PIXELS, LABELS).digest
    vectors = from_frame(frame, label="digit", values=columns[:4])
    assert isinstance(vectors, OwnArrays)
    assert vectors.data.image_shape == (4, 1, 1)
    frame["part"] = np.where(np.arange(120) % 4 == 0, "test", "train")
    divided = from_frame(frame, label="digit", values=columns, shape=(6, 5), part="part")
    assert isinstance(divided, OwnArrays)
    test = np.arange(120) % 4 == 0
    expected = from_arrays(PIXELS[~test], LABELS[~test], PIXELS[test], LABELS[test])
    assert divided.digest == expected.digest


FRAME = pd.DataFrame({"path": ["a.png", "b.png"], "label": ["x", "y"], "p": [1.5, 999.0]})
BAD_FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "column": ({"label": "labl"}, "no column 'labl'. Did you mean 'label'"),
    "values": ({"values": ["q"]}, "no column 'q'"),
    "part": ({"part": "path"}, "Column 'path' says 'a.png'; it may say 'train' or 'test'"),
    "shape": ({"values": ["p"], "shape": (2, 2)}, "1 columns of values can't be images of shape"),
    "root": ({"root": "nowhere"}, "There is no folder"),
    "file": ({}, "a.png should be there"),
}


@pytest.mark.parametrize(("options", "said"), BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
@pytest.mark.usefixtures("work")
def test_a_table_that_can_t_be_is_refused_with_the_reason(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(from_frame(FRAME, **options), Learner())


@pytest.mark.usefixtures("work")
def test_cells_that_are_no_pixels_or_files_are_refused() -> None:
    numbers = FRAME.assign(p=[1, 999])
    with pytest.raises(UserError, match="Pixels from 1 to 999"):
        from_frame(numbers, values=["p"], shape=(1, 1))
    with pytest.raises(UserError, match="has empty cells"):
        from_frame(FRAME.assign(label=["x", None]))
    with pytest.raises(UserError, match="is not below"):
        from_frame(FRAME.assign(path=["../a.png", "b.png"]))
