"""The suite as a test sees it: its configuration, and a command line to call."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import nn

from clbench import userspace
from clbench.config import build
from clbench.errors import UserError
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy
from clbench.types import Strategy

#: Arguments of the command line in, what a process would leave out.
Command = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(kw_only=True)
class Headless(ToyScenario):
    """A model without features of its own."""

    def model(self, seed: int, stream: object) -> nn.Module:  # noqa: ARG002
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 6))

    def model_facts(self, model: nn.Module) -> Mapping[str, Any]:  # noqa: ARG002
        return {}


def composed(*overrides: str) -> dict[str, Any]:
    """What Hydra makes of the suite's configuration with these overrides, as plain data."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(userspace.configuration()), version_base="1.3"):
        tree = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def configured(group: str) -> list[str]:
    """Every choice of a group of the suite's configuration."""
    return sorted(file.stem for file in (userspace.configuration() / group).glob("*.yaml"))


def gradient_bases() -> list[str]:
    """Strategies of the suite that can be wrapped on a model that starts untrained."""
    return [name for name in configured("strategy") if _can_be_wrapped(name)]


def _can_be_wrapped(name: str) -> bool:
    strategy = build(composed(f"strategy={name}")["strategy"], Strategy, "strategy")
    if not isinstance(strategy, GradientStrategy) or strategy.revisits:
        return False
    try:
        strategy.check(ToyScenario())
    except UserError:
        return False
    return True


def write_all(folder: Path, files: Mapping[str, str]) -> None:
    """Writes text files below a folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
