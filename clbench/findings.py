"""Everything that a report says, before it is Markdown, a page or a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from clbench import published
from clbench.agreement import Agreement, agreements
from clbench.errors import UserError
from clbench.leaderboard import Board, build
from clbench.results import Result, find, readable, table
from clbench.study import Study


@dataclass(frozen=True)
class Findings:
    """What was found below a results folder. Paths are relative to it.

    Attributes:
        boards: Ranked, published values beside them.
        agreements: Of the two protocols, where a scenario has both.
        left_out: Files and folders that are in no board: path, kind, reason.
        trials: Runs of searches, which are in no board either.
        studies: Searches by name.
        results: Those of the boards by path.
    """

    boards: Sequence[Board]
    agreements: Sequence[Agreement]
    left_out: pd.DataFrame
    trials: int
    studies: Mapping[str, Study]
    results: Mapping[str, Result]


def gather(root: Path, references: Iterable[Path] = ()) -> Findings:
    """Reads and ranks.

    Args:
        root: A results folder.
        references: Folders with published values.

    Raises:
        UserError: If there are no runs, or a reference file is wrong.
    """
    found = find(root)
    if not found:
        raise UserError(f"No runs below {root}. Run something first.")
    runs = table(found)
    paths = [readable(each.path.relative_to(root).as_posix()) for each in found]
    runs["path"] = paths
    studies, unreadable = _studies(root)
    costs = {s.name: {**s.costs(), "tuning_trials": len(s.trials)} for s in studies.values()}
    leaderboard = build(runs, costs)
    values = published.load(references)
    boards = [published.compare(board, values) for board in leaderboard.boards]
    boards = [replace(board, notes=(*board.notes, *_shared(board, studies))) for board in boards]
    shown = {path for board in boards for path in board.runs["path"]}
    results = {p: f.result for p, f in zip(paths, found, strict=True) if f.result and p in shown}
    left_out = pd.concat([leaderboard.left_out, unreadable], ignore_index=True)
    return Findings(boards, agreements(boards), left_out, leaderboard.trials, studies, results)


def _studies(root: Path) -> tuple[dict[str, Study], pd.DataFrame]:
    """The tuning records below a folder, and those that are none."""
    studies: dict[str, Study] = {}
    unreadable = []
    for path in sorted(root.rglob("tuned/*.json")):
        where = path.relative_to(root).as_posix()
        try:
            study = Study.from_json(path.read_text())
            study.costs()
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            unreadable.append((where, "unreadable", str(error)))
            continue
        if study.name in studies and studies[study.name] != study:
            unreadable.append((where, "duplicate", f"another search is named {study.name}"))
        studies.setdefault(study.name, study)
    return studies, pd.DataFrame(unreadable, columns=["path", "kind", "reason"])


def _shared(board: Board, studies: Mapping[str, Study]) -> list[str]:
    """What the searches behind a board make a reader doubt."""
    names = dict.fromkeys(n for n in board.table["study"] if isinstance(n, str))
    lost = [name for name in names if name not in studies]
    leaky = [n for n in names if n in studies and studies[n].shared_samples]
    notes = [f"The record of the search {name} is missing, thus its cost." for name in lost]
    return notes + [
        f"{studies[n].shared_samples:,} samples are in both splits of the search {n}."
        for n in leaky
    ]
