"""What a call of a model depends on: whether several models may be called as one."""

from __future__ import annotations

import copy
import enum
import functools
import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from clbench.passes import Hook

#: What every module has; the rest is what its `forward` may look at.
_INNARDS = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, enum.Enum)
_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType)


class Unlike(Exception):
    """The call depends on something that can't be compared with another model's."""


@dataclass(frozen=True)
class Reading:
    """A call of a model: what is the same for all that may be called as one, and what is not.

    Attributes:
        key: Equal for those. Structure, modes, shapes, whether gradients are wanted.
        structure: The part of the key that is about the model alone.
        parameters: By name; shared ones once.
        buffers: By name.
        inputs: What it is called on.
        autocast: To which type; None: not at all.
    """

    key: Hashable
    structure: Hashable
    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    inputs: Tensor
    autocast: torch.dtype | None


def read(model: nn.Module, inputs: Tensor) -> Reading:
    """Looks at everything that the outputs may depend on.

    Raises:
        Unlike: If there is something that can't be compared, or that must not be shared.
    """
    _refuse_modes(inputs)
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    structure = tuple(_parts(model, "", parameters, buffers, {}))
    device = inputs.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    shapes = tuple(_shape(t) for t in (inputs, *parameters.values(), *buffers.values()))
    key = (structure, shapes, torch.is_grad_enabled(), cast, torch.get_num_threads())
    return Reading(key, structure, parameters, buffers, inputs, cast)


def skeleton(model: nn.Module) -> nn.Module:
    """The structure of a model that has been read, without its weights."""
    bare = copy.deepcopy(model)
    for module in bare.modules():
        module.__dict__.pop("forward", None)
        for name in _HOOKS:
            getattr(module, name).clear()
    return bare.to(device="meta")


def _refuse_modes(inputs: Tensor) -> None:
    """What watches or transforms operations in this thread would not see those of another."""
    if (
        torch.is_inference_mode_enabled()
        or inputs.requires_grad
        or type(inputs) is not Tensor
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_function_mode_stack()
        or _get_current_dispatch_mode() is not None
    ):
        raise Unlike


def _parts(
    module: nn.Module,
    path: str,
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, Tensor],
    met: dict[int, int],
) -> Iterator[Hashable]:
    """Of a module and those in it, in their order; `met` numbers tensors, to see shared ones."""
    content = module.__dict__
    if path and any(type(h) is not Hook and not isinstance(h, Hook) for h in _hooks(content)):
        raise Unlike
    own = tuple(
        (name, _value(value))
        for name, value in content.items()
        if name not in _INNARDS and (path or name != "forward")
    )
    yield path, type(module), module.training, own
    for name, parameter in content["_parameters"].items():
        number = None if parameter is None else met.setdefault(id(parameter), len(met))
        if number == len(met) - 1 and path + name not in parameters:
            if type(parameter) is not nn.Parameter:
                raise Unlike
            parameters[path + name] = parameter
        yield name, number
    for name, buffer in content["_buffers"].items():
        if buffer is not None:
            if type(buffer) is not Tensor:
                raise Unlike
            buffers[path + name] = buffer
        yield name, buffer is None
    for name, child in content["_modules"].items():
        if child is not None:
            yield from _parts(child, f"{path}{name}.", parameters, buffers, met)


def _hooks(content: dict[str, Any]) -> Iterator[Any]:
    for name in _HOOKS:
        yield from content[name].values()


def _value(value: Any) -> Hashable:
    """An attribute as something that is equal only where it is the same in every respect."""
    if isinstance(value, (*_PLAIN, *_TORCH, *_FUNCTIONS)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_value, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_value, value))
    if isinstance(value, dict):
        return type(value), tuple((_value(k), _value(v)) for k, v in value.items())
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return value
    if isinstance(value, functools.partial):
        return "partial", _value(value.func), _value(value.args), _value(value.keywords)
    raise Unlike


def _shape(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
