"""The jobs of a sweep: composed in no time, and those that have ended found before they begin."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from clbench.cells import Cell
from clbench.composing import own_part
from clbench.conditions import Names
from clbench.errors import UserError
from clbench.results import Result, RunFolder, with_seed

_VALUE = re.compile(r"(?!hydra\.)[A-Za-z_]\w*(?:\.\w+)*=")


@dataclass(frozen=True)
class Job:
    """One command of a sweep.

    Attributes:
        tree: Its configuration, as plain data.
        names: Of scenario and strategy.
    """

    tree: Mapping[str, Any]
    names: Names


class Composer:
    """Composes jobs. Hydra does it for each choice of parts; values are put in their place.

    A composition takes Hydra a tenth of a second, and jobs differ in their seed most of all.

    Args:
        loader: Hydra's.
        master: The configuration without what the jobs differ in.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader, self._master = loader, master
        self._parser = OverridesParser.create(loader)
        self._values: dict[str, tuple[list[str], Any]] = {}
        self._bases: dict[tuple[str, ...], _Base] = {}
        tree: Any = OmegaConf.to_container(own_part(master), resolve=False)
        self._options = {key for key, value in tree.items() if not isinstance(value, Mapping)}

    def job(self, overrides: Sequence[str]) -> Job:
        """The job with these overrides.

        Raises:
            HydraException, OmegaConfBaseException: As Hydra's; see `clbench.composing`.
            UserError: If it reads the environment.
        """
        values = [text for text in overrides if self._is_value(text)]
        parts = tuple(text for text in overrides if text not in values)
        if not any(part.startswith(("+", "~")) for part in parts):  # their order matters
            base = self._base(parts)
            tree: dict[str, Any] | None = base.tree
            for text in values:
                tree = base.having(tree, *self._value(text)) if tree else None
            if tree:
                return Job(tree, base.names)
        whole = self._base(tuple(overrides))
        return Job(whole.tree, whole.names)

    def _is_value(self, text: str) -> bool:
        key = text.partition("=")[0]
        return bool(_VALUE.match(text)) and ("." in key or key in self._options)

    def _value(self, text: str) -> tuple[list[str], Any]:
        if text not in self._values:
            override = self._parser.parse_override(text)
            self._values[text] = override.key_or_group.split("."), override.value()
        return self._values[text]

    def _base(self, overrides: tuple[str, ...]) -> _Base:
        if overrides not in self._bases:
            composed = self._loader.load_sweep_config(self._master, [*overrides])
            ours, choices = own_part(composed), composed.hydra.runtime.choices
            base = choices.get("strategy@strategy.base")
            self._bases[overrides] = _Base(
                OmegaConf.to_container(ours, resolve=True),  # type: ignore[arg-type]
                json.dumps(OmegaConf.to_container(ours, resolve=False)),
                Names(choices["scenario"], choices["strategy"], base),
            )
        return self._bases[overrides]


@dataclass(frozen=True)
class _Base:
    """A composed choice of parts.

    Attributes:
        tree: Plain data.
        unresolved: The text of it before interpolations were resolved.
        names: Of the parts.
    """

    tree: dict[str, Any]
    unresolved: str
    names: Names

    @cached_property
    def _mentioned(self) -> frozenset[str]:
        """Every word of an interpolation: what they name is somewhere else too."""
        found = re.findall(r"\$\{[^}]*", self.unresolved)
        return frozenset(word for text in found for word in re.findall(r"\w+", text))

    def having(self, tree: dict[str, Any], keys: list[str], value: Any) -> dict[str, Any] | None:
        """The tree with one value changed; None where only Hydra knows what that means."""
        simple = value is None or isinstance(value, (bool, int, float, str))
        if not simple or "$" in str(value) or value == "???" or self._mentioned & {*keys}:
            return None
        return _put(tree, keys, value)


def _put(tree: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any] | None:
    head, *rest = keys
    if head not in tree:
        return None
    here = tree[head]
    if rest:
        value = _put(here, rest, value) if isinstance(here, Mapping) else None
        return None if value is None else {**tree, head: value}
    return None if isinstance(here, (Mapping, list)) else {**tree, head: value}


class Ledger:
    """Tells runs that have ended from those that are to be made.

    Args:
        planned: The cell of a job.
    """

    def __init__(self, planned: Callable[[Job], Cell]) -> None:
        self._planned = planned
        self._cells: dict[str, tuple[Cell, str]] = {}

    def ended(self, job: Job) -> Result | None:
        """What came of its run, if the same command would leave it as it is.

        Raises:
            UserError: If the job can't be.
        """
        seed = job.tree["seed"]
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f"seed={seed!r} must be a whole number, 0 or more.")
        decides = {**job.tree, "seed": 0}
        key = json.dumps([decides, job.names.scenario, job.names.strategy, job.names.base])
        if key not in self._cells:
            cell = self._planned(replace(job, tree=decides))
            self._cells[key] = cell, cell.identity()["run_id"]
        cell, first = self._cells[key]
        folder = RunFolder(Path(cell.results_dir), with_seed(first, seed))
        found = folder.result()
        return found if cell.accepts(found) else None
