"""Hydra composes, this checks, runs and reports; a mistake is one message and no traceback."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
import yaml  # type: ignore[import-untyped]
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clbench import interruption, launching, userspace
from clbench.composing import GROUPS, explained, searched
from clbench.discretion import refuse_environment
from clbench.errors import Busy, Interrupted, Submitted, UserError, did_you_mean
from clbench.processes import launched

if TYPE_CHECKING:
    from rich.table import Table

    from clbench.cells import Cell
    from clbench.conditions import Names
    from clbench.engines.pool import Died, Engine, Pool
    from clbench.planning import Job
    from clbench.results import Result, RunFolder
    from clbench.tuning import Budget

#: Exit codes: a mistake to mend; a run that did not complete; Ctrl-C; to be started again later.
MISTAKE, INCOMPLETE, INTERRUPTED, LATER = 2, 1, 130, 75


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


def main() -> int:
    """Runs the command line; returns the exit code."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us whole
    commands = _Commands()

    def composed() -> int:
        own = userspace.join(Path.cwd())
        if own:
            _append_to_search_path(own)
        launching.register()
        _flags_first()
        path = str(userspace.configuration())
        hydra.main(version_base="1.3", config_path=path, config_name="config")(commands)()
        return max(commands.codes, default=0)

    try:
        with interruption.at_once():
            return _guarded(composed)
    except Interrupted as signal:
        print(
            f"{launched.speaker()}Interrupted ({signal}). The same command continues.",
            file=sys.stderr,
        )
        return LATER
    except KeyboardInterrupt:
        print("Interrupted. The same command continues from the last experience.", file=sys.stderr)
        return INTERRUPTED


def _guarded(action: Callable[[], int]) -> int:
    """Turns what a user can mend into one message and an exit code."""
    try:
        return action()
    except Submitted as words:
        print(words, file=sys.stderr)
        return LATER
    except Busy as error:
        print(f"error: {error}", file=sys.stderr)
        return LATER
    except UserError as error:
        message = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = explained(error, sys.argv[1:])
    except yaml.YAMLError as error:
        message = f"A configuration file is no YAML: {error}"
    except ValueError as error:  # Hydra's own for scenario=null
        if "Config group override" not in str(error):
            raise
        message = "A group (scenario, strategy, backbone) needs the name of one of its choices."
    print(f"{launched.speaker()}error: {message}", file=sys.stderr)
    return MISTAKE


def _flags_first() -> None:
    """Argparse refuses overrides on both sides of a flag, which people write all the same."""
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: "=" in word and word[0] != "-")


def _append_to_search_path(folder: Path) -> None:
    class UserConfiguration(SearchPathPlugin):
        """The conf folder of the user's working folder, after the suite's."""

        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append(provider="user", path=f"file://{folder}")

    Plugins.instance().register(UserConfiguration)


class _Commands(launching.Sweeps):
    """What Hydra calls: one command, or a sweep of them. Keeps their exit codes."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    def __call__(self, cfg: DictConfig) -> None:
        self.codes.append(_guarded(lambda: _single(cfg)))

    def sweep(
        self, loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]]
    ) -> Sequence[int]:
        from clbench.planning import Composer

        composer = Composer(loader, master)
        codes = _sweep([composer.job(overrides) for overrides in jobs])
        self.codes += codes
        return codes


def _single(cfg: DictConfig) -> int:
    """One command, here or where its engine says."""
    refuse_environment(OmegaConf.to_container(cfg, resolve=False))
    tree: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    command = _command(tree)
    from clbench.planning import Job  # it needs torch, which nobody waits for with a wrong option

    job, engine = Job(tree, _names()), _engine(tree)
    here = str(tree["engine"]["_target_"]).endswith(".Local")
    launched.refuse(command.phase, alone=here and command.workers == 1)
    if command.phase == "report":
        return _job(job, None)
    with _opened(command, engine, tree) as pool:
        if pool is None or command.phase != "run":
            return _job(job, pool)
        return _side_by_side([job], pool)[0]


def _sweep(jobs: Sequence[Job]) -> list[int]:
    """All jobs, but for runs that have ended; returns exit codes.

    What the engine is, the first job says. One job is one piece of work: in the phases that
    search, what follows depends on what was found. Where jobs are too few for the engine's room,
    they take turns, and the pieces are their trials and seeds.
    """
    from clbench.population.choice import choose

    first = jobs[0].tree
    command, engine = _command(first), _engine(first)
    launched.refuse(command.phase, alone=False)
    codes, left = _unfinished(jobs)
    if not left:
        return codes
    with _opened(command, engine, first) as pool:
        work = [jobs[number] for number in left]
        few = command.phase != "run" and pool is not None and len(work) < pool.room
        few = few or choose(first) > 0  # what trains together shares one terminal
        found = _in_turn(work, pool) if pool is None or few else _side_by_side(work, pool)
    for number, code in zip(left, found, strict=True):
        codes[number] = code
    return codes


@contextmanager
def _opened(command: Command, engine: Engine, tree: Mapping[str, Any]) -> Iterator[Pool | None]:
    """Where the command works: processes, or this one with runs that train together."""
    from clbench.population.choice import choose

    size = choose(tree)
    if not size:
        if tree["population"] == "auto" and command.phase != "run":
            word = "population=auto: each run trains by itself here; workers=N makes N at once."
            print(word, file=sys.stderr)
        with engine.open(command.workers, str(tree["device"])) as pool:
            yield pool
        return
    from clbench.population.pool import Population

    with Population(size) as population:
        yield population
        print(f"population={size}: {population.said()}", file=sys.stderr)


def _unfinished(jobs: Sequence[Job]) -> tuple[list[int], list[int]]:
    """Exit codes so far, and the numbers of the jobs that are to be done."""
    from clbench.planning import Ledger

    ledger = Ledger(_cell)
    codes, left = [0] * len(jobs), []
    for number, job in enumerate(jobs):
        if job.tree["phase"] != "run":
            left.append(number)
            continue
        try:
            result = ledger.ended(job)
        except UserError:  # the job itself says what is wrong, in its turn
            result = None
        if result is None:
            left.append(number)
        else:
            codes[number] = 0 if result.status == "complete" else INCOMPLETE
    ended = len(jobs) - len(left)
    if ended:
        words = f"{ended} of {len(jobs)} runs are there already; force=true repeats them."
        print(words, file=sys.stderr)
    return codes, left


def _in_turn(jobs: Sequence[Job], pool: Pool | None) -> list[int]:
    """One after another, in this process; what one of them raises is raised in the end."""
    codes, errors = [], []
    for job in jobs:
        try:
            codes.append(_guarded(partial(_job, job, pool)))
        except Exception as error:
            codes.append(INCOMPLETE)
            errors.append(error)
    if errors:
        raise errors[0]
    return codes


@dataclass(frozen=True)
class _Said:
    """What a command elsewhere would have left on the terminal."""

    code: int
    out: str
    err: str


def _side_by_side(jobs: Sequence[Job], pool: Pool) -> list[int]:
    """As pieces of work; those that something else was at are tried again in the end."""
    from clbench.engines.pool import Died, Raised

    codes, errors = [LATER] * len(jobs), []
    work = partial(_elsewhere, shutil.get_terminal_size().columns)
    for last in (False, True):
        left = [number for number, code in enumerate(codes) if code == LATER]
        for turn, found in pool.answers(work, [jobs[number] for number in left]):
            number = left[turn]
            if isinstance(found, Died):
                codes[number] = _lost(jobs[number], found)
            elif isinstance(found, Raised):
                codes[number] = INCOMPLETE
                errors.append(found.error)
            elif last or found.code != LATER:
                codes[number] = found.code
                print(found.out, end="", flush=True)
                print(found.err, end="", file=sys.stderr, flush=True)
    if errors:
        raise errors[0]
    return codes


def _elsewhere(columns: int, job: Job) -> _Said:
    """A command in a process that an engine has made: silent, with no processes of its own."""
    os.environ["COLUMNS"] = str(columns)
    here = {"_target_": "clbench.engines.local.Local"}
    job = replace(job, tree={**job.tree, "engine": here, "workers": 1, "progress": False})
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = _guarded(partial(_job, job, None))
    return _Said(code, out.getvalue(), err.getvalue())


def _lost(job: Job, death: Died) -> int:
    """Says, and writes down, that nothing came of a job."""
    from clbench import cells, display

    title = f"{display.title(job.names)} seed {job.tree['seed']}"
    print(f"error: {title}: {death}", file=sys.stderr)
    if job.tree["phase"] == "run":
        return _guarded(lambda: bool(cells.end(_cell(job), death)) and INCOMPLETE)
    return INCOMPLETE


def _job(job: Job, pool: Pool | None) -> int:
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
    command = _command(job.tree)
    if command.phase not in phases:
        raise UserError(f"No phase '{command.phase}'. {did_you_mean(command.phase, phases)}")
    return phases[command.phase](command, job, pool)


def _command(tree: Mapping[str, Any]) -> Command:
    """The command's own options, checked; refuses keys that config.yaml does not have."""
    from clbench import config

    known = {*OmegaConf.load(userspace.configuration() / "config.yaml"), *GROUPS}
    known -= {"defaults", "hydra"}
    for key in tree:
        if key not in known:
            raise UserError(f"No option '{key}'. {did_you_mean(key, known)}")
    mine = Command.__dataclass_fields__
    return config.fill(Command, {k: v for k, v in tree.items() if k in mine}, "")


def _engine(tree: Mapping[str, Any]) -> Engine:
    from clbench import config
    from clbench.engines.pool import Engine

    return config.build(tree["engine"], Engine, "engine")


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


def _run(command: Command, job: Job, pool: Pool | None) -> int:  # noqa: ARG001
    """One run, or the word that it is there already."""
    from clbench.cells import execute

    cell = _cell(job)
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


def _tune(command: Command, job: Job, pool: Pool | None) -> int:
    """Searches on the tuning split."""
    from clbench import display, tuning
    from clbench.study import Trial

    cell, budget = _cell(job), _budget(job.tree)
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

    cell, budget = _cell(job), _budget(job.tree)
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
        scenario, _ = _cell(job).parts()
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


def _cell(job: Job) -> Cell:
    """The run that a job asks for."""
    from clbench import config
    from clbench.cells import Cell
    from clbench.conditions import Conditions
    from clbench.limits import Limits
    from clbench.population.choice import choose

    command = _command(job.tree)
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


def _names() -> Names:
    from clbench.conditions import Names

    choices = HydraConfig.get().runtime.choices
    base = choices.get("strategy@strategy.base")
    return Names(choices["scenario"], choices["strategy"], base)


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
