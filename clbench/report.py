"""Run folders to a leaderboard on disk: Markdown for people, CSV for programs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd

from clbench import plots
from clbench.errors import UserError
from clbench.files import write_atomically
from clbench.leaderboard import boards
from clbench.results import Result, read

_SHOWN = {
    "average_accuracy": "average accuracy, %",
    "average_incremental_accuracy": "average incremental accuracy, %",
    "forgetting": "forgetting, %",
    "learning_accuracy": "learning accuracy, %",
    "task_aware_average_accuracy": "task-aware average accuracy, %",
    "memory_samples": "samples kept",
    "forward_samples": "samples forward",
    "backward_samples": "samples backward",
    "train_seconds": "train, s",
}


def write(root: Path) -> list[Path]:
    """Writes the folder `leaderboard` from the runs below a results folder.

    `leaderboard.md` and `.csv`; and for each configuration whose runs say how sensitive the modules
    of their model were, `sensitivity-<configuration>.png`, a mean over seeds.

    Args:
        root: The results folder.

    Returns:
        The files written.

    Raises:
        UserError: If there are no runs.
    """
    runs = read(root)
    if runs.empty:
        raise UserError(f"No runs below {root}. Run something first.")
    tables = boards(runs)
    folder = root / "leaderboard"
    markdown = folder / "leaderboard.md"
    csv = folder / "leaderboard.csv"
    bad = runs[runs["status"] == "unreadable"]
    figures = _sensitivity(runs, folder)
    write_atomically(markdown, _markdown(tables, figures, list(bad["path"])).encode())
    rows = [board.assign(**_title(board)) for board in tables]
    write_atomically(csv, pd.concat(rows).to_csv(index=False).encode() if rows else b"")
    return [markdown, csv, *figures]


def _sensitivity(runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws what complete runs of the evaluation split have measured."""
    measured: dict[str, list[Any]] = {}
    for path in map(Path, sorted(runs["path"])):
        run = _result(path)
        facts = run.strategy_facts.get("sensitivity") if run else None
        if facts:
            configuration = path.name.rpartition("-s")[0] or path.name
            measured.setdefault(configuration, []).append(facts)
    written = []
    for name, facts in measured.items():
        figure = plots.sensitivity(facts, f"{name} (runs: {len(facts)})")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
        written.append(folder / f"sensitivity-{name}.png")
        write_atomically(written[-1], buffer.getvalue())
    return written


def _result(path: Path) -> Result | None:
    try:
        result = Result.from_json((path / "result.json").read_text())
    except (OSError, ValueError):
        return None
    shown = result.status == "complete" and result.run.get("split") == "evaluate"
    return result if shown else None


def _markdown(tables: list[pd.DataFrame], figures: list[Path], unreadable: list[str]) -> str:
    parts = [
        "# Leaderboard",
        "",
        "Mean over seeds with its 95 % interval (Student's t); made by",
        "",
    ]
    parts += ["    python -m clbench phase=report", ""]
    for board in tables:
        title = _title(board)
        parts += [f"## {_cell(title['scenario'])}", ""]
        options = ", ".join(f"{k} = {v}" for k, v in title.items() if k != "scenario")
        parts += [_cell(options), "", *_table(board), ""]
    if figures:
        parts += ["## Sensitivity of modules", ""]
        parts += ["How far modules move within an experience and across a switch to the next:", ""]
        parts += [line for path in figures for line in (f"![{path.stem}]({path.name})", "")]
    if unreadable:
        parts += ["Not readable as results, and left out:", ""]
        parts += [f"- `{path}`" for path in unreadable]
    return "\n".join(parts).rstrip() + "\n"


def _title(board: pd.DataFrame) -> dict[str, str]:
    """What all rows of a board share: scenario and conditions, without what is unset."""
    return {
        key.removeprefix("scenario."): str(value)
        for key, value in board.attrs.items()
        if not (pd.isna(value) if pd.api.types.is_scalar(value) else False)
    }


def _table(board: pd.DataFrame) -> list[str]:
    columns = ["rank", "strategy", "seeds", *_SHOWN.values()]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for rank, (_, row) in enumerate(board.iterrows(), start=1):
        failed = f" ({row['incomplete']} incomplete)" if row["incomplete"] else ""
        cells = [str(rank), _cell(row["strategy"]), f"{row['seeds']}{failed}"]
        cells += [_number(row, name, title) for name, title in _SHOWN.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(row: pd.Series, name: str, title: str) -> str:
    mean, half = row[name], row[f"{name}_half_width"]
    if pd.isna(mean):
        return "-"
    if name.endswith("_samples"):
        return f"{mean:,.0f}"
    scale = 100 if title.endswith("%") else 1
    spread = "" if pd.isna(half) else f" ± {scale * half:.1f}"
    return f"{scale * mean:.1f}{spread}"


def _cell(text: str) -> str:
    """Text that can't break a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
