"""Which figures a report has, and the bytes of their files."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from clbench.columns import PROTOCOLS, told
from clbench.errors import UserError
from clbench.findings import Findings
from clbench.leaderboard import Board
from clbench.plots import accuracy, costs, domains, modules, protocols, ranks, searches, style
from clbench.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Lines, maps and points in one figure, of the best rows: more could not be told apart.
LINES, MAPS, POINTS = 8, 6, 24


@dataclass(frozen=True)
class Drawing:
    """A figure of a report.

    Attributes:
        section: Place of its board, as text; or "agreement", "ranks", "searches", "sensitivity".
        name: Of its files, without suffix: safe on every system.
        caption: What it shows, in words.
        svg: Bytes of the vector file.
        png: Bytes of the other one.
    """

    section: str
    name: str
    caption: str
    svg: bytes
    png: bytes


Plan = tuple[str, str, str, Callable[[], "Figure"]]


def drawn(findings: Findings) -> list[Drawing]:
    """All figures of a report that its runs have the numbers for."""
    drawings = []
    for section, name, caption, draw in _planned(findings):
        try:
            figure = draw()
        except UserError:  # nothing to draw; the tables say why
            continue
        files = style.rendered(figure, "svg"), style.rendered(figure, "png")
        drawings.append(Drawing(section, name, caption, *files))
    return drawings


def _planned(findings: Findings) -> Iterator[Plan]:
    for place, board in enumerate(findings.boards):
        # Runs that choose, and rankings that are there to be doubted, need no pictures.
        if board.options.get("split") == "evaluate" and board.protocol != "conventional":
            yield from _of_board(str(place), board, findings.results)
    for one in findings.agreements:
        title = one.two_phase.scenario
        name = _name("protocols", title, one.two_phase.options)
        words = f"Ranks on {title} when tuned on what is reported, and in two phases"
        yield "agreement", name, words, functools.partial(protocols.slopes, one, title)
    for key, boards in _comparable(findings.boards).items():
        scores = _scores(boards)
        words = f"Mean ranks over {len(scores)} scenarios ({key}) with the critical difference"
        draw = functools.partial(ranks.critical_differences, scores, boards[0].higher, key)
        yield "ranks", _name("ranks", key, scores.index), words, draw
    for study in findings.studies.values():
        words = f"Trials of the search {study.name}"
        draw = functools.partial(searches.trials, study)
        yield "searches", _name("trials", study.name), words, draw
        words = f"What mattered in the search {study.name}"
        draw = functools.partial(searches.importance, study)
        yield "searches", _name("importance", study.name), words, draw
    yield from _sensitivity(findings)


def _of_board(section: str, board: Board, results: Mapping[str, Result]) -> Iterator[Plan]:
    lines, maps = _series(board, results, LINES), _series(board, results, MAPS)
    scored = board.table[board.headline].notna().sum()
    title = board.scenario + (f": {told(board)}" if board.differs else "")
    best = f", the {len(lines)} best of {scored}" if scored > len(lines) else ""
    maximal = f", the {len(maps)} best of {scored}" if scored > len(maps) else ""
    plans: list[tuple[str, str, Callable[..., Figure], Any]] = []
    if board.headline == "online_error":
        plans += [
            ("domains", f"Online error in each domain{best}", domains.errors, lines),
            ("source", f"Accuracy on the source along the stream{best}", domains.source, lines),
        ]
    else:
        plans.append(("curves", f"Accuracy over experiences{best}", accuracy.curves, lines))
    if all(run.accuracy_matrix for runs in maps.values() for run in runs):
        words = f"Accuracy matrices, means over seeds{maximal}"
        plans.append(("matrices", words, accuracy.matrices, maps))
    if scored > 1:
        plans += _of_costs(replace(board, table=board.table.head(POINTS)), scored)
    for kind, caption, draw, what in plans:
        name = _name(kind, board.scenario, board.protocol, board.options)
        yield section, name, f"{caption}, {title}", functools.partial(draw, what, title)


def _of_costs(board: Board, scored: int) -> Iterator[tuple[str, str, Callable[..., Figure], Any]]:
    """Figures with a point for each of the best rows."""
    best = f", the {POINTS} best of {scored}" if scored > POINTS else ""
    yield "cost", f"The score against seconds of training{best}", costs.cost, board
    if board.table["memory_samples"].nunique() > 1:
        yield "memory", f"The score against samples kept{best}", costs.memory, board
    lost, won = (costs.TITLES[name].removesuffix(", %") for name in costs.trade(board))
    yield "trade", f"{won.capitalize()} against {lost}{best}", costs.plasticity, board


def _series(board: Board, results: Mapping[str, Result], most: int) -> dict[str, list[Result]]:
    """The complete runs of the best rows, by label."""
    scored = board.table[board.table[board.headline].notna()].head(most)
    complete = board.runs[board.runs["status"] == "complete"]
    paths = complete.groupby("row")["path"].apply(list)
    return {row["strategy"]: [results[p] for p in paths[i]] for i, row in scored.iterrows()}


def _comparable(boards: Sequence[Board]) -> dict[str, list[Board]]:
    """One board a scenario, the one with most rows, for each way to score and to tune."""
    chosen: dict[str, dict[str, Board]] = {}
    for board in boards:
        if board.options.get("split") == "evaluate":
            tuned = PROTOCOLS.get(board.protocol, board.protocol)
            group = chosen.setdefault(f"{board.headline.replace('_', ' ')}, {tuned}", {})
            other = group.get(board.scenario)
            if other is None or len(board.table) > len(other.table):
                group[board.scenario] = board
    return {key: list(group.values()) for key, group in chosen.items() if len(group) > 2}


def _scores(boards: Sequence[Board]) -> pd.DataFrame:
    """[scenarios, strategies]: those that every board ranks, by their label."""
    columns = {b.scenario: b.table.set_index("strategy")[b.headline].dropna() for b in boards}
    return pd.DataFrame(columns).dropna().T


def _sensitivity(findings: Findings) -> Iterator[Plan]:
    """What complete runs of the evaluation split have measured, a mean over their seeds."""
    measured: dict[str, list[Any]] = {}
    for path, result in sorted(findings.results.items()):
        facts = result.strategy_facts.get("sensitivity")
        if facts and result.status == "complete" and result.run.get("split") == "evaluate":
            name = path.rpartition("/")[2]
            measured.setdefault(name.rpartition("-s")[0] or name, []).append(facts)
    for name, facts in measured.items():
        title = f"{name} (runs: {len(facts)})"
        words = f"How far modules move within an experience and across a switch, {title}"
        draw = functools.partial(modules.sensitivity, facts, title)
        yield "sensitivity", _name("sensitivity", name), words, draw


def _name(kind: str, *parts: Any) -> str:
    """A file name that says what it is, and is another one for anything else."""
    digest = hashlib.sha256(repr(parts).encode(errors="replace")).hexdigest()[:8]
    words = re.sub(r"[^A-Za-z0-9_.]+", "-", str(parts[0]))[:60].strip("-.")
    return f"{kind}-{words}-{digest}"
