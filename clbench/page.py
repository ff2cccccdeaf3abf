"""Findings as one page that needs nothing else: no network, no other file, no trust in its data."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from clbench import columns
from clbench.agreement import Agreement, verdict
from clbench.columns import Column
from clbench.figures import Drawing
from clbench.findings import Findings
from clbench.leaderboard import Board
from clbench.results import Result, flat
from clbench.study import Study

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_SECTIONS = {
    "ranks": "Ranks over scenarios",
    "searches": "Searches",
    "sensitivity": "Sensitivity of modules",
}
#: Fewer seeds have an interval that hardly means anything.
_FEW = 3


@dataclass(frozen=True)
class Cell:
    """One cell of a board: what is read, and what it is sorted by."""

    text: str
    key: float | str | None
    kind: str
    style: str
    opens: bool
    hint: str


@dataclass(frozen=True)
class Entry:
    """One row of a board, with what it opens."""

    text: str
    marks: str
    cells: Sequence[Cell]
    warnings: Sequence[str]
    runs: Sequence[Mapping[str, Any]]
    configuration: Sequence[tuple[str, str]]
    environment: Sequence[tuple[str, str]]
    search: Sequence[tuple[str, str]] = ()
    published: Sequence[tuple[str, str]] = field(default=())


def html(findings: Findings, drawings: Sequence[Drawing]) -> str:
    """The page.

    Every text of a file passes through the template's escaping. The policy lets a browser run
    and apply what is written here and nothing else, and load pictures from the page alone.

    Args:
        findings: All of them.
        drawings: Of `clbench.figures.drawn`.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, js = ((_TEMPLATES / f"leaderboard.{kind}").read_text() for kind in ("css", "js"))
    shown: dict[str, list[dict[str, str]]] = {}
    for one in drawings:
        data = base64.b64encode(one.svg).decode()
        picture = {"name": one.name, "caption": one.caption, "data": data}
        shown.setdefault(one.section, []).append(picture)
    sections = [
        {"id": name, "title": title, "figures": shown[name]}
        for name, title in _SECTIONS.items()
        if name in shown
    ]
    left_out = [
        (str(kind).capitalize(), list(zip(group["path"], group["reason"], strict=True)))
        for kind, group in findings.left_out.groupby("kind", sort=False)
    ]
    return environment.get_template("leaderboard.html").render(
        policy=policy(css, js),
        css=Markup(css),
        js=Markup(js),
        boards=[_board(b, findings, shown.get(str(i), [])) for i, b in enumerate(findings.boards)],
        agreements=[_agreement(one) for one in findings.agreements],
        protocol_figures=shown.get("agreement", []),
        sections=sections,
        left_out=left_out,
        trials=findings.trials,
    )


def policy(css: str, js: str) -> str:
    """A content security policy for a page with this style and this script inside."""
    style, script = (_hashed(text) for text in (css, js))
    return (
        f"default-src 'none'; style-src {style}; script-src {script}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _board(board: Board, findings: Findings, figures: Sequence[Any]) -> dict[str, Any]:
    shown = columns.shown(board)
    told = columns.told(board)
    title = board.scenario + (f": {told}" if told else "")
    runs = dict(iter(board.runs.groupby("row")))
    return {
        "title": title,
        "why": columns.why(board),
        "score": columns.titled(board.headline),
        "columns": [{"title": c.title, "style": _style(c), "kind": _kind(c)} for c in shown],
        "entries": [
            _entry(board, row, runs[place].to_dict("records"), shown, findings, title)
            for place, row in enumerate(columns.ordered(board))
        ],
        "options": columns.described(board),
        "notes": board.notes,
        "figures": figures,
    }


def _entry(
    board: Board,
    row: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    shown: Sequence[Column],
    findings: Findings,
    title: str,
) -> Entry:
    results = [findings.results[run["path"]] for run in runs]
    study = findings.studies.get(str(row["study"]))
    return Entry(
        text=f"{row['strategy']} {title}",
        marks=" ".join(_marks(row)),
        cells=[_cell(column, row) for column in shown],
        warnings=list(_warnings(row, results, study)),
        runs=[_run(run, board) for run in runs],
        configuration=_options(results[0]),
        environment=_environment(results),
        search=_search(study) if study else (),
        published=_published(row),
    )


def _cell(column: Column, row: Mapping[str, Any]) -> Cell:
    hint = str(row["published_source"]) if column.name == "published" and row["published"] else ""
    key = columns.key(column, row)
    opens = column.name == "strategy"
    return Cell(columns.cell(column, row), key, _kind(column), _style(column), opens, hint)


def _style(column: Column) -> str:
    words = "words" if column.kind == "words" else "number"
    return f"{words} name" if column.name == "strategy" else words


def _kind(column: Column) -> str:
    return "text" if column.kind == "words" else "number"


def _marks(row: Mapping[str, Any]) -> Iterable[str]:
    if not columns.missing(row["exemplar_free"]) and row["exemplar_free"]:
        yield "exemplar-free"
    if not columns.missing(row["tuned"]):
        yield "tuned"
    if not columns.missing(row["pretrained"]) and not row["pretrained"]:
        yield "from-scratch"
    if row["seeds"] and not any(row[k] for k in ("failed", "diverged", "missing")):
        yield "complete"


def _warnings(
    row: Mapping[str, Any], results: Sequence[Result], study: Study | None
) -> Iterable[str]:
    """What a reader of the row should hold against it."""
    bad = [f"{row[k]} {k}" for k in ("failed", "diverged", "missing") if row[k]]
    if bad:
        yield f"Of its seeds: {', '.join(bad)}. What completed is no fair sample: no mean."
    elif row["seeds"] < _FEW:
        yield f"{row['seeds']} seed{'s' * (row['seeds'] > 1)}: a mean hardly says anything."
    if columns.missing(row["tuned"]):
        yield "Not tuned: its hyper-parameters were set by hand, or are defaults."
    elif row["tuned"] == "conventional":
        yield "Tuned on the data that it is reported on: an optimistic number."
    if study is not None:
        wrong = sum(trial.state == "failed" for trial in study.trials)
        if wrong:
            yield f"{wrong} of {len(study.trials)} trials of its search failed."
        if study.shared_samples:
            yield f"{study.shared_samples:,} samples are in both splits of its search."
    differ = [name for name, value in _environment(results) if " | " in value]
    if differ:
        yield f"Its seeds did not run alike: {', '.join(differ)} differ."
    if any("+dirty" in str(result.environment.get("code")) for result in results):
        yield "Made with changes to the code that were not committed."


def _run(run: Mapping[str, Any], board: Board) -> dict[str, Any]:
    complete = run["status"] == "complete"
    reason = "" if complete or columns.missing(run.get("reason")) else f": {run['reason']}"
    score, seconds = run.get(board.headline), run.get("train_seconds")
    path = str(run["path"])
    return {
        "seed": run["seed"],
        "complete": complete,
        "status": f"{run['status']}{reason}",
        "score": columns.NOTHING if columns.missing(score) else f"{100 * float(score or 0):.2f}",
        "seconds": columns.NOTHING if columns.missing(seconds) else f"{float(seconds or 0):,.1f}",
        "device": columns.option(run.get("device")),
        "code": columns.option(run.get("code")),
        "path": path,
        "link": "../" + quote(path.encode("utf-8", "surrogateescape")) + "/result.json",
    }


def _options(result: Result) -> list[tuple[str, str]]:
    """The strategy's hyper-parameters; the scenario's are the board's."""
    return _pairs(flat(result.run.get("options", {}).get("strategy", {})))


def _environment(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Versions and machine, each value that any of the runs had."""
    names = dict.fromkeys(name for result in results for name in result.environment)
    return [
        (str(name), " | ".join(dict.fromkeys(str(r.environment.get(name)) for r in results)))
        for name in names
    ]


def _search(study: Study) -> list[tuple[str, str]]:
    chosen = study.chosen or {}
    found = {
        "study": study.name,
        "protocol": study.protocol,
        "maximised": study.metric,
        **study.budget,
        **study.costs(),
        **{f"chosen {name}": value for name, value in chosen.items()},
        **{f"space of {name}": text for name, text in study.space.items()},
    }
    return _pairs(found)


def _published(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    if columns.missing(row.get("published")):
        return []
    metric = str(row["published_metric"]).replace("_", " ")
    return [
        (metric, f"{100 * row['published']:.1f} %"),
        ("difference", columns.cell(columns.named("difference"), row) + " %"),
        ("source", str(row["published_source"])),
    ]


def _agreement(one: Agreement) -> dict[str, Any]:
    rows = []
    for row in one.table.to_dict("records"):
        ranks = [str(row["rank_two_phase"]), str(row["rank_conventional"]), f"{row['change']:+d}"]
        means = [f"{100 * row['two_phase']:.1f}", f"{100 * row['conventional']:.1f}"]
        cells = [*ranks, *means, f"{100 * row['difference']:+.1f}"]
        rows.append({"strategy": row["strategy"], "cells": cells})
    return {"title": one.two_phase.scenario, "verdict": verdict(one), "rows": rows}


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), columns.option(value)) for name, value in values.items()]
