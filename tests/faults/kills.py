"""Kills runs at random moments and compares what they come to: `python tests/faults/kills.py`.

Every strategy of the suite runs on a toy of every kind of setting that it works in, once in peace.
Then runs are killed (SIGKILL, SIGTERM, or SIGINT) at a random moment, up to three times each, and
go on until they end. The end must be that of the run in peace, bit for bit. Reported is the time
lost: seconds that a run took in all its processes, over those that it took in peace.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import toy_runs  # noqa: E402
from suite import composed, configured  # noqa: E402

from clbench import testing, userspace  # noqa: E402
from clbench.cells import Cell  # noqa: E402
from clbench.conditions import Conditions, Names  # noqa: E402
from clbench.config import build, options  # noqa: E402
from clbench.errors import UserError  # noqa: E402
from clbench.limits import Limits  # noqa: E402
from clbench.results import Result, find  # noqa: E402
from clbench.types import Strategy  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: A step of a toy takes this long at least, so that there is something to be killed in.
STEP = 0.001


def planned(name: str, root: Path, limits: Limits) -> Iterator[Cell]:
    """A cell for a strategy in every kind of setting, each in a folder of its own."""
    node = composed(f"strategy={name}")["strategy"]
    strategy = build(node, Strategy, "strategy")
    for kind in testing.ALIKE:
        try:
            toy = testing.toy_for(strategy, kind & strategy.settings)
        except (AssertionError, UserError):
            continue
        setting = toy.setting.value
        yield Cell(
            composed={"scenario": options(toy), "strategy": node},
            conditions=Conditions(device="cpu", threads=1),
            names=Names(setting, name),
            tuned=None,
            results_dir=root / f"{name}-{setting}",
            limits=limits,
        )


def rounds(dice: random.Random, root: Path) -> Iterator[Cell]:
    """Every cell of every strategy in a random order, over and over."""
    names = configured("strategy")
    dice.shuffle(names)
    cells = []
    for name in names:
        for cell in planned(name, root, Limits(checkpoint_every=0.2 / 60)):
            cells.append(cell)
            yield cell
    while cells:
        yield from cells


def numbers(root: Path) -> tuple[str, str]:
    """Status, and all numbers that no clock decides, as text."""
    (found,) = find(root)
    if not isinstance(found.result, Result):
        return str(found.row["status"]), ""
    return found.result.status, json.dumps(toy_runs.numbers(found.result), sort_keys=True)


def timed(process: BaseProcess, at_most: float = 300) -> float:
    """Seconds until a process has ended."""
    began = time.perf_counter()
    process.join(at_most)
    if process.exitcode is None:
        process.kill()
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15, help="begin no other run after that")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    userspace.join(userspace.suite())
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        return report(**kill(Path(folder), arguments.kills, dice, deadline))


def kill(root: Path, kills: int, dice: random.Random, deadline: float) -> Mapping[str, Any]:
    """Kills until that has happened so often, or the time is up."""
    peace: dict[str, tuple[tuple[str, str], float]] = {}
    done, lost, wrong, killed = 0, [], [], {s.name: 0 for s in SIGNALS}
    for turn, cell in enumerate(rounds(dice, root / "peace")):
        if done >= kills or time.monotonic() > deadline:
            break
        name = cell.results_dir.name
        if name not in peace:
            note = root / f"{name}.peace"
            seconds = timed(toy_runs.started(toy_runs.run_one, cell, note, STEP))
            peace[name] = numbers(cell.results_dir), seconds
        expected, seconds = peace[name]
        place = root / f"{name}-{turn}"
        spent, mine = 0.0, 0
        for _ in range(dice.randint(1, 3)):
            process = toy_runs.started(toy_runs.run_one, moved(cell, place), root / "note", STEP)
            began = time.perf_counter()
            process.join(dice.uniform(0, seconds))
            if process.exitcode is None and process.pid:
                number = dice.choice(SIGNALS)
                os.kill(process.pid, number)
                killed[number.name] += 1
                mine += 1
            timed(process)
            spent += time.perf_counter() - began
        spent += timed(toy_runs.started(toy_runs.run_one, moved(cell, place), root / "note", STEP))
        done += mine
        if mine:
            lost.append((spent - seconds) / mine)
        if numbers(place) != expected:
            wrong.append(f"{name}: {numbers(place)[0]}, {expected[0]}")
    statuses = {name: result[0] for name, (result, _) in peace.items()}
    return {"done": done, "lost": lost, "wrong": wrong, "killed": killed, "peace": statuses}


def moved(cell: Cell, place: Path) -> Cell:
    """The same run in another folder."""
    return Cell(**{**vars(cell), "results_dir": place})


def report(
    done: int, lost: list[float], wrong: list[str], killed: Mapping[str, int], peace: Any
) -> int:
    """Says what came of it; the exit code is 1 if a number differs."""
    lost = sorted(lost)
    middle, worst = (lost[len(lost) // 2], lost[-1]) if lost else (0.0, 0.0)
    sys.stdout.write(
        f"{done} kills ({', '.join(f'{n} {name}' for name, n in killed.items())}) of {len(lost)} "
        f"runs of {len(peace)} pairs of strategy and setting\n"
        f"runs that ended in other numbers: {len(wrong)}\n"
        + "".join(f"  {line}\n" for line in wrong)
        + f"time lost per kill: median {middle:.2f} s, worst {worst:.2f} s\n"
        + f"pairs that did not complete in peace: "
        f"{sorted(n for n, status in peace.items() if status != 'complete') or 'none'}\n"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
