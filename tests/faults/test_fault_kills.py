"""Whatever is killed, whenever: what was learned is there, what is missing is done, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_runs
from ray_cluster import Cluster
from suite import write_all
from toy_runs import OFTEN, REPLAY, numbers, planned, started, stepped, wait_for

from clbench import checkpoint, tuning
from clbench.cells import Cell, Ended, execute
from clbench.checkpoint import load
from clbench.engines.local import Workers
from clbench.files import sweep
from clbench.results import read
from clbench.tuning import Budget

CPU = torch.device("cpu")


def folder_of(root: Path) -> Path:
    (found,) = (root / "runs").iterdir()
    return found


def log_of(root: Path) -> str:
    return (folder_of(root) / "log.txt").read_text()


@pytest.mark.parametrize("step", [3, 17, 31, 59])
def test_fault_01_killed_within_an_experience(step: int, tmp_path: Path) -> None:
    """SIGKILL in mid-experience, rerun | The rerun goes on within it; equal result."""
    whole = execute(planned(tmp_path / "whole"))
    note = tmp_path / "steps"
    process = started(toy_runs.run_one, planned(tmp_path / "cut", limits=OFTEN), note, 0.002)
    wait_for(lambda: stepped(note) >= step, process)
    process.kill()
    process.join()
    before = stepped(note)
    process = started(toy_runs.run_one, planned(tmp_path / "cut", limits=OFTEN), note)
    process.join(60)
    assert process.exitcode == 0
    assert stepped(note) - before <= 60 - before + 2, "more than the step under way was lost"
    assert numbers(execute(planned(tmp_path / "cut"))) == numbers(whole)
    assert "resumed" in log_of(tmp_path / "cut")


@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_fault_02_killed_while_a_checkpoint_is_saved(
    when: int, strace: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """SIGKILL in an fsync while saving | The old checkpoint is intact, what is left is swept."""
    checkpoint.save(tmp_path, {"tensor": torch.ones(5)})
    code = f"""
import torch
from pathlib import Path
from clbench import checkpoint
checkpoint.save(Path({str(tmp_path)!r}), {{"tensor": torch.zeros(5)}})
"""
    inject = f"inject=fsync:signal=KILL:when={when}"
    script = (strace, "-f", "-qq", "-e", "trace=fsync", "-e", inject, sys.executable, "-c", code)
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0, done.stderr
    found = load(tmp_path, CPU)
    assert found is not None
    # Two files, for each an fsync of it and one of the folder; the pointer is the second.
    assert torch.equal(found["tensor"], torch.zeros(5) if when == 4 else torch.ones(5))
    checkpoint.save(tmp_path, {"tensor": torch.full((5,), 2.0)})
    sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def killed_at_rename(cell: Cell) -> None:
    """Dies when the result is about to get its name."""
    rename = os.replace

    def replace_or_die(source: Any, target: Any) -> None:
        if Path(target).name == "result.json":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]
    toy_runs.run_one(cell)


def test_fault_03_killed_at_the_rename_of_the_result(tmp_path: Path) -> None:
    """SIGKILL at the rename of result.json | No result is visible; the rerun publishes the same."""
    whole = execute(planned(tmp_path / "whole"))
    process = started(killed_at_rename, planned(tmp_path / "cut"))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (folder_of(tmp_path / "cut") / "result.json").exists()
    assert any(n.startswith(".result.json.") for n in os.listdir(folder_of(tmp_path / "cut")))
    again = execute(planned(tmp_path / "cut"))
    assert numbers(again) == numbers(whole)
    assert sorted(os.listdir(again.folder.path)) == [
        *(".lock", "config.yaml", "log.txt", "result.json"),
    ]


def test_fault_04_a_sweep_is_killed(tmp_path: Path) -> None:
    """SIGKILL the driver of a sweep, same command | Only missing runs execute."""
    cells = [planned(tmp_path, seed=seed) for seed in range(5)]
    note = tmp_path / "steps"
    process = started(toy_runs.run_all, cells, note, 0.001)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/result.json"))) >= 2, process)
    process.kill()
    process.join()
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert 2 <= len(there) < 5
    process = started(toy_runs.run_all, cells)
    process.join(60)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert list(read(tmp_path)["status"]) == ["complete"] * 5


def faulty(kind: str, note: Path, **options: Any) -> dict[str, Any]:
    """The node of a strategy of this folder."""
    return {"_target_": f"strategies.faulty.{kind}", "lr": 0.05, "note": str(note), **options}


def test_fault_05_a_worker_is_killed(tmp_path: Path) -> None:
    """SIGKILL a worker process | Its run is tried again from its checkpoint, and completes."""
    note = tmp_path / "deaths"
    cell = planned(tmp_path, faulty("Kills", note), limits=OFTEN)
    with Workers(2) as pool:
        (ended,) = pool.map(execute, [cell])
    assert isinstance(ended, Ended)
    assert ended.result.status == "complete"
    assert stepped(note) == 2, "the step that killed it is taken once more"
    assert "resumed within experience 2 after 3 steps" in log_of(tmp_path)


SLOW = {
    "strategies/slow.py": '''
import os, time
from dataclasses import dataclass
from clbench.training import GradientStrategy


@dataclass(kw_only=True)
class Slow(GradientStrategy):
    """Fine-tuning that takes its time. **Differs from the paper:** there is none."""

    def loss(self, batch):
        with open(f"steps-{self.context.seed}", "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(0.04)
        return super().loss(batch)
''',
    "conf/strategy/slow.yaml": "_target_: strategies.slow.Slow\nlr: 0.1\n",
}


def steppers(work: Path, seed: int) -> list[int]:
    """The processes that took the steps of a run, one for each step."""
    note = work / f"steps-{seed}"
    return [int(line) for line in note.read_text().split()] if note.exists() else []


@pytest.mark.slow
def test_fault_06_a_node_is_removed(cluster: Cluster, work: Path) -> None:
    """SIGKILL a worker, then a node of two, in a sweep of Ray | All complete, none twice."""
    write_all(work, SLOW)
    sweep = ["strategy=slow", "scenario.epochs=2", "checkpoint_every=0.005", "progress=false"]
    words = [sys.executable, "-m", "clbench", "-m", *sweep, "seed=0,1,2,3,4,5", "engine=ray"]
    with (work / "said").open("w") as said:
        driver = subprocess.Popen(words, env=cluster.environment, stdout=said, stderr=said)
        begun: list[int] = []
        deadline = time.monotonic() + 120
        while len(begun) < 2 and time.monotonic() < deadline:
            begun = [seed for seed in range(6) if len(steppers(work, seed)) > 30]
            time.sleep(0.01)
        os.kill(steppers(work, begun[0])[-1], signal.SIGKILL)
        cluster.remove_node()
        assert driver.wait(240) == 0, (work / "said").read_text()
    table = read(work / "results").set_index("seed")
    assert table["status"].to_dict() == dict.fromkeys(range(6), "complete")
    logs = {seed: (Path(path) / "log.txt").read_text() for seed, path in table["path"].items()}
    assert all(log.count(" complete") == 1 for log in logs.values()), "a run was made twice"
    disturbed = {seed for seed in range(6) if len({*steppers(work, seed)}) > 1}
    assert disturbed
    assert all("resumed" in logs[seed] for seed in disturbed)
    whole = [*words[:3], *sweep, f"seed={begun[0]}", "results_dir=whole"]
    subprocess.run(whole, env=cluster.environment, check=True, capture_output=True, timeout=120)
    (expected,) = read(work / "whole").to_dict("records")
    assert table.loc[begun[0], "average_accuracy"] == expected["average_accuracy"]


def test_fault_07_a_run_that_always_dies(tmp_path: Path) -> None:
    """A run whose process always dies | Given up after two attempts, the others are well."""
    note = tmp_path / "deaths"
    cell = planned(tmp_path, faulty("Kills", note, seed=1, times=99))
    with Workers(2) as pool:
        ended = tuning.evaluate(cell, Budget(seeds=3), untuned=True, pool=pool)
    assert stepped(note) == 2
    assert [e.result.status for e in ended] == ["complete", "out of memory", "complete"]
    assert "its process died 2 times" in str(ended[1].result.reason)
    table = read(tmp_path).set_index("seed")["status"]
    assert table.to_dict() == {0: "complete", 1: "out of memory", 2: "complete"}


def test_fault_08_a_run_raises(tmp_path: Path) -> None:
    """One run raises | Its traceback is kept, the others complete."""
    cell = planned(tmp_path, faulty("Raises", tmp_path / "note", seed=1))
    ended = tuning.evaluate(cell, Budget(seeds=3), untuned=True)
    assert [e.result.status for e in ended] == ["complete", "failed", "complete"]
    assert ended[1].result.reason == "ZeroDivisionError: a mistake"
    assert 'raise ZeroDivisionError("a mistake")' in (ended[1].folder.path / "log.txt").read_text()


SEARCH: Mapping[str, Any] = {**REPLAY, "search": {"lr": "tag(log, interval(0.001, 0.1))"}}


def search(cell: Cell, budget: Budget, note: Path | None = None) -> None:
    """A search that can be killed when so many of its runs are there."""
    tell: Callable[..., None] = (lambda *_: time.sleep(0.05)) if note else (lambda *_: None)
    tuning.tune(cell, budget, tell=tell)
    os._exit(0)


def test_fault_31_a_search_is_killed(tmp_path: Path) -> None:
    """SIGKILL the tuner in mid-batch | It goes on with identical proposals, no run repeated."""
    budget = Budget(trials=5, tuning_seeds=1, sampler="tpe", batch=2)
    whole, _ = tuning.tune(planned(tmp_path / "whole", SEARCH), budget)
    cut = tmp_path / "cut"
    process = started(search, planned(cut, SEARCH), budget, tmp_path)
    wait_for(lambda: len(list(cut.glob("runs/*/result.json"))) >= 3, process)
    process.kill()
    process.join()
    there = {path: path.stat().st_mtime_ns for path in cut.glob("runs/*/result.json")}
    again, _ = tuning.tune(planned(cut, SEARCH), budget)
    assert [(t.values, t.scores) for t in again.trials] == [
        (t.values, t.scores) for t in whole.trials
    ]
    assert again.chosen == whole.chosen
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert len(read(cut)) == 5
