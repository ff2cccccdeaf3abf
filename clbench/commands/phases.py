"""What one command does: its phase, in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from clbench import userspace
from clbench.commands.exits import INCOMPLETE
from clbench.composing import GROUPS, searched
from clbench.errors import UserError, did_you_mean
from clbench.processes import launched

if TYPE_CHECKING:
    from rich.table import Table

    from clbench.cells import Cell
    from clbench.conditions import Names
    from clbench.engines.pool import Engine, Pool
    from clbench.planning import Job
    from clbench.results import Result, RunFolder
    from clbench.tuning import Budget


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a command does and where: the options that decide no number."""

    phase: str
    data_dir: str
    cache_dir: str | None
    results_dir: str
    force: bool
    progress: bool
    protocol: Literal["two_phase", "conventional"]
    untuned: bool
    references: bool
    workers: int
    strict: bool
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"]
    reference_strategies: dict[str, list[str]]


def perform(job: Job, pool: Pool | None) -> int:
    """One command in this process.

    Args:
        job: What was asked for.
        pool: Does trials and seeds side by side.
    """
    phases = {
        "run": _run,
        "tune": _tune,
        "evaluate": _evaluate,
        "benchmark": _benchmark,
        "report": _report,
    }
    command = command_of(job.tree)
    if command.phase not in phases:
        raise UserError(f"No phase '{command.phase}'. {did_you_mean(command.phase, phases)}")
    return phases[command.phase](command, job, pool)


def command_of(tree: Mapping[str, Any]) -> Command:
    """The command's own options, checked; refuses keys that config.yaml does not have."""
    from clbench import config

    known = {*OmegaConf.load(userspace.configuration() / "config.yaml"), *GROUPS}
    known -= {"defaults", "hydra"}
    for key in tree:
        if key not in known:
            raise UserError(f"No option '{key}'. {did_you_mean(key, known)}")
    mine = Command.__dataclass_fields__
    return config.fill(Command, {k: v for k, v in tree.items() if k in mine}, "")


def engine_of(tree: Mapping[str, Any]) -> Engine:
    from clbench import config
    from clbench.engines.pool import Engine

    return config.build(tree["engine"], Engine, "engine")


def cell_of(job: Job) -> Cell:
    """The run that a job asks for."""
    from clbench import config
    from clbench.cells import Cell
    from clbench.conditions import Conditions
    from clbench.limits import Limits
    from clbench.population.choice import choose

    command = command_of(job.tree)
    tree = {**job.tree, "population": choose(job.tree)}
    keys, limits = Conditions.__dataclass_fields__, Limits.__dataclass_fields__
    return Cell(
        composed=tree,
        conditions=config.fill(Conditions, {k: tree[k] for k in keys if k in tree}, ""),
        limits=config.fill(Limits, {k: tree[k] for k in limits if k in tree}, ""),
        names=job.names,
        tuned=None,
        results_dir=Path(command.results_dir),
        force=command.force,
        tracker=command.tracker,
    )


def _run(command: Command, job: Job, pool: Pool | None) -> int:  # noqa: ARG001
    """One run, or the word that it is there already."""
    from clbench.cells import execute

    cell = cell_of(job)
    title = cell.names, cell.conditions.seed
    shown = command.progress and not launched.number()
    with _peers(cell):
        ended = execute(cell, lambda: _progress(*title, shown))
    if launched.number():
        return 0 if ended.result.status == "complete" else INCOMPLETE
    if ended.earlier:
        print("This run is there already; force=true repeats it.", file=sys.stderr)
    return _show(ended.result, ended.folder)


def _peers(cell: Cell) -> AbstractContextManager[Any]:
    """The other processes of the run, where a launcher has started several."""
    if launched.count() == 1:
        return nullcontext()
    from clbench import machine
    from clbench.processes.group import Group
    from clbench.processes.peers import together

    return together(Group.gathering(machine.choose_device(cell.conditions.device)))


def _progress(names: Names, seed: int, shown: bool) -> Any:
    from clbench.progress import Bar, Silent

    label = "+".join(filter(None, (names.strategy, names.base)))
    return Bar(f"{names.scenario} {label} seed {seed}") if shown else nullcontext(Silent())


def _show(result: Result, folder: RunFolder) -> int:
    from rich.console import Console

    from clbench.display import tables

    console = Console()
    for table in tables(result):
        console.print(table)
    print(f"{folder.path}")
    if result.status == "complete":
        return 0
    print(f"error: the run {result.status}: {result.reason}", file=sys.stderr)
    return INCOMPLETE


def _tune(command: Command, job: Job, pool: Pool | None) -> int:
    """Searches on the tuning split."""
    from clbench import display, tuning
    from clbench.study import Trial

    cell, budget = cell_of(job), _budget(job.tree)
    title = display.title(cell.names)

    def tell(number: int, trial: Trial) -> None:
        if command.progress:
            text = display.trial(trial)
            print(f"{title} · trial {number}/{budget.trials}: {text}", file=sys.stderr)

    study, place = tuning.tune(cell, budget, command.protocol, pool, tell)
    _print(display.study(study))
    print(place)
    return 0 if study.chosen is not None else INCOMPLETE


def _evaluate(command: Command, job: Job, pool: Pool | None) -> int:
    """Runs the chosen values on the evaluation split."""
    from clbench import display, tuning
    from clbench.cells import Ended

    cell, budget = cell_of(job), _budget(job.tree)
    title = display.title(cell.names)

    def done(ended: Ended) -> None:
        if command.progress:
            text = f"{title} · seed {ended.result.run['seed']}: {display.ending(ended.result)}"
            print(text + (" (was there)" if ended.earlier else ""), file=sys.stderr)

    ended = tuning.evaluate(cell, budget, command.protocol, command.untuned, pool, done)
    _print(display.evaluation([e.result for e in ended]))
    return 0 if all(e.result.status == "complete" for e in ended) else INCOMPLETE


def _benchmark(command: Command, job: Job, pool: Pool | None) -> int:
    """Tunes, then evaluates; with its references first, if they are asked for."""
    codes = []
    for each in _benchmarked(command, job):
        codes.append(_tune(command, each, pool))
        if not codes[-1]:
            codes.append(_evaluate(command, each, pool))
    return max(codes)


def _benchmarked(command: Command, job: Job) -> Iterator[Job]:
    """The references' jobs, then the one that was asked for."""
    from clbench.classification import ImageScenario
    from clbench.types import CLASSIFICATION

    if command.references:
        scenario, _ = cell_of(job).parts()
        wanted = list(command.reference_strategies[scenario.setting.value])
        if scenario.setting in CLASSIFICATION and isinstance(scenario, ImageScenario):
            wanted += command.reference_strategies["pretrained"] * scenario.backbone.starts_trained
        for name in wanted:
            if name != job.names.strategy:
                tree = {**job.tree, "strategy": _configured("strategy", name)}
                yield replace(job, tree=tree, names=replace(job.names, strategy=name, base=None))
    yield job


def _configured(group: str, name: str) -> Any:
    """A choice of a group as it stands in its YAML."""
    from clbench.composing import composed

    tree, _ = composed([*searched(userspace.join(Path.cwd())), f"{group}={name}"])
    return tree[group]


def _budget(tree: Mapping[str, Any]) -> Budget:
    from clbench import config
    from clbench.tuning import Budget

    return config.fill(Budget, tree["budget"], "budget")


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _report(command: Command, job: Job, pool: Pool | None) -> int:  # noqa: ARG001
    from clbench.report import write

    results = Path(command.results_dir)
    for path in write(results):
        print(path)
    if not command.strict:
        return 0
    from clbench.results import find

    bad = [found for found in find(results) if found.row["status"] == "unreadable"]
    for found in bad:
        print(f"error: {found.path} can't be read: {found.row['reason']}", file=sys.stderr)
    return INCOMPLETE if bad else 0
