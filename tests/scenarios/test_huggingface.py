"""Datasets of Hugging Face's library: what they hold arrives, and mistakes are named."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import draw_folder
from suite import Command

from clbench import huggingface
from clbench.conditions import Conditions, identify
from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.testing import check_scenario
from clbench.text.decoders import Llama
from clbench.types import Split
from scenarios.huggingface import HuggingFaceImages, HuggingFaceText
from strategies.finetune import Finetune

datasets: Any = pytest.importorskip("datasets", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
CLASSES = ["ant", "bee", "cat", "dog"]


def rows(count: int, start: int = 0) -> dict[str, list[Any]]:
    """So many images of each class: the red channel says the class, the green one the image."""
    from PIL import Image

    labels = [label for label in range(4) for _ in range(count)]
    shades = [start + i for _ in range(4) for i in range(count)]
    made = [
        Image.fromarray(np.full((8, 10, 3), (60 * label, shade, 7), np.uint8))
        for label, shade in zip(labels, shades, strict=True)
    ]
    return {"picture": made, "animal": labels, "source": [f"row {i}" for i in range(len(labels))]}


def table(count: int, start: int = 0) -> Any:
    features = datasets.Features(
        picture=datasets.Image(),
        animal=datasets.ClassLabel(names=CLASSES),
        source=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict(rows(count, start), features=features)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A dataset with two splits, as `save_to_disk` leaves it."""
    whole = datasets.DatasetDict(train=table(10), test=table(4, start=100))
    whole.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def scenario(path: Path | str, cache: Path, **options: Any) -> HuggingFaceImages:
    options = {"n_experiences": 2, "backbone": MLP(hidden=(8,)), **options}
    return HuggingFaceImages(path=str(path), cache_dir=cache, **options)


def test_conforms(saved: Path, tmp_path: Path) -> None:
    check_scenario(scenario(saved, tmp_path / "cache"))


def test_every_image_arrives_with_its_label(saved: Path, tmp_path: Path) -> None:
    stream = scenario(saved, tmp_path / "cache", tuning_fraction=0.0).stream(Split.EVALUATE, 3)
    names = stream.facts["class_names"]
    assert sorted(names) == CLASSES
    assert stream.facts["image_shape"] == [3, 8, 10]
    seen = []
    for samples, shades in (
        *((e.train, range(10)) for e in stream.experiences),
        *((test, range(100, 104)) for test in stream.tests),
    ):
        assert samples is not None
        batch = samples.take(torch.arange(len(samples)))
        assert [CLASSES[v // 60] for v in batch.raw[:, 0, 0, 0].tolist()] == [
            names[t] for t in batch.targets.tolist()
        ]
        assert sorted(batch.raw[:, 1, 0, 0].tolist()) == sorted([*shades] * 2)
        seen.append(len(samples))
    assert seen == [20, 20, 8, 8]


def test_a_folder_of_images_and_one_split(tmp_path: Path) -> None:
    draw_folder(tmp_path / "pictures", CLASSES, train=10, test=0)
    made = scenario(tmp_path / "pictures", tmp_path / "cache", image_size=6)
    stream = made.stream(Split.EVALUATE, 0)
    assert stream.facts["image_shape"] == [3, 6, 6]
    # Of ten images of a class two are for testing; of the other 32 a fifth, 6, for tuning.
    assert sum(len(e.train or ()) for e in stream.experiences) == 26
    assert [len(test) for test in stream.tests] == [4, 4]


def test_a_single_dataset_with_labels_of_text(tmp_path: Path) -> None:
    made = rows(6)
    made["animal"] = [CLASSES[label] for label in made["animal"]]
    datasets.Dataset.from_dict(made).cast_column("picture", datasets.Image()).save_to_disk(
        str(tmp_path / "one")
    )
    found = scenario(tmp_path / "one", tmp_path / "cache", label_column="animal", channels=1)
    stream = found.stream(Split.EVALUATE, 0)
    assert sorted(stream.facts["class_names"]) == CLASSES
    assert stream.facts["image_shape"] == [1, 8, 10]


def test_content_decides_identity_and_place_does_not(saved: Path, tmp_path: Path) -> None:
    def identity(path: Path) -> str:
        made = scenario(path, tmp_path / "cache")
        return str(identify(made, Finetune(), Conditions())["run_id"])

    first = identity(saved)
    moved = saved.rename(tmp_path / "moved")
    assert identity(moved) == first
    other = datasets.DatasetDict(train=table(10, start=1), test=table(4, start=100))
    other.save_to_disk(str(tmp_path / "other"))
    assert identity(tmp_path / "other") != first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train_split": "training"}, r"scenario.train_split=training: .* Available: test, train"),
        ({"test_split": "tset"}, r"no such split. Did you mean 'test'"),
        ({"image_column": "pictur"}, r"scenario.image_column=pictur: .* Did you mean 'picture'"),
        ({"label_column": "picture"}, r"Column 'picture' holds values that are no label"),
        ({"n_experiences": 3}, "does not divide the 4 classes"),
    ],
)
def test_mistakes_are_named(
    saved: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    made = scenario(saved, tmp_path / "cache", **options)

    def use() -> None:
        made.check(Split.EVALUATE)
        made.stream(Split.EVALUATE, 0)

    with pytest.raises(UserError, match=says):
        use()


def test_what_can_t_be_told_apart_is_asked_for(tmp_path: Path) -> None:
    both = (
        table(3)
        .add_column("other", [0] * 12)
        .cast_column("other", datasets.ClassLabel(names=["x"]))
    )
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(UserError, match=r"several columns of type ClassLabel; set scenario.label_"):
        scenario(tmp_path / "both", tmp_path / "cache").check(Split.EVALUATE)


def test_hidden_labels_are_refused(tmp_path: Path) -> None:
    hidden = rows(3)
    hidden["animal"] = [-1] * 12
    features = table(3).features
    whole = datasets.DatasetDict(
        train=table(3), test=datasets.Dataset.from_dict(hidden, features=features)
    )
    whole.save_to_disk(str(tmp_path / "hidden"))
    with pytest.raises(UserError, match="another split for testing"):
        scenario(tmp_path / "hidden", tmp_path / "cache").check(Split.EVALUATE)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    draw_folder(tmp_path / "pictures", CLASSES, train=5, test=0)
    victim = sorted((tmp_path / "pictures").rglob("*.png"))[7]
    victim.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{victim.name}.* is damaged"):
        scenario(tmp_path / "pictures", tmp_path / "cache").stream(Split.EVALUATE, 0)


def test_no_folder_and_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scenario.path is not set"):
        HuggingFaceImages(backbone=MLP()).check(Split.EVALUATE)
    with pytest.raises(UserError, match=r"There is no folder .*nowhere.* owner/name"):
        scenario(tmp_path / "nowhere", tmp_path).check(Split.EVALUATE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="can't be loaded"):
        scenario(tmp_path / "empty", tmp_path / "cache").check(Split.EVALUATE)


def test_a_name_without_a_network_is_said_once(work: Path, environment: dict[str, str]) -> None:
    nowhere = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "127.0.0.1:9"
    )
    done = subprocess.run(
        [sys.executable, "-m", "clbench", "scenario=huggingface_images", "scenario.path=a/b"],
        cwd=work,
        env={**environment, **nowhere, "HF_HOME": str(work / "hub")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith("error: 'a/b' is no folder, and the Hugging Face hub can't be reached")
    assert "scenario.path=FOLDER" in line
    assert not (work / "results").exists()


def test_the_library_s_log_is_as_it_was(saved: Path, tmp_path: Path) -> None:
    before = logging.getLogger("datasets").level, datasets.are_progress_bars_disabled()
    huggingface.opened(str(saved), None, None, tmp_path)
    assert (logging.getLogger("datasets").level, datasets.are_progress_bars_disabled()) == before


def test_a_run_from_the_command_line(command: Command, saved: Path, work: Path) -> None:
    done = command(
        "scenario=huggingface_images",
        f"scenario.path={saved}",
        f"cache_dir={work}/cache",
        *("backbone=mlp", "scenario.epochs=1", "scenario.n_experiences=2", "progress=false"),
    )
    assert done.returncode == 0, done.stderr
    assert list(work.glob("results/runs/huggingface_images-replay-*/result.json"))


# Text.


def texts(folder: Path, name: str, topics: list[str]) -> Path:
    """Forty rows for each topic, the topic being their label."""
    features = datasets.Features(
        sentence=datasets.Value("string"),
        topic=datasets.ClassLabel(names=topics),
        area=datasets.Value("string"),
    )
    labels = [i % len(topics) for i in range(40 * len(topics))]
    content = {
        "sentence": [f"{name} sentence {i}" for i in range(len(labels))],
        "topic": labels,
        "area": [f"area {i % 3}" for i in range(len(labels))],
    }
    made = datasets.Dataset.from_dict(content, features=features)
    datasets.DatasetDict(train=made).save_to_disk(str(folder / name))
    return folder / name


def tuning(paths: list[Path], cache: Path, **options: Any) -> HuggingFaceText:
    return HuggingFaceText(
        paths=tuple(map(str, paths)),
        fields=("", "sentence", "topic"),
        instruction="Which topic?",
        cache_dir=cache,
        language_model=Llama(width=16, depth=1, heads=2, inner=16),
        **options,
    )


def test_rows_become_examples_and_each_dataset_an_experience(tmp_path: Path) -> None:
    paths = [
        texts(tmp_path, "news", ["sport", "politics"]),
        texts(tmp_path, "shop", ["good", "bad"]),
    ]
    found = tuning(paths, tmp_path / "cache").whole()
    assert [part.task.name for part in found.parts] == ["news", "shop"]
    assert found.parts[0].task.labels == ("politics", "sport")
    every = [*found.parts[0].train, *found.parts[0].test]
    assert len(every) == 80
    assert {e.instruction for e in every} == {"Which topic?"}
    by_input = {e.input: e.outputs for e in every}
    assert by_input["news sentence 3"] == ("politics",)
    assert by_input["news sentence 4"] == ("sport",)


def test_a_column_can_tell_experiences_apart(tmp_path: Path) -> None:
    path = texts(tmp_path, "news", ["sport", "politics"])
    found = tuning([path], tmp_path / "cache", by="area").whole()
    assert sorted(part.task.name for part in found.parts) == ["area 0", "area 1", "area 2"]


def test_streams_of_text_conform(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra text is not installed")
    paths = [texts(tmp_path, f"part {i}", ["yes", "no"]) for i in range(4)]
    check_scenario(tuning(paths, tmp_path / "cache", test_fraction=0.25))


def test_text_has_messages_too(tmp_path: Path) -> None:
    path = texts(tmp_path, "news", ["sport", "politics"])
    with pytest.raises(UserError, match=r"scenario.paths is not set"):
        tuning([], tmp_path).check(Split.EVALUATE)
    wrong = tuning([path], tmp_path / "cache")
    wrong.fields = ("", "text", "topic")
    with pytest.raises(
        UserError, match=r"field 'text' is missing; there are: area, sentence, topic"
    ):
        wrong.whole()


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'clbench\[huggingface\]'"):
        huggingface.opened(str(saved), None, None)
