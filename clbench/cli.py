"""Hydra composes, this checks, runs and reports; a mistake is one message and no traceback."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clbench import userspace
from clbench.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from clbench.cells import Cell
    from clbench.protocol import Names
    from clbench.results import Result, RunFolder

#: Exit codes: a mistake to mend; a run that did not complete.
MISTAKE, INCOMPLETE, INTERRUPTED = 2, 1, 130
#: Parts of a run that are chosen by name, each a folder of conf/.
GROUPS = ("scenario", "strategy", "backbone")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a command does and where: the options that decide no number."""

    phase: str
    data_dir: str
    cache_dir: str | None
    results_dir: str
    force: bool
    progress: bool


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
        return _guarded(composed)
    except KeyboardInterrupt:
        print("Interrupted. The same command continues from the last experience.", file=sys.stderr)
        return INTERRUPTED


def _guarded(action: Callable[[], int]) -> int:
    """Turns what a user can mend into one message and an exit code."""
    try:
        return action()
    except UserError as error:
        message = str(error)
    except MissingConfigException as error:
        message = _unknown_choice(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = _composition(error)
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
    overrides = [i for i, a in enumerate(sys.argv) if i and "=" in a and not a.startswith("-")]
    with tempfile.TemporaryDirectory(prefix="clbench-sweep-") as folder:
        # Beside the other overrides: argparse refuses overrides on both sides of a flag.
        sys.argv.insert(min(overrides, default=len(sys.argv)), f"hydra.sweep.dir={folder}")
        yield


def _append_to_search_path(folder: Path) -> None:
    class UserConfiguration(SearchPathPlugin):
        """The conf folder of the user's working folder, after the suite's."""

        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append(provider="user", path=f"file://{folder}")

    Plugins.instance().register(UserConfiguration)


def _unknown_choice(error: MissingConfigException) -> str:
    """ "strategy/ewcc" to "No strategy 'ewcc'. Did you mean 'ewc'? ..."."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return str(error).splitlines()[0]
    return f"No {group} '{name}'. {did_you_mean(name, error.options or ())}"


def _composition(error: Exception) -> str:
    """Hydra's message; for a key that does not exist, ours with the nearest one."""
    text = str(error)
    unknown = re.search(r"Could not (?:override|append).*?'([^'=]+)", text)
    if unknown and "@" in unknown[1]:
        return f"There is nothing to choose at '{unknown[1]}': the chosen strategy wraps no other."
    if unknown:
        known = _known()
        key = unknown[1].lstrip("+~")
        if key not in known:
            group = key.rpartition(".")[0]
            siblings = [k for k in known if k.rpartition(".")[0] == group]
            return f"No option '{key}'. {did_you_mean(key, siblings or known)}"
    if isinstance(error, OverrideParseException):
        return f"Can't read '{error.override}'. An option is written key=value; --help lists them."
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {text.splitlines()[0]}."
    return "\n".join(line for line in text.splitlines() if "HYDRA_FULL_ERROR" not in line).strip()


def _known() -> list[str]:
    """Every option of the scenario and the strategy on the command line."""
    from hydra import compose, initialize_config_dir

    pairs = [argument.lstrip("+").partition("=") for argument in sys.argv[1:]]
    chosen = [
        f"{key}={value.split(',')[0]}"
        for key, _, value in pairs
        if value and key.partition("@")[0] in GROUPS
    ]
    with initialize_config_dir(str(userspace.configuration()), version_base="1.3"):
        return _paths(OmegaConf.to_container(compose("config", chosen), resolve=False))


def _paths(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return []
    return [p for k, v in tree.items() for p in (f"{prefix}{k}", *_paths(v, f"{prefix}{k}."))]


def _job(cfg: DictConfig) -> int:
    phases = {"run": _run, "report": _report}
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

    for path in write(Path(command.results_dir)):
        print(path)
    return 0


def _run(command: Command, tree: Mapping[str, Any]) -> int:
    """One run, or the word that it is there already."""
    from clbench.cells import execute

    cell = _cell(command, tree)
    title = cell.names, cell.conditions.seed
    ended = execute(cell, lambda: _progress(*title, command.progress))
    if ended.earlier:
        print("This run is there already; force=true repeats it.", file=sys.stderr)
    return _show(ended.result, ended.folder)


def _cell(command: Command, tree: Mapping[str, Any]) -> Cell:
    """What the command line asks to run."""
    from clbench import config
    from clbench.cells import Cell
    from clbench.protocol import Conditions

    keys = Conditions.__dataclass_fields__
    return Cell(
        composed=tree,
        conditions=config.fill(Conditions, {k: tree[k] for k in keys if k in tree}, ""),
        names=_names(),
        tuned=None,
        results_dir=Path(command.results_dir),
        force=command.force,
    )


def _names() -> Names:
    from clbench.protocol import Names

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
