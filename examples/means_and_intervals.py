"""Means with 95 % intervals of every strategy on every scenario, as a table.

python examples/means_and_intervals.py [results]
"""

import sys

from clbench.results import read
from clbench.statistics import interval


def main(folder: str = "results") -> None:
    runs = read(folder)
    # What chose hyper-parameters, and what did not complete, is no result.
    runs = runs[(runs["status"] == "complete") & (runs["split"] == "evaluate")]
    runs = runs[runs["tuned"] != "trial"]
    for (scenario, strategy), group in runs.groupby(["scenario", "strategy"]):
        found = interval(group["average_accuracy"])
        spread = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
        print(f"{scenario:20} {strategy:20} {100 * (found.mean or 0):5.1f}{spread} ({found.count})")


if __name__ == "__main__":
    main(*sys.argv[1:])
