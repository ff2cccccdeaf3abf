"""CORe50, a small one in the layout of its archive: 11 sessions of 50 films of a few frames."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.samples import Samples
from clbench.testing import check_scenario
from clbench.types import Setting, Split, Stream
from scenarios.core50 import CATEGORIES, N_OBJECTS, N_SESSIONS, TEST_SESSIONS, CORe50

FRAMES = 20


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every frame is painted (session, object, frame)."""
    root = tmp_path_factory.mktemp("core50") / "core50_128x128"
    for session in range(1, N_SESSIONS + 1):
        for thing in range(1, N_OBJECTS + 1):
            folder = root / f"s{session}" / f"o{thing}"
            folder.mkdir(parents=True)
            for frame in range(FRAMES):
                file = folder / f"C_{session:02}_{thing:02}_{frame:03}.png"
                Image.new("RGB", (2, 2), (session, thing, frame)).save(file)
    return root


def scenario(root: Path, **options: Any) -> CORe50:
    return CORe50(backbone=MLP(hidden=(8,)), root=root, cache_dir=root.parent / "kept", **options)


def frames(samples: Samples | None) -> list[tuple[int, ...]]:
    """(session, object, frame) of every sample."""
    assert samples is not None
    raw = samples.take(torch.arange(len(samples))).raw
    return [tuple(row) for row in raw[:, :, 0, 0].tolist()]


def learned(stream: Stream) -> list[list[tuple[int, ...]]]:
    return [frames(e.train) for e in stream.experiences]


@pytest.mark.parametrize("task", ["objects", "categories"])
def test_conforms(root: Path, task: str) -> None:
    check_scenario(scenario(root, task=task))


def test_an_experience_is_a_session_with_all_classes(root: Path) -> None:
    stream = scenario(root).stream(Split.EVALUATE, 0)
    assert scenario(root).setting is Setting.DOMAIN_INCREMENTAL
    sessions = []
    for experience in stream.experiences:
        found = frames(experience.train)
        (session,) = {s for s, _, _ in found}
        assert experience.name == f"session {session}"
        assert experience.classes == tuple(range(50))
        assert {o for _, o, _ in found} == set(range(1, 51))
        sessions.append(session)
    assert sorted(sessions) == [1, 2, 4, 5, 6, 8, 9, 11]
    other = scenario(root).stream(Split.EVALUATE, 1)
    assert [e.name for e in other.experiences] != [e.name for e in stream.experiences]


@pytest.mark.parametrize("task", ["objects", "categories"])
@pytest.mark.parametrize("split", list(Split))
def test_labels_are_objects_or_their_categories(root: Path, task: str, split: Split) -> None:
    stream = scenario(root, task=task).stream(split, 0)
    names = stream.facts["class_names"]
    assert len(names) == stream.n_outputs == (50 if task == "objects" else 10)
    assert names[-1] == ("remote control 5" if task == "objects" else "remote control")
    for samples in [e.train for e in stream.experiences] + list(stream.tests):
        assert samples is not None
        for (_, thing, _), label in zip(frames(samples), samples.targets.tolist(), strict=True):
            assert label == (thing - 1 if task == "objects" else (thing - 1) // 5)


def test_the_tests_together_are_the_published_test_sessions(root: Path) -> None:
    """Each of the eight has all films of all three sessions, and no frame is in two."""
    stream = scenario(root).stream(Split.EVALUATE, 0)
    parts = [frames(test) for test in stream.tests]
    everything = [frame for part in parts for frame in part]
    assert len(everything) == len(set(everything)) == 3 * N_OBJECTS * FRAMES
    assert {s for s, _, _ in everything} == set(TEST_SESSIONS)
    for part in parts:
        per_film = Counter((s, o) for s, o, _ in part)
        assert len(per_film) == 150
        assert set(per_film.values()) <= {FRAMES // 8, FRAMES // 8 + 1}


def test_tuning_gets_the_end_of_every_training_film(root: Path) -> None:
    tune, evaluate = (scenario(root).stream(split, 0) for split in Split)
    for found in learned(evaluate):
        assert {f for _, _, f in found} == set(range(16))
    for experience, test in zip(tune.experiences, tune.tests, strict=True):
        train_frames, test_frames = frames(experience.train), frames(test)
        assert {s for s, _, _ in train_frames + test_frames} == {int(experience.name.split()[1])}
        assert {f for _, _, f in train_frames} == {16, 17, 18}
        assert {f for _, _, f in test_frames} == {19}


def test_without_tuning_it_is_the_published_protocol(root: Path) -> None:
    stream = scenario(root, tuning_fraction=0.0).stream(Split.EVALUATE, 0)
    assert [len(found) for found in learned(stream)] == [N_OBJECTS * FRAMES] * 8
    with pytest.raises(UserError, match="nothing to tune on"):
        scenario(root, tuning_fraction=0.0).check(Split.TUNE)


def test_fewer_experiences_are_the_first_sessions(root: Path) -> None:
    stream = scenario(root, n_experiences=3).stream(Split.EVALUATE, 5)
    assert sorted(e.name for e in stream.experiences) == ["session 1", "session 2", "session 4"]
    assert sum(len(t) for t in stream.tests) == 3 * N_OBJECTS * FRAMES


@pytest.mark.parametrize(
    "options", [{"n_experiences": 9}, {"n_experiences": 0}, {"tuning_fraction": 1.0}]
)
def test_numbers_out_of_range_are_refused(root: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="out of range"):
        scenario(root, **options)


def test_a_missing_film_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "s1").mkdir()
    for thing in range(1, 50):
        shutil.copytree(root / "s1" / f"o{thing}", tmp_path / "s1" / f"o{thing}")
    with pytest.raises(UserError, match=r"s1.o50: No such file.*core50_128x128/s<1\.\.11>"):
        scenario(tmp_path).check(Split.EVALUATE)


def test_a_missing_dataset_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere\. Get the dataset from .*core50"):
        scenario(tmp_path / "nowhere").check(Split.EVALUATE)


def test_ten_kinds_of_five() -> None:
    assert len(CATEGORIES) * 5 == N_OBJECTS
