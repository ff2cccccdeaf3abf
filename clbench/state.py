"""What a strategy remembers, as tensors and plain data, and back again."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from clbench.types import Strategy

#: What stays as it is.
PLAIN = (bool, int, float, str, type(None))


@runtime_checkable
class Stateful(Protocol):
    """Anything that saves itself as a dict: modules, optimizers, memories."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def capture(strategy: Strategy) -> dict[str, Any]:
    """All state of a strategy, its wrapped strategies' included.

    Returns:
        Tensors and plain data only: safe to load without running code.

    Raises:
        TypeError: If an attribute can't be saved; names it.
    """
    return {name: _save(value, name) for name, value in _state(strategy).items()}


def restore(strategy: Strategy, state: dict[str, Any]) -> None:
    """Puts captured state into a strategy that has been set up the same way.

    The state is copied: what happens to the strategy later leaves it as it is.

    Raises:
        ValueError: If the state belongs to a strategy with other attributes.
    """
    current = _state(strategy)
    if current.keys() != state.keys():
        differ = sorted(current.keys() ^ state.keys())
        raise ValueError(f"{type(strategy).__name__}: saved state differs in {', '.join(differ)}")
    for name, value in current.items():
        if isinstance(value, Strategy):
            restore(value, state[name])
        elif isinstance(value, torch.Generator):
            value.set_state(state[name].cpu())
        elif isinstance(value, nn.Module):
            value.load_state_dict(state[name])  # copies
        elif isinstance(value, Stateful):
            value.load_state_dict(data(state[name], name))
        elif isinstance(value, Tensor) and value.requires_grad:
            value.data = data(state[name], name)
        else:
            setattr(strategy, name, data(state[name], name))


def _state(strategy: Strategy) -> dict[str, Any]:
    """Attributes that are state: wrapped strategies, and what `setup` made."""
    options = {f.name for f in fields(strategy)}
    return {
        name: value
        for name, value in vars(strategy).items()
        if isinstance(value, Strategy)
        or not (name in options or name == "context" or name.startswith("_"))
    }


def _save(value: Any, name: str) -> Any:
    """One attribute. What restores itself can't lie in a list: nothing would know it again."""
    if isinstance(value, Strategy):
        return capture(value)
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Stateful):
        return data(dict(value.state_dict()), name)
    return data(value, name)


def data(value: Any, name: str) -> Any:
    """A copy of tensors, plain data, and lists and dicts of these.

    Raises:
        TypeError: If it is anything else; says where, from `name` on.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(data(v, f"{name}[{i}]") for i, v in enumerate(value))
    if isinstance(value, dict):
        return {k: data(v, f"{name}[{k!r}]") for k, v in value.items()}
    raise TypeError(
        f"{name} is a {type(value).__name__}, which can't be saved. State is tensors, plain data, "
        "lists and dicts of these, and, as attributes of their own, modules, generators and "
        "objects with state_dict and load_state_dict; begin the name with an underscore if it "
        "need not survive an experience."
    )
