"""Test-time adaptation, a table a board: the online error in every domain, the source, the time.

python examples/errors_by_domain.py [results]
"""

import sys
from pathlib import Path

import pandas as pd

from clbench.columns import told
from clbench.leaderboard import build
from clbench.results import Result, read


def main(folder: str = "results") -> None:
    # A line for each strategy and its options, apart for each kind of stream.
    for board in build(read(folder)).boards:
        if board.headline != "online_error":
            continue
        runs = board.runs[board.runs["status"] == "complete"]
        rows = {}
        for number, group in runs.groupby("row"):
            found = [Result.from_json((Path(p) / "result.json").read_text()) for p in group["path"]]
            errors = pd.DataFrame(
                [pd.Series(r.online["by_domain"]["error"], r.online["domains"]) for r in found]
            )
            means = 100 * group[["online_error", "source_accuracy", "source_forgetting"]].mean()
            times = group["adaptation_time_ratio"].median()
            name = f"{board.table['strategy'][number]} ({len(found)})"
            rows[name] = pd.concat([100 * errors.mean(), means, pd.Series({"time": times})])
        table = pd.DataFrame(rows).T.sort_values("online_error").round(1)
        print(f"\n{board.scenario}: {told(board)}\n")
        print(
            f"| strategy (seeds) | {' | '.join(table.columns)} |\n|{'---|' * (table.shape[1] + 1)}"
        )
        for name, row in table.iterrows():
            print(f"| {name} | {' | '.join(f'{value:.1f}' for value in row)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
