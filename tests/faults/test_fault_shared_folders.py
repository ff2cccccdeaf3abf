"""Several processes at one folder: each run is run once, and nobody waits for the dead."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import toy_runs
from toy_runs import numbers, planned, started, stepped, wait_for

from clbench import locks
from clbench.cells import execute
from clbench.errors import Busy, UserError
from clbench.results import RunFolder, find, read


def test_fault_21_the_same_run_twice_at_once(tmp_path: Path) -> None:
    """The same run id twice at once | The second says busy, exit 75; the first is not disturbed."""
    note = tmp_path / "steps"
    first = started(toy_runs.run_one, planned(tmp_path / "one"), note, 0.02)
    wait_for(lambda: stepped(note) >= 3, first)
    second = started(toy_runs.run_one, planned(tmp_path / "one"), note)
    second.join(60)
    assert second.exitcode == 75
    with pytest.raises(Busy, match="Another process is running toy-replay-"):
        execute(planned(tmp_path / "one", force=True))
    first.join(60)
    assert first.exitcode == 0
    assert stepped(note) == 60
    assert execute(planned(tmp_path / "one")).earlier


def test_fault_22_the_holder_of_a_lock_is_killed(tmp_path: Path) -> None:
    """SIGKILL the holder of a lock | The lock is free at once."""
    note = tmp_path / "steps"
    holder = started(toy_runs.run_one, planned(tmp_path / "one"), note, 0.05)
    wait_for(lambda: stepped(note) >= 3, holder)
    with pytest.raises(Busy):
        execute(planned(tmp_path / "one"))
    holder.kill()
    holder.join()
    began = time.monotonic()
    with RunFolder(tmp_path / "one", next((tmp_path / "one" / "runs").iterdir()).name).claim():
        assert time.monotonic() - began < 1
    assert execute(planned(tmp_path / "one")).result.status == "complete"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_fault_23_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flock fails with ENOLCK | A clear refusal before anything is run."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    note = tmp_path / "steps"
    with pytest.raises(UserError, match="offers no locks") as caught:
        execute(planned(tmp_path / "one"), lambda: toy_runs.Stepping(note, 0))
    assert not isinstance(caught.value, Busy)
    assert stepped(note) == 0


def test_fault_23_by_the_system(strace: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """flock fails with ENOLCK, by strace | A clear refusal before anything is run."""
    code = f"""
from pathlib import Path
from clbench.errors import UserError
from clbench.locks import alone
try:
    with alone(Path({str(tmp_path)!r}), "it"):
        print("taken")
except UserError as error:
    print(error)
"""
    inject = ("-e", "trace=flock", "-e", "inject=flock:error=ENOLCK")
    script = (strace, "-f", "-qq", *inject, sys.executable, "-c", code)
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"The file system of {tmp_path} offers no locks"), done.stderr


def test_fault_24_starts_in_one_second(tmp_path: Path) -> None:
    """Four starts in one second | Four folders; of the same run four times, it is run once."""
    note = tmp_path / "steps"
    cells = [planned(tmp_path / "four", seed=seed) for seed in range(4)]
    processes = [started(toy_runs.run_one, cell) for cell in cells]
    same = [started(toy_runs.run_one, planned(tmp_path / "one"), note, 0.005) for _ in range(4)]
    for process in processes + same:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list((tmp_path / "four" / "runs").iterdir())) == 4
    assert {process.exitcode for process in same} <= {0, 75}
    assert stepped(note) == 60, "two processes worked on one run"


def test_fault_25_writers_and_a_kill(tmp_path: Path) -> None:
    """Four writers into one folder, one SIGKILLed | No row is lost, none is there twice."""
    parts = [[planned(tmp_path, seed=4 * i + j) for j in range(4)] for i in range(4)]
    note = tmp_path / "steps"
    notes = [note, None, None, None]
    writers = [
        started(toy_runs.run_all, part, mine, 0.002)
        for part, mine in zip(parts, notes, strict=True)
    ]
    wait_for(lambda: stepped(note) >= 80, writers[0])
    writers[0].kill()
    for writer in writers:
        writer.join(60)
    table = read(tmp_path)
    assert len(table) == 13
    again = started(toy_runs.run_all, parts[0])
    again.join(60)
    table = read(tmp_path)
    assert sorted(table["seed"]) == list(range(16))
    assert set(table["status"]) == {"complete"}
    alone = execute(planned(tmp_path / "alone", seed=1))
    assert numbers(alone) == numbers(execute(planned(tmp_path, seed=1)))
    assert all(found.result for found in find(tmp_path))


@pytest.fixture
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose last holder removes it just before the next one gets the lock."""
    folder = tmp_path / "run"
    lock = fcntl.flock
    left = [1]

    def locked(descriptor: int, how: int) -> None:
        if left:
            left.clear()
            (folder / ".lock").unlink()
            folder.rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    return folder


def test_a_lock_of_a_folder_that_is_gone_is_none(forgetful: Path) -> None:
    with locks.alone(forgetful, "it"):
        assert (forgetful / ".lock").exists()
        with pytest.raises(Busy), locks.alone(forgetful, "it"):
            pass
