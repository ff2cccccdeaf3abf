"""Permuted pixels."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clbench import datasets
from clbench.classification import Images
from clbench.division import divide
from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.samples import Samples
from clbench.testing import check_scenario
from clbench.types import Split
from scenarios.permuted import Permutation, Permuted


def scenario(n_experiences: int = 3) -> Permuted:
    return Permuted(backbone=MLP(hidden=(8,)), n_experiences=n_experiences)


def raw(samples: Samples | None) -> Tensor:
    assert samples is not None
    return samples.take(torch.arange(len(samples))).raw


def base(split: Split) -> Images:
    return divide(datasets.load("digits", Path()), split, 0, 0.2)


def test_conforms() -> None:
    check_scenario(scenario())


def test_pixels_change_places_and_nothing_else() -> None:
    stream = scenario().stream(Split.EVALUATE, 0)
    images = base(Split.EVALUATE)
    original = images.train.gather(torch.arange(len(images.train)))
    seen = [raw(e.train) for e in stream.experiences]
    for experience, now in zip(stream.experiences, seen, strict=True):
        assert not torch.equal(now, original)
        assert torch.equal(now.flatten(1).sort(1).values, original.flatten(1).sort(1).values)
        assert experience.train is not None
        assert torch.equal(experience.train.targets, images.train.targets)
    assert not torch.equal(seen[0], seen[1])


def test_an_experience_has_one_permutation_for_training_and_testing() -> None:
    """Each column of pixels moves as a whole: find where each went, look for it in the test."""
    stream = scenario().stream(Split.EVALUATE, 0)
    train, test = (
        s.gather(torch.arange(len(s))).flatten(1)
        for s in (base(Split.EVALUATE).train, base(Split.EVALUATE).test)
    )
    for experience, samples in zip(stream.experiences, stream.tests, strict=True):
        now = raw(experience.train).flatten(1)
        columns = {tuple(train[:, p].tolist()): p for p in range(64)}
        came_from = torch.tensor([columns[tuple(now[:, p].tolist())] for p in range(64)])
        informative = train.float().std(0)[came_from] > 0
        assert informative.sum() > 55
        moved = test[:, came_from]
        assert torch.equal(raw(samples).flatten(1)[:, informative], moved[:, informative])


def test_seed_and_split_draw_other_permutations() -> None:
    names = {
        (split, seed): [e.name for e in scenario().stream(split, seed).experiences]
        for split in Split
        for seed in (0, 1)
    }
    everything = [name for found in names.values() for name in found]
    assert len(set(everything)) == len(everything) == 12
    longer = [e.name for e in scenario(5).stream(Split.TUNE, 1).experiences]
    assert longer[:3] == names[(Split.TUNE, 1)], "more experiences leave the first as they were"


def test_colours_move_together() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    seen = Permutation(torch.tensor([3, 0, 1, 2]))(pixels)
    assert seen.flatten(2).tolist() == [[[3, 0, 1, 2], [7, 4, 5, 6], [11, 8, 9, 10]]]


def test_sizes_are_those_in_the_docstring() -> None:
    whole = datasets.load("digits", Path())
    assert (len(whole.train), len(whole.test)) == (1348, 449)
    stream = scenario().stream(Split.EVALUATE, 0)
    assert [len(t) for t in stream.tests] == [449] * 3


def test_missing_data_are_refused_before_loading(tmp_path: Path) -> None:
    absent = Permuted(backbone=MLP(), dataset="mnist", data_dir=tmp_path)
    with pytest.raises(UserError, match="MNIST is not in"):
        absent.check(Split.EVALUATE)
    with pytest.raises(UserError, match="nothing to tune on"):
        Permuted(backbone=MLP(), tuning_fraction=0.0).check(Split.TUNE)
    with pytest.raises(UserError, match=r"tuning_fraction=0\.95"):
        Permuted(backbone=MLP(), tuning_fraction=0.95)


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("name", ["permuted_digits", "rotated_digits"])
def test_runs_from_the_command_line(name: str, command: Command, work: Path) -> None:
    arguments = ("scenario.n_experiences=2", "scenario.epochs=2", "scenario.batch_size=16")
    done = command(f"scenario={name}", "strategy=finetune", *arguments)
    assert done.returncode == 0, done.stderr
    (result,) = (work / "results" / "runs").glob("*/result.json")
    content = json.loads(result.read_text())
    assert content["run"]["setting"] == "domain_incremental"
    matrix = content["accuracy_matrix"]
    assert all(value is not None for row in matrix for value in row), "every domain is scored"
    assert matrix[0][0] > 0.5
