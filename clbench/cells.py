"""One planned run: from its part of a configuration to its folder, wherever it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clbench import compiling, config, features, machine, protocol, trackers
from clbench.conditions import Conditions, Names, identify
from clbench.engines.pool import Died
from clbench.errors import UserError
from clbench.limits import Limits
from clbench.population.companion import present
from clbench.population.pool import Population
from clbench.progress import Progress, Silent
from clbench.results import Result, RunFolder
from clbench.types import Scenario, Strategy


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run that is planned: plain data, so that another process can take it.

    Attributes:
        composed: The configuration, with nodes `scenario` and `strategy`.
        conditions: Of the run.
        names: Of scenario and strategy.
        tuned: Where the hyper-parameters come from; None: nobody tuned them.
        results_dir: Where run folders go.
        force: Repeat a run that is there.
        tracker: What else shows the run; see `clbench.trackers`.
        limits: What the run may take.
    """

    composed: Mapping[str, Any]
    conditions: Conditions
    names: Names
    tuned: Mapping[str, Any] | None
    results_dir: Path
    force: bool = False
    tracker: trackers.Name = "none"
    limits: Limits = field(default_factory=Limits)

    def build(self) -> tuple[Scenario, Strategy]:
        """Both parts, checked alone and together, before anything is loaded or written.

        Raises:
            UserError: If they can't be, or can't work together.
        """
        self._here()
        return self.parts()

    def parts(self) -> tuple[Scenario, Strategy]:
        """Both parts, whatever devices this machine has."""
        scenario = config.build(self.composed["scenario"], Scenario, "scenario")
        strategy = config.build(self.composed["strategy"], Strategy, "strategy")
        self._fit(scenario, strategy)
        return scenario, strategy

    def identity(self) -> dict[str, Any]:
        """The "run" part of its result."""
        scenario, strategy = self.parts()
        return identify(scenario, strategy, self.conditions, self.names, self.tuned)

    def accepts(self, earlier: Result | None) -> bool:
        """Whether a result that is there is what this asks for."""
        if earlier is None or self.force or earlier.status == "failed":
            return False
        return not _has_more_time(earlier, self.limits)

    def check(self, scenario: Scenario, strategy: Strategy) -> None:
        """Refuses parts that can't work together, or can't work here."""
        self._here()
        self._fit(scenario, strategy)

    def _here(self) -> None:
        device = machine.choose_device(self.conditions.device)
        if self.conditions.compile:
            compiling.check_machine(device)

    def _fit(self, scenario: Scenario, strategy: Strategy) -> None:
        strategy.check(scenario)
        scenario.check(self.conditions.split)
        if self.conditions.cache_features:
            features.check(scenario, strategy)
        if self.conditions.compile:
            compiling.check(scenario, self.conditions)
        if self.conditions.population:
            Population.check(strategy)


def cache_dir(composed: Mapping[str, Any]) -> Path | None:
    """Where a configuration keeps what was made; None: in the user's cache folder."""
    folder = composed.get("cache_dir")
    return None if folder is None else Path(folder)


@dataclass(frozen=True)
class Ended:
    """A run that has ended.

    Attributes:
        result: Whatever its status.
        folder: Where it lies.
        earlier: It was there already.
    """

    result: Result
    folder: RunFolder
    earlier: bool


def execute(
    cell: Cell, progress: Callable[[], AbstractContextManager[Progress]] | None = None
) -> Ended:
    """Runs a cell, or finds that it was run before; continues one that was interrupted.

    Args:
        cell: The plan.
        progress: Makes what is told how far the run is.

    Raises:
        UserError: If the cell can't work, another process has it, or the disk refuses.
    """
    scenario, strategy = cell.build()
    return perform(scenario, strategy, cell, progress)


def perform(
    scenario: Scenario,
    strategy: Strategy,
    cell: Cell,
    progress: Callable[[], AbstractContextManager[Progress]] | None = None,
) -> Ended:
    """`execute` for a cell whose parts are built."""
    identity = identify(scenario, strategy, cell.conditions, cell.names, cell.tuned)
    folder = RunFolder(cell.results_dir, identity["run_id"])
    companion = present()
    tracker = trackers.guarded(cell.tracker if companion.leads else "none", folder)
    with ExitStack() as claim:

        def earlier() -> Result | None:
            """A result that will do; else the folder is made ready for another."""
            claim.enter_context(folder.claim())
            found = folder.result()
            if found and cell.accepts(found):
                return found
            if cell.force or (found and not _has_more_time(found, cell.limits)):
                folder.clear()
            folder.write_config(OmegaConf.to_yaml(OmegaConf.create(dict(cell.composed))))
            return None

        there = companion.told(earlier)
        if there:
            return Ended(there, folder, earlier=True)
        try:
            with progress() if progress else nullcontext(Silent()) as told:
                result = protocol.run(
                    scenario,
                    strategy,
                    cell.conditions,
                    names=cell.names,
                    tuned=cell.tuned,
                    folder=folder if companion.leads else None,
                    progress=told,
                    tracker=tracker,
                    limits=cell.limits,
                    cache_dir=cache_dir(cell.composed),
                )
        except UserError:
            if companion.leads:
                folder.forget_if_unused()
            raise
    return Ended(result, folder, earlier=False)


def end(cell: Cell, why: Exception | Died) -> Ended:
    """Writes down how a cell ended whose process could not, or would not, say so itself.

    Args:
        cell: The plan.
        why: What it raised, or how its process died.
    """
    identity = cell.identity()
    folder = RunFolder(cell.results_dir, identity["run_id"])
    memory = why.out_of_memory if isinstance(why, Died) else False
    text = str(why) if isinstance(why, Died) else f"{type(why).__name__}: {why}"
    status = "out of memory" if memory else "failed"
    with folder.claim():
        found = folder.result()
        if found is None:
            found = Result(run=identity, status=status, reason=text)
            folder.write_result(found)
    return Ended(found, folder, earlier=False)


def _has_more_time(earlier: Result, limits: Limits) -> bool:
    """Whether a run that timed out may go on from where it was."""
    if earlier.status != "timed out":
        return False
    return not limits.timeout or limits.timeout > float(earlier.costs.get("timeout") or 0)
