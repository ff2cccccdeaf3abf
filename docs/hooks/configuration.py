"""The suite's YAML files: as they stand, and as Hydra composes them."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from clbench import userspace

CONF = userspace.configuration()


def names(group: str) -> list[str]:
    """Every choice of a group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def text(group: str, name: str) -> str:
    """A YAML file, word for word."""
    return (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").strip()


@cache
def raw(group: str, name: str) -> dict[str, Any]:
    """A YAML file, nothing composed."""
    content = OmegaConf.to_container(OmegaConf.create(text(group, name)), resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def title(group: str, name: str) -> str:
    """What the file says of itself in its first line."""
    first = text(group, name).splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def chosen(group: str, name: str) -> dict[str, tuple[str, str]]:
    """Parts that the file takes from another group, by option: that group, and its choice."""
    found = {}
    for entry in raw(group, name).get("defaults", []):
        if isinstance(entry, dict):
            ((where, choice),) = entry.items()
            other, _, place = str(where).partition("@")
            option = place.rpartition(".")[2]
            found[option] = (other.removeprefix("override").strip().lstrip("/"), str(choice))
    return found


def kind(group: str, name: str) -> type[Any]:
    """The class that it configures."""
    module, _, own = str(raw(group, name)["_target_"]).rpartition(".")
    found: type[Any] = vars(importlib.import_module(module))[own]
    return found


def node(group: str, name: str) -> dict[str, Any]:
    """What the file configures, parts from other groups put in."""
    parts = {option: node(*part) for option, part in chosen(group, name).items()}
    return {key: value for key, value in raw(group, name).items() if key != "defaults"} | parts
