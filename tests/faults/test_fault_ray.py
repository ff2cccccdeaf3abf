"""What is known to go wrong with Ray: each of it met on purpose."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_cluster import Cluster
from suite import write_all

from clbench.results import read

#: Finetune by another name, with something to happen in `before`.
CODE = """
import os, signal
from dataclasses import dataclass
from clbench.training import GradientStrategy


@dataclass(kw_only=True)
class Mine(GradientStrategy):
    \"\"\"Fine-tuning. **Differs from the paper:** there is none.\"\"\"

    def before(self, experience):
        with open(f"seed-{self.context.seed}", "a") as file:
            file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\\n")
        if self.context.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.context.seed == 2:
            raise ZeroDivisionError("a mistake")
"""
MINE = {
    "strategies/mine.py": CODE,
    "conf/strategy/mine.yaml": "_target_: strategies.mine.Mine\nlr: 0.1\n",
}


def sweep(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """A sweep on Ray, from the working folder."""
    fixed = ("-m", "clbench", "-m", "scenario.epochs=1", "engine=ray", "progress=false")
    return subprocess.run(
        [sys.executable, *fixed, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def noted(work: Path, seed: int) -> list[list[str]]:
    return [line.split() for line in (work / f"seed-{seed}").read_text().splitlines()]


@pytest.mark.slow
def test_one_machine_a_process_for_each_run_and_the_others_kept(
    alone: dict[str, str], work: Path
) -> None:
    """No address, though a dead one lies about; one run always dies, one raises."""
    stale = Path(alone["RAY_TMPDIR"]) / "ray" / "ray_current_cluster"
    stale.parent.mkdir()
    stale.write_text("127.0.0.1:9")
    write_all(work, MINE)
    done = sweep(alone, "strategy=mine", "seed=0,1,2,3", "engine.retries=1")
    assert done.returncode == 1, done.stderr
    assert "ZeroDivisionError: a mistake" in done.stderr
    assert "error: digits mine seed 1: its process died, up to 2 times" in done.stderr
    table = read(work / "results").set_index("seed")
    assert table["status"].to_dict() == {0: "complete", 1: "failed", 2: "failed", 3: "complete"}
    assert "its process died" in table.loc[1, "reason"]
    assert table["path"].nunique() == 4, "a folder for each"
    assert [len(noted(work, seed)) for seed in range(4)] == [5, 2, 1, 5]
    processes = [{pid for pid, _ in noted(work, seed)} for seed in range(4)]
    assert len(set().union(*processes)) == 5, "a new process for each, and for the second try"
    assert {share for seed in range(4) for _, share in noted(work, seed)} == {"1"}


@pytest.mark.slow
def test_a_cluster_with_a_token(cluster: Cluster, work: Path) -> None:
    """Without its token: refused in time, with advice. With it: benchmarks, a job a task."""
    began = time.monotonic()
    wrong = sweep({**cluster.environment, "RAY_AUTH_TOKEN": "another" + 32 * "0"}, "seed=0,1")
    assert wrong.returncode == 2, wrong.stderr
    assert time.monotonic() - began < 30
    assert "Clusters ask for a token" in wrong.stderr
    words = ("phase=benchmark", "budget=smoke", "strategy=finetune,replay", "budget.seeds=1")
    done = sweep(cluster.environment, *words, "budget.trials=2", "budget.tuning_seeds=1")
    assert done.returncode == 0, done.stderr
    table = read(work / "results")
    evaluated = table[table["split"] == "evaluate"]
    assert sorted(evaluated["strategy"]) == ["finetune", "replay"]
    assert set(table["status"]) == {"complete"}
    assert len(list((work / "results" / "tuned").iterdir())) == 2


@pytest.mark.slow
def test_memory_that_runs_out_is_not_tried_for_ever(alone: dict[str, str], work: Path) -> None:
    """Ray ends tasks while the machine is fuller than it likes, and by itself begins them anew."""
    full = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    done = sweep({**alone, **full}, "strategy=finetune", "seed=0", "engine.retries=1")
    assert done.returncode == 1, done.stderr
    assert "for want of memory" in done.stderr
    table = read(work / "results")
    assert table["status"].tolist() == ["out of memory"]
