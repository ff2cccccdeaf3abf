"""What runs of the suite say about its strategies: costs on a toy, scores on the leaderboard."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import configuration
import pandas as pd

from clbench import columns, protocol, userspace
from clbench.conditions import Conditions
from clbench.config import build
from clbench.errors import UserError
from clbench.results import Result
from clbench.testing import toy_for
from clbench.types import Scenario, Setting, Split, Strategy

_LEADERBOARD = userspace.suite() / "results" / "leaderboard" / "leaderboard.csv"
#: Columns of the leaderboard that a page of a strategy shows.
_SCORES = ("average_accuracy", "online_error", "forgetting", "source_forgetting")
#: Settings in which the costs of a strategy that works in several are counted first.
_KINDS = (
    frozenset(Setting) - {Setting.INSTRUCTION_TUNING, Setting.TEST_TIME_ADAPTATION},
    frozenset(Setting),
)


@cache
def strategy(name: str) -> Strategy:
    """A strategy as its YAML has it."""
    return build(configuration.node("strategy", name), Strategy, "strategy")


@cache
def costs(name: str) -> tuple[str, Mapping[str, float]] | None:
    """The toy and what a run of the strategy on it cost; None where there is no toy for it."""
    for kind in _KINDS:
        try:
            toy = toy_for(strategy(name), kind)
        except AssertionError:
            continue
        try:
            result: Result = protocol.run(toy, strategy(name), Conditions(threads=1))
        except UserError:  # it needs something that is not installed here
            return None
        return type(toy).__name__, _per_sample(result, toy)
    return None


def _per_sample(result: Result, toy: Scenario) -> dict[str, float]:
    """Passes for each sample that the stream offers, those of every epoch counted."""
    stream = toy.stream(Split.EVALUATE, 0)
    labelled = sum(len(e.train) for e in stream.experiences if e.train is not None)
    offered = toy.epochs * labelled + sum(len(a.samples) for a in stream.arrivals)
    found = {name: float(value or 0) for name, value in result.costs.items()}
    return {
        "forward": found["forward_samples"] / offered,
        "backward": found["backward_samples"] / offered,
        "trained": found["trainable_parameters"] / found["parameters"],
        "kept": found["memory_samples"],
    }


@cache
def leaderboard() -> pd.DataFrame:
    """The committed leaderboard, a row for each strategy on each board; empty without one."""
    return pd.read_csv(_LEADERBOARD) if _LEADERBOARD.is_file() else pd.DataFrame()


def rows(column: str, names: Collection[str]) -> list[dict[str, str]]:
    """Rows of the leaderboard, as texts, that have one of these names in a column."""
    table = leaderboard()
    if "name" not in table and len(table):  # as early leaderboards were
        table = table.assign(name=table["strategy"])
    if column not in table:
        return []
    return [_told(row) for row in table[table[column].isin(list(names))].to_dict("records")]


def shown() -> list[str]:
    """Titles of the columns of `rows`."""
    there = [name for name in _SCORES if name in leaderboard()]
    return ["scenario", "strategy", *(columns.titled(name) for name in there), "seeds", "tuned"]


def _told(row: Mapping[Any, Any]) -> dict[str, str]:
    told = {"scenario": str(row["scenario"]), "strategy": str(row["strategy"])}
    for name in _SCORES:
        if name in row:
            told[columns.titled(name)] = _percent(row, name)
    tuned = row.get("tuned")
    told["seeds"] = str(int(row["seeds"]))
    told["tuned"] = "no" if tuned is None or pd.isna(tuned) else columns.PROTOCOLS.get(tuned, tuned)
    return told


def _percent(row: Mapping[Any, Any], name: str) -> str:
    value, half = row[name], row.get(f"{name}_half_width")
    if value is None or math.isnan(value):
        return columns.NOTHING
    band = "" if half is None or math.isnan(half) else f" ± {100 * half:.1f}"
    return f"{100 * value:.1f}{band}"
