"""Many runs to ranked rows: a table in, a table out."""

from __future__ import annotations

from typing import Any

import pandas as pd

from clbench.statistics import deviation, interval

#: Columns of a board that are averaged over seeds; fractions in [0, 1], seconds, counts.
AVERAGED = (
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "learning_accuracy",
    "task_aware_average_accuracy",
    "online_error",
    "online_calibration_error",
    "collapse",
    "source_accuracy",
    "source_forgetting",
    "adaptation_time_ratio",
    "forward_samples",
    "backward_samples",
    "train_seconds",
    "evaluate_seconds",
    "forward_samples",
    "backward_samples",
    "memory_samples",
    "parameters",
)
HEADLINE = "average_accuracy"
#: `tuned` of the runs of a search: they choose, and are never reported.
TRIAL = "trial"
#: Where samples arrive without labels, what counts is how they were answered; lower is better.
ONLINE_HEADLINE = "online_error"
_CONDITIONS = ("split", "precision")
#: What tells rows of one strategy apart besides its options.
_ORIGIN = ("base", "tuned", "study")


def boards(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """One ranked board for each set of scenario options; results of different ones never mix.

    Args:
        runs: As `clbench.results.read` gives it.

    Returns:
        Boards with one row per strategy and hyper-parameters, best headline mean first: name,
        `seeds` (complete runs, each seed once), `incomplete` (failed, diverged), and for every
        averaged column its mean, `<column>_std` (sample standard deviation) and
        `<column>_half_width` (of the mean's 95 % interval, Student's t), both empty for a single
        seed.
        `DataFrame.attrs` holds the scenario's name, options and number of experiences.
    """
    known = runs[runs["status"] != "unreadable"] if len(runs) else runs
    if "tuned" in known:
        known = known[known["tuned"] != TRIAL]
    if known.empty:
        return []
    keys = _keys(known, "scenario")
    return [_board(group, keys) for _, group in known.groupby(keys, dropna=False, sort=True)]


def _keys(runs: pd.DataFrame, part: str) -> list[str]:
    """Columns that say which scenario (and under which conditions), or which strategy."""
    own = [c for c in runs.columns if c == part or c.startswith(f"{part}.")]
    return own + [c for c in (_CONDITIONS if part == "scenario" else _ORIGIN) if c in runs]


def _board(group: pd.DataFrame, scenario_keys: list[str]) -> pd.DataFrame:
    rows = []
    keys = _keys(group, "strategy")
    varying = [k for k in keys if k.startswith("strategy.") and group[k].nunique(dropna=False) > 1]
    for _, runs in group.groupby(keys, dropna=False, sort=True):
        # The same seed on another machine, or with other evaluations, is no further evidence.
        complete = runs[runs["status"] == "complete"].drop_duplicates("seed")
        row: dict[str, Any] = {"strategy": _label(runs.iloc[0], group, varying)}
        row |= {"seeds": len(complete), "incomplete": (runs["status"] != "complete").sum()}
        for column in AVERAGED:
            values = complete[column] if column in complete else pd.Series(dtype=float)
            found = interval(values.dropna())
            row[column] = found.mean
            row[f"{column}_std"] = deviation(values.dropna())
            row[f"{column}_half_width"] = found.half_width
        rows.append(row)
    board = pd.DataFrame(rows)
    online = bool(board[ONLINE_HEADLINE].notna().any())
    headline = ONLINE_HEADLINE if online else HEADLINE
    board = board.sort_values(headline, ascending=online, na_position="last")
    board = board.reset_index(drop=True)
    board.attrs = {k: group.iloc[0][k] for k in scenario_keys}
    return board


def _label(run: pd.Series, group: pd.DataFrame, varying: list[str]) -> str:
    """The strategy's name, with the options that tell it from its namesakes."""
    base = run.get("base")
    name = f"{run['strategy']} over {base}" if isinstance(base, str) else str(run["strategy"])
    namesakes = group[group["strategy"] == run["strategy"]]
    if "base" in group:
        same = namesakes["base"].isna() if not isinstance(base, str) else namesakes["base"] == base
        namesakes = namesakes[same]
    telling = [k for k in varying if namesakes[k].nunique(dropna=False) > 1]
    if not telling:
        return name
    chosen = [f"{k.removeprefix('strategy.')}={run[k]}" for k in telling]
    return f"{name} ({', '.join(chosen)})"
