"""Results that others published, beside ours: only where they state the same scenario."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from clbench import config
from clbench.errors import UserError
from clbench.leaderboard import SCORES, Board, label
from clbench.results import flat

#: The option does not matter for the value.
ANY = "any"
#: Keys of a file that each of its values has, unless it says otherwise.
_SHARED = ("source", "evidence", "note", "metric", "options", "data")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A value from the literature, with what it was measured on.

    Attributes:
        scenario: Name of ours.
        strategy: Name of ours.
        base: Of what a wrapper wraps.
        metric: A score of `clbench.leaderboard.SCORES`.
        value: In [0, 1].
        source: Who, where, which table.
        evidence: "log" of the authors' code or its README, "paper", or "quoted" by others.
        options: Of the scenario, every one of them; "any" where it does not matter.
        data: What identifies the data, as far as the source states it.
        note: What no option says.
    """

    scenario: str
    strategy: str
    base: str | None = None
    metric: str = "average_accuracy"
    value: float
    source: str
    evidence: Literal["log", "paper", "quoted"]
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if self.metric not in SCORES or not 0 <= self.value <= 1:
            raise UserError(
                f"{self.metric}={self.value} of {self.strategy}: a published value is one of "
                f"{', '.join(SCORES)}, as a fraction in [0, 1]."
            )


def load(folders: Iterable[Path]) -> list[Published]:
    """All values of the YAML files in some folders.

    Raises:
        UserError: If a file does not have the form that `docs/reference.md` tells.
    """
    files = sorted(file for folder in folders for file in folder.glob("*.yaml"))
    return [value for file in files for value in _values(file)]


def compare(board: Board, published: Sequence[Published]) -> Board:
    """Puts published values beside the rows that they belong to.

    Args:
        board: Of the evaluation split.
        published: Of any scenario.

    Returns:
        The board with columns `published`, `published_metric`, `difference` (ours minus theirs)
        and `published_source`, null without one. Values that were measured on something else are
        not applied; `notes` says which, and what differs.
    """
    columns = ("published", "published_metric", "difference", "published_source")
    rows: list[dict[str, Any]] = [dict.fromkeys(columns) for _ in range(len(board.table))]
    names = [label({"strategy": r["name"], "base": r["base"]}) for r in _records(board)]
    refused: dict[tuple[str, str], dict[str, bool]] = {}
    for value in published:
        if value.scenario != board.scenario:
            continue
        name = label({"strategy": value.strategy, "base": value.base})
        reasons = "; ".join(differences(value, board.options))
        for place in (i for i, other in enumerate(names) if other == name):
            if reasons:
                refused.setdefault((value.source, reasons), {})[name] = True
            elif rows[place]["published"] is None or value.metric == board.headline:
                score = board.table[value.metric][place]
                found = (value.value, value.metric, score - value.value, _source(value))
                rows[place] = dict(zip(columns, found, strict=True))
    added = pd.DataFrame(rows, index=board.table.index, columns=list(columns))
    applied = {name for name, row in zip(names, rows, strict=True) if row["published"] is not None}
    notes = [
        f"Published values of {', '.join(left)} ({source}) are not compared: {reasons}."
        for (source, reasons), mine in refused.items()
        if (left := [name for name in mine if name not in applied])
    ]
    return replace(board, table=board.table.join(added), notes=(*board.notes, *notes))


def differences(value: Published, options: Mapping[str, Any]) -> list[str]:
    """What a value was measured on that differs from a board's options, in words.

    An option that the value does not mention differs: nobody has said that it is the same.
    """
    stated = flat({"scenario": value.options, "data": value.data})
    reasons = []
    for key in dict.fromkeys([*options, *stated]):
        name = key.removeprefix("scenario.")
        here, there = options.get(key), stated.get(key)
        if there == ANY or here == there or not key.startswith(("scenario.", "data.")):
            continue
        if key in stated:
            reasons.append(f"{name} is {here}, there {there}")
        elif key.startswith("scenario."):
            reasons.append(f"{name} is {here}, there not stated")
    if options.get("split") != "evaluate":
        reasons.append(f"split is {options.get('split')}")
    return reasons


def _values(file: Path) -> list[Published]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise UserError(f"{file} can't be read: {error}. Mend it or remove it.") from error
    if not isinstance(content, dict) or not isinstance(content.get("values"), list):
        raise UserError(f"{file} has no list 'values': see docs/reference.md.")
    unknown = set(content) - {"scenario", "values", *_SHARED}
    if unknown:
        raise UserError(f"{file}: {', '.join(map(str, unknown))} means nothing there.")
    shared = {k: content[k] for k in ("scenario", *_SHARED) if k in content}
    found = []
    for number, own in enumerate(content["values"]):
        if not isinstance(own, dict):
            raise UserError(f"{file}: values[{number}] is no group of keys.")
        merged = {str(k): v for k, v in {**shared, **own}.items()}
        for key in ("options", "data"):
            merged[key] = _merged(shared.get(key) or {}, own.get(key) or {})
        found.append(config.fill(Published, merged, f"{file}: values[{number}]"))
    return found


def _merged(shared: Any, own: Any) -> Any:
    """Nested groups, the own one's keys counting."""
    if not (isinstance(shared, Mapping) and isinstance(own, Mapping)):
        return own
    both = {key: _merged(shared[key], own[key]) for key in shared if key in own}
    return {**shared, **own, **both}


def _records(board: Board) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = board.table.to_dict("records")
    return records


def _source(value: Published) -> str:
    note = f"; {value.note}" if value.note else ""
    return f"{value.source} ({value.evidence}){note}"
