"""Processes that sweep the same runs at once, killed at random: `python tests/faults/sweep.py`.

Each process goes through all runs, in an order of its own, until every one has ended; when one is
killed, another takes its place. In the end every run is complete, with the numbers that it has
alone, and has been executed to its end once.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import toy_runs  # noqa: E402
from toy_runs import numbers, planned  # noqa: E402

from clbench import userspace  # noqa: E402
from clbench.cells import Cell, execute  # noqa: E402
from clbench.errors import Busy, Interrupted  # noqa: E402
from clbench.limits import Limits  # noqa: E402

#: A step takes this long at least.
STEP = 0.004


def cells_of(root: Path, runs: int) -> list[Cell]:
    """Runs that differ in their seed."""
    limits = Limits(checkpoint_every=0.05 / 60)
    return [planned(root, seed=seed, limits=limits) for seed in range(runs)]


def sweep(root: Path, runs: int, seed: int) -> None:
    """What a process does: every run, until none is missing; notes each that it ended."""
    cells = cells_of(root, runs)
    random.Random(seed).shuffle(cells)
    try:
        while cells:
            left = []
            for cell in cells:
                try:
                    ended = execute(cell, lambda: toy_runs.Stepping(root / "steps", STEP))
                except Busy:
                    left.append(cell)
                    continue
                if not ended.earlier:
                    with (root / "ended").open("a") as file:
                        file.write(f"{cell.conditions.seed}\n")
            cells = left
            time.sleep(0.05 * bool(left))
    except Interrupted:
        os._exit(75)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-every", type=float, default=2.0, help="mean seconds")
    arguments = parser.parse_args()
    userspace.join(userspace.suite())
    dice = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        killed = killing(root, arguments.runs, arguments.processes, arguments.kill_every, dice)
        return report(root, arguments.runs, arguments.processes, killed)


def killing(root: Path, runs: int, processes: int, every: float, dice: random.Random) -> int:
    """Sweeps, kills and starts again until all is done; returns the number of kills."""
    numbered = iter(range(10**6))

    def start() -> BaseProcess:
        return toy_runs.started(sweep, root, runs, next(numbered))

    working = [start() for _ in range(processes)]
    killed = 0
    while len(list(root.glob("runs/*/result.json"))) < runs:
        time.sleep(dice.expovariate(1 / every))
        place = dice.randrange(processes)
        victim = working[place]
        if victim.exitcode is None and victim.pid:
            os.kill(victim.pid, dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
            victim.join()
            killed += 1
        working[place] = start()
    for process in working:
        process.join(120)
    return killed


def report(root: Path, runs: int, processes: int, killed: int) -> int:
    """Compares every run with the same run alone; the exit code is 1 if one differs."""
    wrong = []
    for cell in cells_of(root, runs):
        found = execute(cell)
        alone = execute(planned(root / "alone", seed=cell.conditions.seed))
        if not found.earlier or numbers(found) != numbers(alone):
            wrong.append(cell.conditions.seed)
    ended = (root / "ended").read_text().split()
    steps = (root / "steps").stat().st_size
    sys.stdout.write(
        f"{processes} processes, {killed} kills, {runs} runs\n"
        f"complete, with the numbers that they have alone: {runs - len(wrong)}\n"
        f"executed to the end more than once: {len(ended) - len(set(ended))}\n"
        f"steps taken: {steps}, of which {steps - 60 * runs} twice\n"
    )
    return 1 if wrong or len(set(ended)) < len(ended) else 0


if __name__ == "__main__":
    sys.exit(main())
