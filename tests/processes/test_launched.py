"""Two processes of one command, as torchrun starts them: who writes, who speaks, what continues."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clbench.commands.exits import LATER, MISTAKE
from clbench.processes import launched

RUN = ("scenario=digits", "strategy=replay", "scenario.epochs=1", "device=cpu", "threads=1")


def start(work: Path, environment: dict[str, str], *words: str) -> list[subprocess.Popen[str]]:
    """Two processes with the environment of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "clbench", *words],
            cwd=work,
            env={**environment, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, what was said, and what was complained of."""
    said = [process.communicate(timeout=400) for process in processes]
    return [p.returncode for p in processes], [s[0] for s in said], [s[1] for s in said]


def test_a_killed_process_takes_the_other_down_and_the_command_continues(
    work: Path, environment: dict[str, str]
) -> None:
    slow = (*RUN, "scenario.epochs=40")
    processes = start(work, environment, *slow)
    while not list(work.glob("results/runs/*/checkpoint/*state.pt")):
        assert processes[0].poll() is None, ended(processes)
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGKILL)
    codes, _, complaints = ended(processes)
    assert codes == [LATER, -signal.SIGKILL], complaints
    assert "The same command continues" in complaints[0]
    codes, said, complaints = ended(start(work, environment, *slow))
    assert codes == [0, 0], complaints
    assert "results/runs" in said[0]
    assert not said[1]
    assert not complaints[1]
    (folder,) = (work / "results" / "runs").iterdir()
    assert "resumed" in (folder / "log.txt").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["environment"]["processes"]) == ("complete", 2)


@pytest.mark.parametrize("words", [("phase=tune",), ("-m", "seed=0,1")])
def test_several_processes_do_one_run_and_nothing_else(
    work: Path, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    codes, _, complaints = ended(start(work, environment, *RUN, *words))
    assert codes == [MISTAKE, MISTAKE]
    assert "2 processes share one run" in complaints[0]
    assert complaints[1].startswith("process 1 of 2: error:")


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a scheduler that has said no more
    assert (launched.count(), launched.number(), launched.speaker()) == (1, 0, "")
