"""What Hydra makes of names and overrides, and its refusals in words that help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clbench import userspace
from clbench.discretion import refuse_environment
from clbench.errors import did_you_mean

#: Parts of a run that are chosen by name, each a folder of conf/.
GROUPS = ("scenario", "strategy", "backbone", "language_model", "budget", "engine")


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The suite's configuration with these overrides.

    Returns:
        It, interpolations resolved, as plain data; and what was chosen in each group.

    Raises:
        HydraException, OmegaConfBaseException: As Hydra's; see `explained`.
    """
    return _compose(overrides, resolve=True)


def searched(own: Path | None) -> list[str]:
    """The override with which a user's own configuration is looked through too.

    Args:
        own: Its folder, as `userspace.join` returns it.
    """
    return [f"hydra.searchpath=['{own.as_uri()}']"] if own else []


def explained(error: Exception, overrides: Sequence[str]) -> str:
    """Why Hydra could not compose, with the nearest thing that it could have.

    Args:
        error: Its `HydraException` or `OmegaConfBaseException`.
        overrides: What it was given.
    """
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    text = str(error)
    unknown = re.search(r"Could not (?:override|append).*?'([^'=]+)", text)
    if unknown and "@" in unknown[1]:
        return f"There is nothing to choose at '{unknown[1]}': the chosen strategy wraps no other."
    if unknown:
        known = _known(overrides)
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


def _unknown_choice(error: MissingConfigException) -> str:
    """ "strategy/ewcc" to "No strategy 'ewcc'. Did you mean 'ewc'? ..."."""
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return str(error).splitlines()[0]
    return f"No {group} '{name}'. {did_you_mean(name, error.options or ())}"


def _known(overrides: Sequence[str]) -> list[str]:
    """Every option of the scenario and the strategy that were chosen."""
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    chosen = [
        f"{key}={value.split(',')[0]}"
        for key, _, value in pairs
        if value and (key.partition("@")[0] in GROUPS or key == "hydra.searchpath")
    ]
    return _paths(_compose(chosen, resolve=False)[0])


def own_part(found: DictConfig) -> DictConfig:
    """What Hydra has composed, without its own options.

    Raises:
        UserError: If it reads the environment.
    """
    ours = OmegaConf.masked_copy(found, [str(key) for key in found if key != "hydra"])
    refuse_environment(OmegaConf.to_container(ours, resolve=False))
    return ours


def _compose(overrides: Sequence[str], resolve: bool) -> tuple[dict[str, Any], dict[str, str]]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    around = GlobalHydra.instance().hydra  # of a program that uses Hydra itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(userspace.configuration()), version_base="1.3"):
            found = compose("config", [*overrides], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = around
    ours = own_part(found)
    tree: Any = OmegaConf.to_container(ours, resolve=resolve)
    return tree, dict(found.hydra.runtime.choices)


def _paths(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return []
    return [p for k, v in tree.items() for p in (f"{prefix}{k}", *_paths(v, f"{prefix}{k}."))]
