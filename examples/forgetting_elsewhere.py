"""Forgetting as other suites would print it, from the accuracy matrices of the same runs.

python examples/forgetting_elsewhere.py [results]
"""

import sys
from pathlib import Path

import pandas as pd

from clbench.metrics import FORGETTING_CONVENTIONS
from clbench.results import Result, read


def main(folder: str = "results") -> None:
    runs = read(folder)
    runs = runs[(runs["status"] == "complete") & (runs["setting"] == "class_incremental")]
    rows = []
    for run in runs.itertuples():
        # A row has the path of its folder: everything else that the run left is there.
        result = Result.from_json((Path(run.path) / "result.json").read_text())
        found = {
            name: convention(result.accuracy_matrix, result.test_sizes)
            for name, convention in FORGETTING_CONVENTIONS.items()
        }
        rows.append({"scenario": run.scenario, "strategy": run.strategy, **found})
    means = pd.DataFrame(rows).groupby(["scenario", "strategy"]).mean()
    print((100 * means).round(1).to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
