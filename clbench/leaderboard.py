"""Many runs to ranked rows: a table in, tables out, and the word why something is in none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from clbench.metrics import headline
from clbench.statistics import half_width

#: What a run scored: fractions in [0, 1], or differences of such.
SCORES = (
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "learning_accuracy",
    "task_aware_average_accuracy",
    "forward_transfer",
    "answer_accuracy",
    "answer_forgetting",
    "format_error_rate",
    "general_accuracy",
    "general_change",
    "online_error",
    "online_calibration_error",
    "collapse",
    "source_accuracy",
    "source_forgetting",
)
#: What it cost: counts, seconds, bytes, a ratio.
COSTS = (
    "adaptation_time_ratio",
    "memory_samples",
    "parameters",
    "trainable_parameters",
    "train_seconds",
    "evaluate_seconds",
    "forward_samples",
    "backward_samples",
    "peak_memory_bytes",
)
#: Columns of a board that are averaged over seeds.
AVERAGED = (*SCORES, *COSTS)
#: `tuned` of the runs of a search: they choose, and are never reported.
TRIAL = "trial"
#: Runs that are no part of any board.
UNUSABLE = ("unreadable", "unfinished")
#: What a run's numbers depend on besides the options of its scenario.
_CONDITIONS = ("split", "precision", "benchmark")
#: What tells rows of one strategy apart besides its options.
_ORIGIN = ("base", "tuned", "study")
_PROTOCOLS = ("two_phase", "untuned", "conventional")


@dataclass(frozen=True)
class Board:
    """Ranked rows of one scenario with one set of options, under one protocol and budget.

    Attributes:
        scenario: Its name.
        setting: Value of a `clbench.types.Setting`.
        protocol: "two_phase" (rows that nobody tuned stand there too, and say so), "conventional",
            or "untuned" where nothing was tuned.
        options: What all rows share: "scenario.<name>", "data.<name>", conditions of the run,
            "budget.<name>".
        differs: Options in which it differs from other boards of the scenario, each with the
            values that these have: why they are apart.
        headline: The column that ranks.
        higher: Whether more of it is better.
        table: One row for each strategy and its hyper-parameters, best first. `rank` (equal
            scores share one), `strategy` (label), `name`, `base`, `tuned`, `study`; `seeds`
            (complete), `failed`, `diverged`, `missing` (planned by the budget, not there); for
            every averaged column its mean, `<column>_std` (sample standard deviation) and
            `<column>_half_width` (of the mean's 95 % interval, Student's t);
            `exemplar_free`, `pretrained`; `tuning_seconds`, `tuning_trials`. A mean is null
            where any of its seeds is not there or lacks the number.
        runs: Those of its rows, each with `row`, its place in `table`.
        notes: What else a reader should know.
    """

    scenario: str
    setting: str
    protocol: str
    options: Mapping[str, Any]
    differs: Mapping[str, tuple[Any, ...]]
    headline: str
    higher: bool
    table: pd.DataFrame
    runs: pd.DataFrame
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leaderboard:
    """All boards, and what is in none of them.

    Attributes:
        boards: By scenario, protocol and options.
        left_out: Columns path, kind ("unreadable", "unfinished", "duplicate", or the status of a
            run that did not complete) and reason.
        trials: Runs of searches, which choose and are never reported.
    """

    boards: list[Board] = field(default_factory=list)
    left_out: pd.DataFrame = field(default_factory=lambda: _left_out([]))
    trials: int = 0


def build(runs: pd.DataFrame, tuning: Mapping[str, Mapping[str, Any]] | None = None) -> Leaderboard:
    """Ranks runs, never mixing those of different scenario options, protocols or budgets.

    Args:
        runs: As `clbench.results.read` gives it, `path` being unique.
        tuning: What searches cost, by the name of their study: `tuning_seconds`, `tuning_trials`.

    Returns:
        The boards. A seed counts once in a row: of several complete runs the first by path, the
        others are left out and named. A seed that did not complete counts as such unless another
        run of it did.
    """
    if runs.empty:
        return Leaderboard()
    usable = runs[~runs["status"].isin(UNUSABLE)]
    trial = usable["tuned"].eq(TRIAL) if "tuned" in usable else pd.Series(False, usable.index)
    usable = usable[~trial].copy()
    unusable = runs[runs["status"].isin(UNUSABLE)]
    names = list(zip(unusable["path"], unusable["status"], unusable["reason"], strict=True))
    if usable.empty:
        return Leaderboard([], _left_out(names), int(trial.sum()))
    usable["seed"] = usable["seed"].astype(int)  # beside files without one they are floats
    shared = _shared(usable)
    own = [c for c in usable if c in ("strategy", *_ORIGIN) or _may_tell(c)]
    usable["_shape"] = _numbered(usable, shared)
    usable["_budget"] = _numbered(usable, _budget(usable))
    usable["_row"] = _numbered(usable, ["_shape", "_budget", *own])
    usable, repeated = _once(usable)
    names += [*repeated, *_incomplete(usable)]
    boards = [_board(group, shared, own, tuning or {}) for group in _groups(usable)]
    return Leaderboard(_told_apart(boards), _left_out(names), int(trial.sum()))


def label(run: Mapping[str, Any]) -> str:
    """A strategy with what it wraps, as tables name it."""
    base = run.get("base")
    return f"{run['strategy']} over {base}" if isinstance(base, str) else str(run["strategy"])


def _may_tell(column: str) -> bool:
    """Whether it tells rows of one strategy apart, in words: options, and how costs came about."""
    return column.startswith("strategy.") or column in ("cache_features", "compile")


def _shared(runs: pd.DataFrame) -> list[str]:
    """Columns that say which scenario, and under which conditions."""
    own = [c for c in runs if c == "scenario" or c.startswith(("scenario.", "data."))]
    return own + [c for c in _CONDITIONS if c in runs]


def _budget(runs: pd.DataFrame) -> list[str]:
    return [c for c in runs if c == "tuned" or c.startswith("budget.")]


def _numbered(runs: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """The same number for rows that agree in all columns, where nothing agrees with nothing."""
    if not columns:
        return pd.Series(0, runs.index)
    return runs.groupby(list(columns), dropna=False, sort=False).ngroup()


def _once(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str, str]]]:
    """Each seed of a row once, and the runs that this leaves out."""
    runs = runs.assign(_incomplete=runs["status"] != "complete")
    runs = runs.sort_values(["_row", "seed", "_incomplete", "path"], kind="stable")
    again = runs.duplicated(["_row", "seed"])
    first = runs[~again].set_index(["_row", "seed"])
    names = []
    for _, run in runs[again].iterrows():
        counted = first.loc[(run["_row"], run["seed"])]
        if run["_incomplete"]:
            kind, reason = run["status"], f"{run['reason']}; {counted['path']} is another attempt"
        else:
            same = all(_same(run.get(c), counted.get(c)) for c in SCORES)
            kind = "duplicate"
            numbers = "the same numbers as" if same else "other numbers than"
            reason = f"{numbers} {counted['path']}, which counts"
        names.append((run["path"], kind, reason))
    return runs[~again], names


def _same(one: Any, other: Any) -> bool:
    return bool(one == other or (pd.isna(one) and pd.isna(other)))


def _incomplete(runs: pd.DataFrame) -> list[tuple[str, str, str]]:
    bad = runs[runs["_incomplete"]]
    return list(zip(bad["path"], bad["status"], bad["reason"].astype(str), strict=True))


def _left_out(names: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
    order = ["unreadable", "unfinished", "failed", "diverged", "out of memory", "timed out"]
    order.append("duplicate")
    known = {kind: place for place, kind in enumerate(order)}
    ranked = sorted(names, key=lambda n: (known.get(n[1], len(order)), *map(str, n)))
    return pd.DataFrame(ranked, columns=["path", "kind", "reason"])


def _groups(runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The runs of each board; untuned ones stand beside those of every two-phase budget."""
    for _, shape in runs.groupby("_shape", sort=False):
        protocol = _protocol(shape)
        untuned = shape[protocol == "untuned"]
        budgets = [group for _, group in shape[protocol != "untuned"].groupby("_budget")]
        joined = False
        for group in budgets:
            beside = _protocol(group).iloc[0] == "two_phase" and not untuned.empty
            joined |= beside
            yield pd.concat([group, untuned]) if beside else group
        if not untuned.empty and not joined:
            yield untuned


def _protocol(runs: pd.DataFrame) -> pd.Series:
    if "tuned" not in runs:
        return pd.Series("untuned", runs.index)
    return runs["tuned"].astype(object).where(runs["tuned"].notna(), "untuned").astype(str)


def _board(
    group: pd.DataFrame, shared: list[str], own: list[str], tuning: Mapping[str, Mapping[str, Any]]
) -> Board:
    first = group.iloc[0]
    setting = str(first.get("setting") or "class_incremental")
    column, higher = headline(setting)
    table = _rows(group, own, tuning)
    order = [column, "strategy"]
    table = table.sort_values(order, ascending=[not higher, True], na_position="last")
    place = {row: index for index, row in enumerate(table["_row"])}
    table = table.drop(columns="_row").reset_index(drop=True)
    ranks = table[column].rank(method="min", ascending=not higher)
    table.insert(0, "rank", ranks.astype("Int64"))
    options = {c: first[c] for c in [*shared, *_budget(group)] if c not in ("scenario", "tuned")}
    runs = group.assign(row=group["_row"].map(place))
    runs = runs.drop(columns=[c for c in runs if c.startswith("_")])
    runs = runs.sort_values(["row", "seed"], kind="stable").reset_index(drop=True)
    known = {name: value for name, value in options.items() if not _nothing(value)}
    protocol = str(_protocol(group).iloc[0])
    scenario = str(first["scenario"])
    return Board(scenario, setting, protocol, known, {}, column, higher, table, runs)


def _rows(
    group: pd.DataFrame, own: list[str], tuning: Mapping[str, Mapping[str, Any]]
) -> pd.DataFrame:
    """The rows of a board, not ranked yet."""
    rows = group.drop_duplicates("_row").set_index("_row")
    varying = [k for k in own if _may_tell(k) and group[k].nunique(dropna=False) > 1]
    table = pd.DataFrame(index=rows.index)
    table["strategy"] = _labels(rows, varying)
    table["name"] = rows["strategy"]
    for name in _ORIGIN:
        table[name] = rows.get(name)
    status = group.groupby("_row")["status"].value_counts().unstack(fill_value=0)
    table["seeds"] = status.get("complete", 0)
    table["diverged"] = status.get("diverged", 0)
    table["failed"] = status.sum(axis=1) - table["seeds"] - table["diverged"]
    planned = rows["budget.seeds"] if "budget.seeds" in rows else pd.Series(np.nan, rows.index)
    there = status.sum(axis=1)
    table["missing"] = (planned.fillna(there).astype(float) - there).clip(lower=0).astype(int)
    whole = table[["diverged", "failed", "missing"]].sum(axis=1).eq(0) & table["seeds"].gt(0)
    table = table.join(_averages(group, whole))
    table["exemplar_free"] = table["memory_samples"].eq(0).where(table["memory_samples"].notna())
    pretrained = group.dropna(subset=["pretrained"]) if "pretrained" in group else group.iloc[:0]
    found = pretrained.groupby("_row")["pretrained"].first() if len(pretrained) else None
    table["pretrained"] = None if found is None else found.reindex(table.index)
    for name in ("tuning_seconds", "tuning_trials"):
        costs = {study: cost.get(name) for study, cost in tuning.items()}
        table[name] = pd.to_numeric(table["study"].map(costs))
    return table.reset_index()


def _averages(group: pd.DataFrame, whole: pd.Series) -> pd.DataFrame:
    """Means over seeds, null where a number is missing; all columns, whether there or not."""
    complete = group[group["status"] == "complete"].reindex(columns=["_row", *AVERAGED])
    numbers = complete.astype(dict.fromkeys(AVERAGED, float)).groupby("_row")
    count = numbers.count().reindex(whole.index)
    size = numbers.size().reindex(whole.index, fill_value=0)
    full = count.eq(size, axis=0) & whole.to_numpy()[:, None]
    mean = numbers.mean().reindex(whole.index).where(full)
    std = numbers.std(ddof=1).reindex(whole.index).where(full)
    half = std.mul([half_width(n) for n in size], axis=0)
    parts = {"": mean, "_std": std, "_half_width": half}
    return pd.DataFrame(
        {f"{c}{suffix}": part[c] for c in AVERAGED for suffix, part in parts.items()}
    )


def _labels(rows: pd.DataFrame, varying: Sequence[str]) -> pd.Series:
    """Names of rows, each with what tells it from its namesakes: protocol, options, study."""
    names = pd.Series([label(row) for _, row in rows.iterrows()], rows.index)
    protocols = _protocol(rows).str.replace("_", "-")
    for _, namesakes in rows.groupby(names):
        apart = protocols[namesakes.index]
        for protocol, same in namesakes.groupby(apart):
            words = _telling(same, varying) if len(same) > 1 else [""]
            if apart.nunique() > 1:
                words = [", ".join(filter(None, (str(protocol), w))) for w in words]
            names[same.index] += [f" ({w})" if w else "" for w in words]
    return names


def _telling(rows: pd.DataFrame, varying: Sequence[str]) -> list[str]:
    """The options, or the studies, that tell rows apart."""
    telling = [k for k in varying if rows[k].nunique(dropna=False) > 1]
    for written in (_short, str):
        words = [_words(row, telling, written) for _, row in rows.iterrows()]
        if len(set(words)) == len(words):
            return words
    studies = rows["study"] if "study" in rows else pd.Series("", rows.index)
    return [f"{w}, study {s}".removeprefix(", ") for w, s in zip(words, studies, strict=True)]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(row: pd.Series, options: Sequence[str], written: Callable[[Any], str] = _short) -> str:
    known = [k for k in options if not _nothing(row[k])]
    return ", ".join(f"{k.removeprefix('strategy.')}={written(row[k])}" for k in known)


def _told_apart(boards: Sequence[Board]) -> list[Board]:
    """In order, and each with the options that tell it from others of its scenario."""
    told = []
    for board in boards:
        others = [b for b in boards if b.scenario == board.scenario and b is not board]
        keys = dict.fromkeys(k for b in (board, *others) for k in b.options)
        differs = {
            k: values
            for k in keys
            if (values := _elsewhere(board.options.get(k), _values(board, others, k)))
        }
        protocols = _elsewhere(board.protocol, [b.protocol for b in others])
        differs = {"protocol": protocols, **differs} if protocols else differs
        told.append(Board(**{**vars(board), "differs": differs}))
    return sorted(told, key=_place)


def _values(board: Board, others: Sequence[Board], option: str) -> list[Any]:
    """Of others that can have it: a board where nothing was tuned has no budget to differ in."""
    if option.startswith("budget."):
        others = [b for b in others if "untuned" not in (b.protocol, board.protocol)]
    return [b.options.get(option) for b in others]


def _elsewhere(here: Any, others: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(value for value in others if value != here))


def _place(board: Board) -> tuple[Any, ...]:
    here = [f"{k}={board.options.get(k)}" for k in board.differs]
    tuning = board.options.get("split") != "evaluate"
    protocol = {name: place for place, name in enumerate(_PROTOCOLS)}.get(board.protocol, 9)
    return board.scenario, tuning, protocol, board.protocol, here


def _nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
