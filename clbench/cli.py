"""Hydra composes, this checks, runs and reports; a mistake is one message and no traceback."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import hydra
import yaml  # type: ignore[import-untyped]
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clbench import interruption, userspace
from clbench.composing import GROUPS, explained
from clbench.discretion import refuse_environment
from clbench.errors import Busy, Interrupted, UserError, did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

    from clbench.cells import Cell
    from clbench.conditions import Names
    from clbench.engines.pool import Pool
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
    codes: list[int] = []

    def job(cfg: DictConfig) -> None:
        codes.append(_guarded(lambda: _job(cfg)))

    def composed() -> int:
        own = userspace.join(Path.cwd())
        if own:
            _append_to_search_path(own)
        path = str(userspace.configuration())
        with _sweep_folder():
            hydra.main(version_base="1.3", config_path=path, config_name="config")(job)()
        return max(codes, default=0)

    try:
        with interruption.at_once():
            return _guarded(composed)
    except Interrupted as signal:
        print(f"Interrupted ({signal}). The same command continues.", file=sys.stderr)
        return LATER
    except KeyboardInterrupt:
        print("Interrupted. The same command continues from the last experience.", file=sys.stderr)
        return INTERRUPTED


def _guarded(action: Callable[[], int]) -> int:
    """Turns what a user can mend into one message and an exit code."""
    try:
        return action()
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
    print(f"error: {message}", file=sys.stderr)
    return MISTAKE


@contextmanager
def _sweep_folder() -> Iterator[None]:
    """Where Hydra may leave its multirun.yaml; run folders hold all of it and more."""
    if not {"-m", "--multirun"} & set(sys.argv[1:]):
        yield
        return
    overrides = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    flags = [a for a in sys.argv[1:] if a not in overrides]
    with tempfile.TemporaryDirectory(prefix="clbench-sweep-") as folder:
        # argparse refuses overrides on both sides of a flag, which people write all the same.
        sys.argv[1:] = [*flags, f"hydra.sweep.dir={folder}", *overrides]
        yield


def _append_to_search_path(folder: Path) -> None:
    class UserConfiguration(SearchPathPlugin):
        """The conf folder of the user's working folder, after the suite's."""

        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append(provider="user", path=f"file://{folder}")

    Plugins.instance().register(UserConfiguration)


def _job(cfg: DictConfig) -> int:
    phases = {
        "run": _run,
        "tune": _only(_tune),
        "evaluate": _only(_evaluate),
        "benchmark": _benchmark,
        "report": _report,
    }
    refuse_environment(OmegaConf.to_container(cfg, resolve=False))
    tree: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    command = _command(tree)
    if command.phase not in phases:
        raise UserError(f"No phase '{command.phase}'. {did_you_mean(command.phase, phases)}")
    return phases[command.phase](command, tree)


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


def _report(command: Command, tree: Mapping[str, Any]) -> int:  # noqa: ARG001
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


def _run(command: Command, tree: Mapping[str, Any]) -> int:
    """One run, or the word that it is there already."""
    from clbench.cells import execute

    cell = _cell(command, tree)
    title = cell.names, cell.conditions.seed
    ended = execute(cell, lambda: _progress(*title, command.progress))
    if ended.earlier:
        print("This run is there already; force=true repeats it.", file=sys.stderr)
    return _show(ended.result, ended.folder)


def _only(phase: Callable[..., int]) -> Callable[[Command, Mapping[str, Any]], int]:
    """One phase of the strategy that was asked for, with processes of its own."""

    def run(command: Command, tree: Mapping[str, Any]) -> int:
        from clbench.engines.local import Local

        with Local().open(command.workers, str(tree["device"])) as pool:
            return phase(command, tree, None, pool)

    return run


def _tune(command: Command, tree: Mapping[str, Any], names: Names | None, pool: Pool | None) -> int:
    """Searches on the tuning split."""
    from clbench import display, tuning
    from clbench.study import Trial

    cell, budget = _cell(command, tree, names), _budget(tree)
    title = display.title(cell.names)

    def tell(number: int, trial: Trial) -> None:
        if command.progress:
            text = display.trial(trial)
            print(f"{title} · trial {number}/{budget.trials}: {text}", file=sys.stderr)

    study, place = tuning.tune(cell, budget, command.protocol, pool, tell)
    _print(display.study(study))
    print(place)
    return 0 if study.chosen is not None else INCOMPLETE


def _evaluate(
    command: Command, tree: Mapping[str, Any], names: Names | None, pool: Pool | None
) -> int:
    """Runs the chosen values on the evaluation split."""
    from clbench import display, tuning
    from clbench.cells import Ended

    cell, budget = _cell(command, tree, names), _budget(tree)
    title = display.title(cell.names)

    def done(ended: Ended) -> None:
        if command.progress:
            text = f"{title} · seed {ended.result.run['seed']}: {display.ending(ended.result)}"
            print(text + (" (was there)" if ended.earlier else ""), file=sys.stderr)

    ended = tuning.evaluate(cell, budget, command.protocol, command.untuned, pool, done)
    _print(display.evaluation([e.result for e in ended]))
    return 0 if all(e.result.status == "complete" for e in ended) else INCOMPLETE


def _benchmark(command: Command, tree: Mapping[str, Any]) -> int:
    """Tunes, then evaluates; with its references first, if they are asked for."""
    from clbench.engines.local import Local

    codes = []
    with Local().open(command.workers, str(tree["device"])) as pool:
        for names, node in _benchmarked(command, tree):
            mine = {**tree, "strategy": node}
            codes.append(_tune(command, mine, names, pool))
            if not codes[-1]:
                codes.append(_evaluate(command, mine, names, pool))
    return max(codes)


def _benchmarked(
    command: Command, tree: Mapping[str, Any]
) -> Iterator[tuple[Names | None, Mapping[str, Any]]]:
    """Names and strategy nodes: the references', then the one that was asked for."""
    from clbench.classification import ImageScenario
    from clbench.conditions import Names
    from clbench.types import CLASSIFICATION

    if command.references:
        scenario, _ = _cell(command, tree).build()
        wanted = list(command.reference_strategies[scenario.setting.value])
        if scenario.setting in CLASSIFICATION and isinstance(scenario, ImageScenario):
            wanted += command.reference_strategies["pretrained"] * scenario.backbone.starts_trained
        mine = _names()
        for name in wanted:
            if name != mine.strategy:
                yield Names(mine.scenario, name), _configured("strategy", name)
    yield None, tree["strategy"]


def _configured(group: str, name: str) -> dict[str, Any]:
    """A choice of a group as it stands in its YAML."""
    from hydra import compose

    found = OmegaConf.to_container(compose("config", [f"{group}={name}"]), resolve=True)
    node: dict[str, Any] = found[group]  # type: ignore[index,call-overload,assignment]
    return node


def _budget(tree: Mapping[str, Any]) -> Budget:
    from clbench import config
    from clbench.tuning import Budget

    return config.fill(Budget, tree["budget"], "budget")


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _cell(command: Command, tree: Mapping[str, Any], names: Names | None = None) -> Cell:
    """What the command line asks to run."""
    from clbench import config
    from clbench.cells import Cell
    from clbench.conditions import Conditions
    from clbench.limits import Limits

    keys, limits = Conditions.__dataclass_fields__, Limits.__dataclass_fields__
    return Cell(
        composed=tree,
        conditions=config.fill(Conditions, {k: tree[k] for k in keys if k in tree}, ""),
        limits=config.fill(Limits, {k: tree[k] for k in limits if k in tree}, ""),
        names=names or _names(),
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
