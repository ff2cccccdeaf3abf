"""Disks that are full, broken or closed, and checkpoints that are not what they were."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import toy_runs
from suite import Command
from toy_runs import OFTEN, REPLAY, Stepping, numbers, planned, started, stepped, wait_for

from clbench import files
from clbench.cells import Cell, execute
from clbench.errors import UserError
from clbench.files import write_atomically
from clbench.results import RunFolder

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(environment: dict[str, str]) -> Run:
    """Runs code in another process, behind some other program."""

    def run(code: str, *before: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )

    return run


def on_small_disk(folder: Path, code: str) -> str:
    """Shell words that run Python code where a folder is a disk of 256 KiB."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=256k tmpfs {folder}"
    return f"{mount} || exit 77; {sys.executable} -c '{code}'; code=$?; ls -A {folder}; exit $code"


@pytest.mark.needs_root
@pytest.mark.parametrize("what", ["result", "checkpoint"])
def test_fault_12_13_full_disk(
    what: str, namespaces: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """tmpfs of 256 KiB, write a result or a checkpoint | One message, old file intact."""
    small, data = tmp_path / "small", "b'1' * 2**20"
    if what == "result":
        first, second = (
            "write_atomically(f / 'result.json', b'old')",
            (f"write_atomically(f / 'result.json', {data})"),
        )
        check = "print('kept:', (f / 'result.json').read_text())"
        imports = "from clbench.files import write_atomically"
    else:
        first = "checkpoint.save(f, {'a': torch.ones(4)})"
        second = "checkpoint.save(f, {'a': torch.ones(2**20)})"
        check = "print('kept:', checkpoint.load(f, torch.device('cpu'))['a'].tolist())"
        imports = "import torch; from clbench import checkpoint"
    code = f"""
from pathlib import Path
from clbench.errors import UserError
{imports}
f = Path("{small}")
{first}
try:
    {second}
except UserError as error:
    print("message:", error)
{check}
""".replace("'", '"')
    done = subprocess.run(
        [namespaces, "-m", "sh", "-c", on_small_disk(small, code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 77:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stderr
    message, kept, *left = done.stdout.splitlines()
    assert message.startswith(f"message: Can't write {small}/")
    assert message.endswith("the disk is full; free some space.")
    assert kept in ("kept: old", "kept: [1.0, 1.0, 1.0, 1.0]")
    assert not [name for name in left if name.startswith(".")]


@pytest.mark.parametrize(
    ("call", "error", "advice"),
    [
        ("fsync", "EIO", "Input/output error"),
        ("fsync", "ENOSPC", "the disk is full"),
        ("rename", "EXDEV", "another file system"),
        ("rename", "ENOSPC", "the disk is full"),
        ("rename", "EDQUOT", "the disk quota is used up"),
    ],
)
def test_fault_14_system_calls_that_fail(
    call: str, error: str, advice: str, strace: str, tmp_path: Path, python: Run
) -> None:
    """fsync or rename fails (EIO, EXDEV, ENOSPC) | One message naming the path; nothing is left."""
    code = f"""
from pathlib import Path
from clbench.errors import UserError
from clbench.files import write_atomically
try:
    write_atomically(Path({str(tmp_path)!r}) / "result.json", b"new")
except UserError as error:
    print(error)
"""
    inject = f"inject={call}:error={error}"
    done = python(code, strace, "-f", "-qq", "-e", f"trace={call}", "-e", inject)
    assert done.stdout.startswith(f"Can't write {tmp_path}/result.json: "), done.stderr
    assert advice in done.stdout
    assert os.listdir(tmp_path) == []


def run_as_nobody(cell: Cell, warm: Path, note: Path) -> None:
    """Runs a cell as a user who owns nothing, when everything is imported."""
    execute(replace(cell, results_dir=warm))
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    toy_runs.run_one(cell, note)


@pytest.mark.needs_root
def test_fault_15_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """An unwritable results folder, as uid 65534 | Refused before training, exit 2."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.mkdir(mode=0o755)
        Path(folder).chmod(0o755)
        note = tmp_path / "steps"
        process = started(run_as_nobody, planned(results), tmp_path / "warm", note)
        process.join(60)
        assert process.exitcode == 2
        assert os.listdir(results) == []
    assert stepped(note) == 0


def test_a_folder_that_is_not_writable_is_a_message(command: Command) -> None:
    done = command("results_dir=/proc/results", "device=cpu")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Can't write /proc/results/runs/digits-replay-")


def interrupted(root: Path, steps: int = 31, kill: bool = False) -> Cell:
    """A run that was stopped within its second experience."""
    cell = planned(root, limits=OFTEN if kill else None)
    note = root.parent / f"{root.name}.steps"
    process = started(toy_runs.run_one, cell, note, 0.005)
    wait_for(lambda: stepped(note) >= steps, process)
    (process.kill if kill else process.terminate)()
    process.join(30)
    assert process.exitcode != 0
    return cell


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flipped, truncated], ids=["16-flipped", "17-truncated"])
@pytest.mark.parametrize("where", ["within", "both"])
def test_fault_16_17_damaged_checkpoints(
    damage: Callable[[Path], None], where: str, tmp_path: Path
) -> None:
    """A checkpoint with a flipped bit, or cut short | The one before is used, or none."""
    whole = execute(planned(tmp_path / "whole"))
    cell = interrupted(tmp_path / "cut")
    (folder,) = (tmp_path / "cut" / "runs").iterdir()
    within = list(folder.glob("checkpoint/within/*.pt"))
    between = list(folder.glob("checkpoint/*.pt"))
    assert len(within) == len(between) == 1
    for file in within + between * (where == "both"):
        damage(file)
    assert numbers(execute(cell)) == numbers(whole)
    log = (folder / "log.txt").read_text()
    assert "the checkpoint in within is damaged, and not used" in log
    assert ("resumed after experience 1" in log) == (where == "within")
    assert ("the checkpoint in checkpoint is damaged" in log) == (where == "both")


def test_fault_18_the_checkpoint_of_another_run(tmp_path: Path) -> None:
    """The checkpoint of another configuration | Refused, and the difference is said."""
    interrupted(tmp_path / "one")
    (theirs,) = (tmp_path / "one" / "runs").iterdir()
    other = planned(tmp_path / "other", {**REPLAY, "lr": 0.02})
    scenario, strategy = other.build()
    from clbench.conditions import identify

    run = identify(scenario, strategy, other.conditions, other.names)
    mine = RunFolder(tmp_path / "other", run["run_id"])
    shutil.copytree(theirs / "checkpoint", mine.checkpoint)
    with pytest.raises(UserError, match=r"options\.strategy\.lr is 0.02, there 0.05"):
        execute(other)
    assert mine.checkpoint.exists()


class Bird:
    """Sings when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_fault_19_a_pickle_as_checkpoint(tmp_path: Path) -> None:
    """A pickle with a canary as checkpoint, its digest right | Not executed, not used."""
    whole = execute(planned(tmp_path / "whole"))
    cell = interrupted(tmp_path / "cut")
    (folder,) = (tmp_path / "cut" / "runs").iterdir()
    canary = tmp_path / "canary"
    data = pickle.dumps(Bird(canary))
    for place in (folder / "checkpoint", folder / "checkpoint" / "within"):
        (file,) = place.glob("*.pt")
        file.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        (place / "state.sha256").write_text(f"{digest}  {file.name}\n")
    assert numbers(execute(cell)) == numbers(whole)
    assert not canary.exists()


def test_too_little_space_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    steps = tmp_path / "steps"
    with pytest.raises(UserError, match=r"Can't write .*: the disk has 1 MiB left, .* may take 1"):
        execute(planned(tmp_path / "results"), lambda: Stepping(steps, 0))
    assert stepped(steps) == 0


def test_what_does_not_come_back_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes a file and gives another one."""
    import torch

    from clbench import checkpoint

    checkpoint.save(tmp_path, {"a": torch.ones(3)})

    def lying(path: Path, data: bytes) -> None:
        write_atomically(path, data[:-1] if path.suffix == ".pt" else data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", lying)
        with pytest.raises(UserError, match="what was written does not come back"):
            checkpoint.save(tmp_path, {"a": torch.zeros(3)})
    found = checkpoint.load(tmp_path, torch.device("cpu"))
    assert found is not None
    assert torch.equal(found["a"], torch.ones(3))


def test_only_what_killed_writers_left_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("result.json", ".lock", ".hidden", ".x.12345678.keep"):
        (tmp_path / name).write_text("the user's")

    def killed(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "result.json", b"new")
    assert len(os.listdir(tmp_path)) == 5
    files.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".lock", ".x.12345678.keep", "result.json"]
    files.sweep(tmp_path / "nothing")
