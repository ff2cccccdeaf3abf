"""What a board shows of its table, and how a cell is written, in Markdown as on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from clbench.leaderboard import Board

Kind = Literal["words", "rank", "percent", "seconds", "count", "bytes", "ratio", "flag", "seeds"]
#: Of a cell that has no number.
NOTHING = "-"
PROTOCOLS = {"two_phase": "two phases", "conventional": "conventional", "untuned": "not tuned"}


@dataclass(frozen=True)
class Column:
    """One column of a board.

    Attributes:
        name: In the table.
        title: With the unit.
        kind: How its cells are written.
        always: Shown also where no row has a value.
    """

    name: str
    title: str
    kind: Kind
    always: bool = False


COLUMNS = (
    Column("rank", "rank", "rank", True),
    Column("strategy", "strategy", "words", True),
    Column("average_accuracy", "average accuracy, %", "percent"),
    Column("online_error", "online error, %", "percent"),
    Column("published", "published, %", "percent"),
    Column("difference", "difference, %", "percent"),
    Column("forgetting", "forgetting, %", "percent"),
    Column("learning_accuracy", "learning accuracy, %", "percent"),
    Column("backward_transfer", "backward transfer, %", "percent"),
    Column("answer_accuracy", "right whatever the form, %", "percent"),
    Column("answer_forgetting", "forgetting whatever the form, %", "percent"),
    Column("format_error_rate", "answers out of form, %", "percent"),
    Column("general_accuracy", "general ability, %", "percent"),
    Column("general_change", "change of general ability, %", "percent"),
    Column("source_accuracy", "accuracy on the source, %", "percent"),
    Column("source_forgetting", "forgetting of the source, %", "percent"),
    Column("seeds", "seeds", "seeds", True),
    Column("tuned", "tuned", "words", True),
    Column("exemplar_free", "exemplar-free", "flag", True),
    Column("pretrained", "pre-trained", "flag", True),
    Column("memory_samples", "samples kept", "count"),
    Column("parameters", "parameters", "count"),
    Column("trainable_parameters", "trained parameters", "count"),
    Column("train_seconds", "train, s", "seconds"),
    Column("evaluate_seconds", "test, s", "seconds"),
    Column("tuning_seconds", "tuning, s", "seconds"),
    Column("tuning_trials", "trials", "count"),
    Column("adaptation_time_ratio", "x plain inference", "ratio"),
    Column("forward_samples", "samples forward", "count"),
    Column("backward_samples", "samples backward", "count"),
    Column("peak_memory_bytes", "peak memory, MB", "bytes"),
    Column("average_incremental_accuracy", "average incremental accuracy, %", "percent"),
    Column("task_aware_average_accuracy", "task-aware average accuracy, %", "percent"),
    Column("forward_transfer", "forward transfer, %", "percent"),
    Column("online_calibration_error", "calibration error, %", "percent"),
    Column("collapse", "most frequent answer, %", "percent"),
)


def named(name: str) -> Column:
    """The column of this name."""
    return {column.name: column for column in COLUMNS}[name]


def titled(name: str) -> str:
    """Its title."""
    return named(name).title


def shown(board: Board) -> list[Column]:
    """The columns of a board that have something to say, the one that ranks after the name."""
    some = [c for c in COLUMNS if c.always or (c.name in board.table and _some(board, c.name))]
    first = [c for c in some if c.name in ("rank", "strategy")]
    headline = [c for c in COLUMNS if c.name == board.headline]
    return [*first, *headline, *(c for c in some if c not in (*first, *headline))]


def cell(column: Column, row: Mapping[str, Any]) -> str:
    """A cell as people read it: plain text, nothing escaped."""
    value = row.get(column.name)
    if column.kind == "seeds":
        return _seeds(row)
    if column.name == "tuned":
        return PROTOCOLS.get(str(value), "no" if missing(value) else str(value))
    if value is None or missing(value):
        return NOTHING
    if column.kind == "percent":
        return _percent(column, row)
    if column.kind == "flag":
        return "yes" if value else "no"
    if column.kind == "words":
        return str(value)
    return _number(column.kind, float(value))


def key(column: Column, row: Mapping[str, Any]) -> float | str | None:
    """What a cell is sorted by; None comes last."""
    value = row.get(column.name)
    if column.kind == "words":
        return cell(column, row)
    return None if value is None or missing(value) else float(value)


def missing(value: Any) -> bool:
    """None, NaN or pandas's NA."""
    return bool(pd.isna(value)) if pd.api.types.is_scalar(value) else False


def _some(board: Board, name: str) -> bool:
    return bool(board.table[name].notna().any())


def _percent(column: Column, row: Mapping[str, Any]) -> str:
    sign = "+" if column.name == "difference" else ""
    text = f"{100 * row[column.name]:{sign}.1f}"
    half = row.get(f"{column.name}_half_width")
    if column.name == "published" and row.get("published_metric") not in (None, "average_accuracy"):
        text += f" ({str(row['published_metric']).replace('_', ' ')})"
    return text if missing(half) else f"{text} ± {100 * float(half or 0):.1f}"


def _number(kind: Kind, value: float) -> str:
    if kind == "bytes":
        return f"{value / 1e6:,.0f}"
    if kind in ("seconds", "ratio") and value < 100:
        return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2g}"
    return f"{value:,.0f}"


def _seeds(row: Mapping[str, Any]) -> str:
    bad = [f"{row[k]} {k}" for k in ("failed", "diverged", "missing") if row.get(k)]
    return f"{row['seeds']} ({', '.join(bad)})" if bad else f"{row['seeds']}"


def option(value: Any) -> str:
    """The value of an option, in words."""
    if missing(value):
        return "unset"
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return str(value)


def told(board: Board) -> str:
    """What tells a board from others of its scenario; empty if nothing does."""
    parts = [option(_here(board, k)) for k in board.differs if k == "protocol"]
    parts += [f"{_name(k)} = {option(_here(board, k))}" for k in board.differs if k != "protocol"]
    return ", ".join(parts)


def why(board: Board) -> str:
    """Why a board is apart from others of its scenario, in a sentence; empty if it is not."""
    parts = []
    for name, values in board.differs.items():
        words = (PROTOCOLS.get(v, v) if name == "protocol" else v for v in values)
        here, elsewhere = option(_here(board, name)), " or ".join(map(option, words))
        parts.append(f"{_name(name)} is {here} here, {elsewhere} elsewhere")
    return f"Apart from other boards of {board.scenario}: {'; '.join(parts)}." if parts else ""


def described(board: Board) -> list[tuple[str, str]]:
    """The options that all rows of a board share."""
    return [(_name(k), option(v)) for k, v in board.options.items()]


def _here(board: Board, name: str) -> Any:
    if name == "protocol":
        return PROTOCOLS.get(board.protocol, board.protocol)
    return board.options.get(name)


def _name(key: str) -> str:
    return key.removeprefix("scenario.")


def ordered(board: Board) -> Sequence[Mapping[str, Any]]:
    """Its rows, best first, as plain mappings."""
    rows: Sequence[Mapping[str, Any]] = board.table.to_dict("records")
    return rows
