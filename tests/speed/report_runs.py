"""Ten thousand run folders, read, ranked and reported: how long it takes. Not a test.

    python tests/speed/report_runs.py [--runs 10000] [--folder DIR]

The folders are made up (tests/made_up.py) in the form of real ones: ten scenarios, a hundred
strategies, ten seeds; with `--trials` half of them are runs of searches instead, as a tuned table
has them. Seconds are of the clock and of the processor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import made_up

from clbench import figures, findings, page, results
from clbench.leaderboard import build
from clbench.results import Result

SCENARIOS, SEEDS = 10, 10


def made(count: int, trials: bool) -> Iterator[Result]:
    """So many runs."""
    strategies = count // (SCENARIOS * SEEDS)
    for number in range(count):
        rest, seed = divmod(number, SEEDS)
        strategy, scenario = divmod(rest, SCENARIOS)
        tuned = {"protocol": "trial"} if trials and strategy % 2 else None
        yield made_up.run(
            f"strategy_{strategy:03d}",
            seed,
            strategy / strategies,
            scenario=f"scenario_{scenario}",
            values={f"option_{strategy % 20}": 0.1 * strategy},
            tuned=tuned,
        )


def timed(name: str, action: Callable[[], Any]) -> Any:
    clock, processor = time.perf_counter(), time.process_time()
    found = action()
    seconds = time.perf_counter() - clock, time.process_time() - processor
    print(f"| {name} | {seconds[0]:.1f} | {seconds[1]:.1f} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--trials", action="store_true")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        if not (root / "runs").is_dir():
            for result in made(arguments.runs, arguments.trials):
                made_up.stored(root, result)
        print("| step | clock, s | processor, s |\n|---|---|---|")
        measured(root)


def measured(root: Path) -> None:
    """Each step of a report, one after another."""
    found = timed("find and parse the files", lambda: results.find(root))
    table = timed("one table", lambda: results.table(found))
    boards = timed("rank", lambda: build(table)).boards
    everything = timed("all of that, with what is left out", lambda: findings.gather(root))
    drawings = timed("draw the figures", lambda: figures.drawn(everything))
    text = timed("write the page", lambda: page.html(everything, drawings))
    rows = sum(len(board.table) for board in boards)
    print(
        f"\n{len(found):,} folders, {len(boards)} boards, {rows:,} rows, {len(drawings)} figures; "
        f"the page has {len(text) / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
