"""Findings as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import pandas as pd

from clbench import columns
from clbench.agreement import Agreement, verdict
from clbench.findings import Findings
from clbench.leaderboard import Board

#: Paths of one kind that are listed; the file left_out.csv has all of them.
LISTED = 50
_SPECIAL = re.compile(r"([\\`*\[\]|$~#!])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def text(findings: Findings, figures: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The leaderboard as a file.

    Args:
        findings: All of them.
        figures: By the section they belong to (see `clbench.figures.Drawing`): path and caption.
    """
    parts = [
        *("# Leaderboard", ""),
        "Means over seeds with their 95 % intervals (Student's t); a mean is `-` where a seed",
        "failed, diverged, is missing or lacks the number. Made by",
        *("", "    python -m clbench phase=report", ""),
    ]
    for place, board in enumerate(findings.boards):
        parts += [*_board(board), *_figures(figures.get(str(place), ()))]
    if findings.agreements:
        parts += ["## Two phases against tuning on what is reported", ""]
        parts += chain.from_iterable(map(_agreement, findings.agreements))
        parts += _figures(figures.get("agreement", ()))
    titles = {
        "ranks": "Ranks over scenarios",
        "searches": "Searches",
        "sensitivity": "Sensitivity of modules",
    }
    for key, title in titles.items():
        if figures.get(key):
            parts += [f"## {title}", "", *_figures(figures[key])]
    parts += _left_out(findings)
    return "\n".join(parts).rstrip() + "\n"


def escaped(words: str) -> str:
    """Text from a file, as Markdown that shows it and does nothing else."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(lambda m: "\\" + m[0], plain)


def code(words: str) -> str:
    """Text from a file as a span of code, in which nothing means anything."""
    line = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _board(board: Board) -> Iterable[str]:
    told = columns.told(board)
    title = escaped(board.scenario) + (f": {escaped(told)}" if told else "")
    yield from (f"## {title}", "")
    why = columns.why(board)
    if why:
        yield from (escaped(why), "")
    yield from _table(board)
    yield ""
    yield from (code(", ".join(f"{k} = {v}" for k, v in columns.described(board))), "")
    for note in board.notes:
        yield f"- {escaped(note)}"
    yield from ("",) if board.notes else ()


def _table(board: Board) -> Iterable[str]:
    shown = columns.shown(board)
    yield "| " + " | ".join(escaped(c.title) for c in shown) + " |"
    yield "|" + "".join("---|" if c.kind == "words" else "--:|" for c in shown)
    for row in columns.ordered(board):
        yield "| " + " | ".join(escaped(columns.cell(c, row)) for c in shown) + " |"


def _agreement(one: Agreement) -> Iterable[str]:
    yield from (f"### {escaped(one.two_phase.scenario)}", "", escaped(verdict(one)), "")
    yield "| strategy | rank, two phases | rank, conventional | change | two phases, % | conventional, % | difference, % |"  # noqa: E501
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for row in one.table.to_dict("records"):
        ranks = f"{row['rank_two_phase']} | {row['rank_conventional']} | {row['change']:+d}"
        means = f"{100 * row['two_phase']:.1f} | {100 * row['conventional']:.1f}"
        yield f"| {escaped(row['strategy'])} | {ranks} | {means} | {100 * row['difference']:+.1f} |"
    yield ""


def _figures(figures: Iterable[tuple[str, str]]) -> Iterable[str]:
    for path, title in figures:
        yield from (f"![{escaped(title)}]({path})", "")


def _left_out(findings: Findings) -> Iterable[str]:
    if not len(findings.left_out) and not findings.trials:
        return
    yield from ("## Left out", "")
    if findings.trials:
        noun = "run" if findings.trials == 1 else "runs"
        yield from (f"{findings.trials:,} {noun} of searches: they choose, nothing else.", "")
    for kind, group in findings.left_out.groupby("kind", sort=False):
        yield from (f"{escaped(str(kind)).capitalize()}, {len(group)}:", "")
        yield from map(_named, group.head(LISTED).itertuples(index=False))
        if len(group) > LISTED:
            yield f"- and {len(group) - LISTED} more: `left_out.csv` has them"
        yield ""


def _named(row: pd.Series) -> str:
    return f"- {escaped(str(row.path))}: {escaped(str(row.reason))}"
