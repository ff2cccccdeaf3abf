"""Hydra composes, this checks, runs and reports; a mistake is one message and no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from clbench import interruption, launching, userspace
from clbench.commands.exits import INTERRUPTED, LATER, guarded
from clbench.commands.phases import command_of, engine_of, perform
from clbench.commands.sweeping import opened, side_by_side, sweep
from clbench.discretion import refuse_environment
from clbench.errors import Interrupted
from clbench.processes import launched

if TYPE_CHECKING:
    from clbench.conditions import Names


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
            return guarded(composed)
    except Interrupted as signal:
        print(
            f"{launched.speaker()}Interrupted ({signal}). The same command continues.",
            file=sys.stderr,
        )
        return LATER
    except KeyboardInterrupt:
        print("Interrupted. The same command continues from the last experience.", file=sys.stderr)
        return INTERRUPTED


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
        self.codes.append(guarded(lambda: _single(cfg)))

    def sweep(
        self, loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]]
    ) -> Sequence[int]:
        from clbench.planning import Composer

        composer = Composer(loader, master)
        codes = sweep([composer.job(overrides) for overrides in jobs])
        self.codes += codes
        return codes


def _single(cfg: DictConfig) -> int:
    """One command, here or where its engine says."""
    refuse_environment(OmegaConf.to_container(cfg, resolve=False))
    tree: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    command = command_of(tree)
    from clbench.planning import Job  # it needs torch, which nobody waits for with a wrong option

    job, engine = Job(tree, _names()), engine_of(tree)
    here = str(tree["engine"]["_target_"]).endswith(".Local")
    launched.refuse(command.phase, alone=here and command.workers == 1)
    if command.phase == "report":
        return perform(job, None)
    with opened(command, engine, tree) as pool:
        if pool is None or command.phase != "run":
            return perform(job, pool)
        return side_by_side([job], pool)[0]


def _names() -> Names:
    from clbench.conditions import Names

    choices = HydraConfig.get().runtime.choices
    base = choices.get("strategy@strategy.base")
    return Names(choices["scenario"], choices["strategy"], base)
