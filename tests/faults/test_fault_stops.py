"""Signals, clocks and memory: a run that has to stop says so, and what can go on goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import toy_runs
from toy_runs import REPLAY, numbers, planned, started, stepped, wait_for

from clbench.cells import execute
from clbench.errors import UserError
from clbench.interruption import GRACE
from clbench.limits import Limits
from clbench.results import find, read


def faulty(kind: str, note: Path, **options: Any) -> dict[str, Any]:
    """The node of a strategy of this folder."""
    return {"_target_": f"strategies.faulty.{kind}", "lr": 0.05, "note": str(note), **options}


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_fault_09_preempted(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM or SIGUSR1 | The step under way is finished, the run saved; exit 75; it goes on."""
    whole = execute(planned(tmp_path / "whole"))
    note = tmp_path / "steps"
    process = started(toy_runs.run_one, planned(tmp_path / "cut"), note, 0.01)
    wait_for(lambda: stepped(note) >= 31, process)
    assert process.pid
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 75
    taken = stepped(note)
    again = execute(planned(tmp_path / "cut"), lambda: toy_runs.Stepping(note, 0))
    assert stepped(note) == 60, f"{taken} steps before, {stepped(note) - taken} after"
    assert numbers(again) == numbers(whole)
    assert "saved within experience 2" in (again.folder.path / "log.txt").read_text()


@pytest.mark.nightly
def test_fault_10_preempted_by_a_scheduler(tmp_path: Path) -> None:
    """A job of higher priority in one-node SLURM | The run is requeued and resumed."""
    import shutil
    import subprocess

    if not (shutil.which("sbatch") and shutil.which("scontrol")):
        pytest.skip("SLURM is not installed")
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --requeue --open-mode=append --signal=B:TERM@30\n"
        f"cd {tmp_path}\n"
        f"{sys.executable} -m clbench scenario.epochs=200 threads=1 & child=$!\n"
        "trap 'kill -TERM $child; wait $child; [ $? = 75 ] && "
        "scontrol requeue $SLURM_JOB_ID' TERM\nwait $child\n"
    )
    job = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=True
    ).stdout.strip()
    wait_for(lambda: bool(list(tmp_path.glob("results/runs/*/config.yaml"))))
    subprocess.run(["scontrol", "requeue", job], check=True)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("results/runs/*/result.json")):
        assert time.monotonic() < deadline
        time.sleep(1)
    (log,) = tmp_path.glob("results/runs/*/log.txt")
    assert "resumed" in log.read_text()


@pytest.mark.parametrize("times", [1, 2])
def test_fault_11_ctrl_c(times: int, tmp_path: Path) -> None:
    """Ctrl-C once or twice | Once: saved at the next step; twice: at once; rc 130, store valid."""
    whole = execute(planned(tmp_path / "whole"))
    note = tmp_path / "steps"
    process = started(toy_runs.run_one, planned(tmp_path / "cut"), note, 0.3)
    wait_for(lambda: stepped(note) >= 1, process)
    assert process.pid
    for _ in range(times):
        os.kill(process.pid, signal.SIGINT)
        signal.sigtimedwait([], 0.02)
    process.join(30)
    assert process.exitcode == 130
    (found,) = find(tmp_path / "cut")
    assert found.row["status"] == "unfinished"
    assert (found.path / "checkpoint").is_dir() == (times == 1)
    assert numbers(execute(planned(tmp_path / "cut"))) == numbers(whole)


@pytest.mark.slow  # as 07 is, alone
def test_fault_27_killed_for_its_memory(tmp_path: Path) -> None:
    """SIGKILL, as a memory limit of the system sends it | Out of memory after one retry."""
    from clbench import tuning
    from clbench.engines.local import Workers
    from clbench.tuning import Budget

    cell = planned(tmp_path, faulty("Kills", tmp_path / "note", times=99))
    with Workers(2) as pool:
        (ended,) = tuning.evaluate(cell, Budget(seeds=1), untuned=True, pool=pool)
    assert stepped(tmp_path / "note") == 2
    assert ended.result.status == "out of memory"
    assert "killed, as happens where memory runs out" in str(ended.result.reason)


@pytest.mark.parametrize("kind", ["Exhausts", "Allocates"])
def test_fault_28_out_of_memory(kind: str, tmp_path: Path) -> None:
    """torch.OutOfMemoryError, or memory the machine lacks | Status says so, no blind retry."""
    cell = planned(tmp_path, faulty(kind, tmp_path / "note"))
    ended = execute(cell)
    assert ended.result.status == "out of memory"
    assert "memory" in str(ended.result.reason)
    assert ended.result.metrics == {}
    assert "Traceback" in (ended.folder.path / "log.txt").read_text()
    assert execute(cell).earlier
    assert stepped(tmp_path / "note") == 1
    (row,) = read(tmp_path).to_dict("records")
    assert row["status"] == "out of memory"


def test_fault_29_endless_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that sleeps for ever | Timed out, with what it had started; the rest goes on."""
    monkeypatch.setattr("clbench.interruption.GRACE", 0.5)
    assert GRACE > 1
    note = tmp_path / "note"
    cell = planned(tmp_path, faulty("Sleeps", note), limits=Limits(timeout=2))
    ended = execute(cell)
    assert ended.result.status == "timed out"
    assert ended.result.reason == "it took longer than timeout=2 seconds"
    child = int(Path(f"{note}.child").read_text())
    wait_for(lambda: not alive(child))
    assert execute(cell).earlier
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_run_that_timed_out_goes_on_with_more_time(tmp_path: Path) -> None:
    note = tmp_path / "steps"
    slow = lambda: toy_runs.Stepping(note, 0.05)  # noqa: E731
    short = execute(planned(tmp_path, limits=Limits(timeout=1)), slow)
    assert short.result.status == "timed out"
    assert 0 < stepped(note) < 60
    ended = execute(planned(tmp_path), lambda: toy_runs.Stepping(note, 0))
    assert ended.result.status == "complete"
    assert stepped(note) == 60, "it did not go on from where it was"
    assert numbers(ended) == numbers(execute(planned(tmp_path / "whole")))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "auto"])
def test_fault_30_a_dead_address(
    address: str, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead RAY_ADDRESS, given or found | It fails within 15 s, with advice."""
    from clbench.engines.ray import Ray

    stale = Path(alone["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    stale.parent.mkdir()
    stale.write_text("127.0.0.1:9")
    for name in ("HOME", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, alone[name])
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"No Ray cluster answers at 127\.0\.0\.1:9: ") as refusal:
        Ray().open(1, "cpu")
    assert time.monotonic() - began < 15
    assert "unset that to use this machine alone" in str(refusal.value)


def test_signals_do_what_they_did_when_the_run_is_over(tmp_path: Path) -> None:
    numbers_ = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers_]
    execute(planned(tmp_path, REPLAY))
    assert [signal.getsignal(number) for number in numbers_] == before
