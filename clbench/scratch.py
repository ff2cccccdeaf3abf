"""What a strategy is in the midst of: state that lives within an experience, and back again.

Between experiences `clbench.state` has all that there is to save. Within one there is more: the
optimizer, counters, a teacher, whatever a method keeps under an underscore. Its structure is made
again by the method's own code, from where the experience began; here only the numbers are saved
and put back into it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clbench import state
from clbench.state import PLAIN, Stateful
from clbench.types import Strategy

#: What is a part of a module that is saved anyway.
_OWNED = ["owned"]


class Unlike(Exception):
    """What was saved does not fit what the strategy has made again."""


def constants(strategy: Strategy) -> list[dict[str, Any]]:
    """Plain data under underscores, before the first step: what stays so need not be saved.

    Nor may it: a method may have made it of what is not the same in another process.
    """
    return [
        {n: copy.deepcopy(v) for n, v in vars(one).items() if n.startswith("_") and _is_plain(v)}
        for one in _every(strategy)
    ]


def capture(strategy: Strategy, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All state of a strategy and of those that it wraps, in the midst of an experience.

    What is neither tensors, plain data, containers of these, modules, generators nor has a state
    dict is left out: the method makes it again, and must not change it within an experience.

    Args:
        strategy: Whose.
        known: Its `constants`.

    Returns:
        Of each strategy, tensors and plain data: safe to load without running code.
    """
    owned = _owned(strategy)
    return [
        {
            "state": state.capture(one) if one is strategy else None,
            "modes": {name: _modes(module) for name, module in _modules(one)},
            "scratch": {n: v for n, v in _saved(one, owned, same) if v is not None},
        }
        for one, same in zip(_every(strategy), known, strict=True)
    ]


def restore(strategy: Strategy, saved: list[dict[str, Any]]) -> None:
    """Puts captured state into a strategy that has come to the same experience.

    Raises:
        Unlike: If it has made something else of it.
    """
    strategies = list(_every(strategy))
    if len(strategies) != len(saved):
        raise Unlike(f"{len(saved)} strategies were saved, here are {len(strategies)}")
    before = _parameters(strategies)
    try:
        for one, content in zip(strategies, saved, strict=True):
            if content["state"] is not None:
                state.restore(one, content["state"])
            for name, value in content["scratch"].items():
                setattr(one, name, _put(vars(one).get(name), value))
            for name, module in _modules(one):
                _set_modes(module, content["modes"][name])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Unlike(f"{type(error).__name__}: {error}") from error
    if _parameters(strategies) != before:
        raise Unlike("its modules replace their parameters when they are restored")


def _every(strategy: Strategy) -> Iterator[Strategy]:
    yield strategy
    for value in vars(strategy).values():
        if isinstance(value, Strategy):
            yield from _every(value)


def _parameters(strategies: Sequence[Strategy]) -> set[int]:
    """Which they are: an optimizer would not know others."""
    return {id(p) for one in strategies for _, m in _modules(one) for p in m.parameters()}


def _modules(strategy: Strategy) -> Iterator[tuple[str, nn.Module]]:
    for name, value in vars(strategy).items():
        if isinstance(value, nn.Module):
            yield name, value


def _owned(strategy: Strategy) -> frozenset[int]:
    """Storages of the modules that `clbench.state` saves, so that nothing else does."""
    kept = (
        module
        for one in _every(strategy)
        for name, module in _modules(one)
        if not name.startswith("_")
    )
    return frozenset(_place(t) for module in kept for t in _tensors(module)) - {0}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _modes(module: nn.Module) -> dict[str, list[bool]]:
    """Which parts train, and which parameters want gradients."""
    return {
        "training": [part.training for part in module.modules()],
        "gradients": [parameter.requires_grad for parameter in module.parameters()],
    }


def _set_modes(module: nn.Module, modes: dict[str, list[bool]]) -> None:
    for part, training in zip(module.modules(), modes["training"], strict=True):
        part.training = training
    for parameter, wanted in zip(module.parameters(), modes["gradients"], strict=True):
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)


def _saved(
    strategy: Strategy, owned: frozenset[int], same: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    for name, value in vars(strategy).items():
        constant = name in same and type(same[name]) is type(value) and _is_plain(value)
        if name.startswith("_") and not (constant and same[name] == value):
            yield name, _save(value, owned)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _save(value: Any, owned: frozenset[int]) -> Any:
    """A list of kind and content; None: not to be saved."""
    if isinstance(value, torch.Generator):
        return ["generator", value.get_state()]
    if isinstance(value, (Tensor, nn.Module)) and _is_part(value, owned):
        return _OWNED
    if isinstance(value, Stateful):
        try:
            return ["stateful", state.data(dict(value.state_dict()), "")]
        except TypeError:
            return None
    if isinstance(value, Tensor):
        return ["tensor", value.detach().clone()]
    if isinstance(value, PLAIN):
        return ["plain", value]
    if type(value).__name__ in _CONTAINERS:
        parts = [_save(part, owned) for part in value]
        return None if any(part is None for part in parts) else [type(value).__name__, parts]
    if isinstance(value, dict) and all(isinstance(key, PLAIN) for key in value):
        parts = [_save(part, owned) for part in value.values()]
        return None if any(part is None for part in parts) else ["dict", list(value), parts]
    return None


def _is_part(value: Tensor | nn.Module, owned: frozenset[int]) -> bool:
    tensors = _tensors(value) if isinstance(value, nn.Module) else [value]
    return bool(tensors) and all(_place(tensor) in owned for tensor in tensors)


_CONTAINERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}


def _put(current: Any, saved: list[Any]) -> Any:
    """The value that was saved: in what is there, where something may refer to it."""
    kind, *content = saved
    if kind == "owned":
        return current
    if kind == "generator":
        current.set_state(content[0].cpu())
        return current
    if kind == "stateful":
        if not isinstance(current, Stateful):
            raise TypeError(f"a {type(current).__name__} is where an object with state was")
        current.load_state_dict(state.data(content[0], ""))
        return current
    if kind == "tensor":
        found = content[0].clone()
        if isinstance(current, Tensor) and current.requires_grad:
            current.data = found
            return current
        return found
    if kind == "plain":
        return content[0]
    if kind == "dict":
        keys, parts = content
        made = copy.copy(current) if isinstance(current, dict) else {}
        made.clear()
        made |= {k: _put(_of(current, k), p) for k, p in zip(keys, parts, strict=True)}
        return made
    there = list(current) if isinstance(current, (list, tuple)) else []
    there += [None] * (len(content[0]) - len(there))
    return _CONTAINERS[kind](_put(c, p) for c, p in zip(there, content[0], strict=False))


def _of(current: Any, key: Any) -> Any:
    return current.get(key) if isinstance(current, dict) else None
