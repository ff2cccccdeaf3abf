"""Device, threads, random numbers and the facts that are recorded."""

from __future__ import annotations

import getpass
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clbench import machine
from clbench.errors import UserError
from clbench.nn.backbones import MLP, Backbone, SlimResNet18
from clbench.nn.heads import classifier

CPU = torch.device("cpu")


def draws() -> list[float]:
    """One number of every global generator."""
    numpy = float(np.random.random())
    return [float(torch.rand(1)), random.random(), numpy, nn.Linear(1, 1).weight.item()]


def global_states() -> list[Any]:
    numpy: Any = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]]


def test_isolated_numbers_follow_from_seed_and_purpose() -> None:
    def within(seed: int, purpose: str) -> list[float]:
        with machine.isolated_rng(seed, purpose):
            return draws()

    first = within(0, "model")
    draws()
    assert within(0, "model") == first
    for other in (within(1, "model"), within(0, "learn 0")):
        assert all(a != b for a, b in zip(first, other, strict=True))


def test_isolated_numbers_leave_the_global_ones_alone() -> None:
    before = global_states()
    with machine.isolated_rng(0, "a"):
        draws()
        with machine.isolated_rng(0, "b"):
            draws()
    assert global_states() == before


def test_isolation_ends_after_a_crash_too() -> None:
    before = global_states()

    def crash() -> None:
        with machine.isolated_rng(0, "a"):
            draws()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert global_states() == before


def test_an_inner_block_does_not_disturb_the_outer_one() -> None:
    with machine.isolated_rng(0, "outer"):
        expected = [*draws(), *draws()]
    with machine.isolated_rng(0, "outer"):
        found = draws()
        with machine.isolated_rng(0, "inner"):
            draws()
        found += draws()
    assert found == expected


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA is awake already")
def test_isolation_leaves_no_seed_for_a_sleeping_cuda() -> None:
    queued: list[Any] = vars(torch.cuda)["_queued_calls"]
    before = len(queued)
    with machine.isolated_rng(0, "a"):
        draws()
    assert len(queued) == before


def flops_per_step(backbone: Backbone, shape: tuple[int, int, int], batch_size: int) -> float:
    with torch.random.fork_rng():
        model = classifier(backbone, shape, 10)
    return machine.forward_flops(model, torch.zeros(1, *shape)) * batch_size


@pytest.mark.parametrize(
    ("make", "shape", "batch_size", "all_cores"),
    [
        (MLP, (1, 28, 28), 64, False),
        (MLP, (1, 8, 8), 32, False),
        (SlimResNet18, (3, 32, 32), 32, True),
        (SlimResNet18, (3, 32, 32), 10, True),
    ],
    ids=["mlp 28", "mlp 8", "resnet 32", "resnet 10"],
)
def test_small_models_get_one_thread_and_large_ones_all_cores(
    make: Callable[[], Backbone],
    shape: tuple[int, int, int],
    batch_size: int,
    all_cores: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 7)
    threads = machine.choose_threads(0, flops_per_step(make(), shape, batch_size))
    assert threads == (7 if all_cores else 1)


def test_the_user_s_thread_count_counts() -> None:
    assert machine.choose_threads(3, 0) == 3
    assert machine.choose_threads(3, 1e12) == 3


def test_flops_are_two_for_each_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    model.train()
    assert machine.forward_flops(model, torch.zeros(4, 8)) == 2 * 4 * (8 * 5 + 5 * 3)
    assert model.training


def test_flops_leave_batch_statistics_alone() -> None:
    model = nn.BatchNorm1d(3)
    machine.forward_flops(model, torch.randn(4, 3, generator=torch.Generator()))
    assert int(model.num_batches_tracked or 0) == 0


def test_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    with machine.thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= machine.available_cores() <= (os.cpu_count() or 1)


def test_memory_left_is_a_part_of_all_memory() -> None:
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.available_memory() <= everything


def test_peak_memory_of_this_process_is_bytes() -> None:
    assert 2**25 < machine.peak_memory(CPU) < os.sysconf("SC_PHYS_PAGES") * 2**14


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_peak_memory_is_not_that_of_the_process_before() -> None:
    large = b"x" * 2**29
    told = "print(machine.peak_memory(torch.device('cpu')))"
    program = f"import torch; from clbench import machine; {told}"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(found.stdout) < machine.peak_memory(CPU) - len(large) // 2


def test_devices() -> None:
    assert machine.choose_device("cpu") == CPU
    assert machine.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device=tpu is unknown"):
        machine.choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_said() -> None:
    with pytest.raises(UserError, match="PyTorch sees no CUDA device"):
        machine.choose_device("cuda")


def test_the_environment_is_plain_and_names_no_person_or_place() -> None:
    facts = machine.environment(CPU, 3)
    text = json.dumps(facts)
    assert facts["threads"] == 3
    assert facts["device"] == "cpu"
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    words = set(re.split(r"[^\w.-]+", text))
    assert not words & {socket.gethostname(), getpass.getuser()}
    assert not any(folder in text for folder in (os.getcwd(), str(Path.home())))


def test_versions() -> None:
    assert machine.version("torch")
    assert machine.version("no-such-package-here") is None


def repository(folder: Path) -> Callable[..., str]:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(
            ["git", "-C", str(folder), *identity, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    return git


def test_the_code_s_version_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "clbench"
    package.mkdir()
    (package / "machine.py").write_text("one")
    monkeypatch.setattr(machine, "__file__", str(package / "machine.py"))
    code_version = machine.code_version.__wrapped__
    assert code_version() == f"wheel {machine.version('clbench')}"
    git = repository(tmp_path)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert code_version() == commit
    (tmp_path / "results.txt").write_text("untracked files are no change of the code")
    assert code_version() == commit
    (package / "machine.py").write_text("two")
    assert code_version() == f"{commit}+dirty"


def test_without_git_the_code_s_version_is_the_wheel_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "clbench" / "machine.py"))
    monkeypatch.setenv("PATH", "")
    assert machine.code_version.__wrapped__() == f"wheel {machine.version('clbench')}"
