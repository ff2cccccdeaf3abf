"""From a composed configuration to a checked object."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
from abc import ABC
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from clbench.errors import UserError, did_you_mean

T = TypeVar("T")

#: Namespaces whose classes a configuration may name. Nothing else is ever imported for one.
NAMESPACES = ("strategies", "scenarios", "clbench")
#: Keys of a node that are for the suite, not for the class.
RESERVED = ("_target_", "search")


def build(node: Mapping[str, Any], kind: type[T], where: str) -> T:
    """The object that a configuration node describes.

    Args:
        node: `_target_` and one value per field; plain data.
        kind: What it must be an instance of.
        where: Path of the node in the configuration, for messages.

    Returns:
        The object, every field checked: name, type and range.

    Raises:
        UserError: If the class, a key, a type or a value is not what it must be.
    """
    values = {key: value for key, value in node.items() if key not in RESERVED}
    return fill(target_class(node, kind, where), values, where)


def fill(target: type[T], node: Mapping[str, Any], where: str) -> T:
    """An object of a dataclass from one value per field, each checked.

    Args:
        target: The class.
        node: Field names and plain values.
        where: Path of the node in the configuration, for messages.

    Raises:
        UserError: If a key, a type or a value is not what it must be.
    """
    known = {f.name: f for f in fields(target) if f.init}  # type: ignore[arg-type]
    hints = get_type_hints(target)
    values: dict[str, Any] = {}
    for key, value in node.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            guess = did_you_mean(str(key), known)
            raise UserError(f"{path} is no option of {target.__name__}. {guess}")
        values[key] = _value(value, hints[key], path)
    missing = [
        name
        for name, f in known.items()
        if name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise UserError(
            f"{where or target.__name__} lacks {', '.join(missing)}, which {target.__name__} needs."
        )
    return target(**values)


def target_class(node: Mapping[str, Any], kind: type[T], where: str) -> type[T]:
    """The class a node's `_target_` names, imported only if it lies in our namespaces.

    Raises:
        UserError: If there is none, it lies elsewhere, or it is of another kind.
    """
    path = node.get("_target_")
    if not isinstance(path, str):
        raise UserError(f"{where} lacks _target_, the class it configures.")
    module_name, _, name = path.rpartition(".")
    parts = path.split(".")
    identifiers = len(parts) > 1 and all(part.isidentifier() for part in parts)
    if parts[0] not in NAMESPACES or not identifiers:
        raise UserError(
            f"{where}._target_={path} is refused: only classes in {', '.join(NAMESPACES)} can be "
            "configured. Put your own into strategies/ or scenarios/ in your working folder."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            file = module_name.replace(".", "/") + ".py"
            raise UserError(f"{where}._target_={path}: there is no {file}.") from error
        raise UserError(
            f"{where}._target_={path} needs the package {error.name}, which is not installed."
        ) from error
    found = vars(module).get(name)
    if not (inspect.isclass(found) and is_dataclass(found) and issubclass(found, kind)):
        raise UserError(
            f"{where}._target_={path} is no {kind.__name__} (a dataclass of that kind)."
        )
    if inspect.isabstract(found) or ABC in found.__bases__:
        left = ", ".join(sorted(vars(found)["__abstractmethods__"])) or "what makes it a method"
        raise UserError(f"{where}._target_={path} is abstract: it lacks {left}.")
    return found


def options(configured: Any) -> dict[str, Any]:
    """The node that would build this object again: class and fields as plain data.

    Classes from outside the suite carry the SHA-256 of their file as `_code_`, so that an
    edited method is another method. Fields with the metadata `LOCATION` are left out: where a
    file lies decides no number. Of files in fields with `CONTENT` there is the SHA-256 instead.
    """
    target = type(configured)
    node: dict[str, Any] = {"_target_": f"{target.__module__}.{target.__qualname__}"}
    code = _foreign_code(target)
    if code:
        node["_code_"] = code
    for f in fields(configured):
        identity = f.metadata.get("identity", True)
        if f.init and identity:
            value = getattr(configured, f.name)
            if identity == "content" and value is not None:
                value = _content(Path(value))
            node[f.name] = options(value) if is_dataclass(value) else _plain(value)
    return node


def _content(file: Path) -> str:
    """What a file holds, in a word; a file that can't be read is its path, and fails later."""
    try:
        state = file.stat()
        return f"sha256:{_digest(file, state.st_size, state.st_mtime_ns)}"
    except OSError:
        return str(file)


@cache
def _digest(file: Path, size: int, changed: int) -> str:  # noqa: ARG001
    from clbench.nn.weights import sha256

    return sha256(file)


def _value(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value!r} must be a group with its own _target_.")
        return build(value, hint, where)
    try:
        # Strict JSON rules are those of a configuration file: 1 is a float, "1" is not,
        # a list may be a tuple, a text may be an Enum.
        return TypeAdapter(hint).validate_json(json.dumps(value, allow_nan=False), strict=True)
    except ValidationError as error:
        problems = "; ".join(e["msg"][0].lower() + e["msg"][1:] for e in error.errors()[:3])
        raise UserError(f"{where}={value!r} has the wrong type or value: {problems}.") from None
    except TypeError as error:
        raise UserError(f"{where}={value!r} is no plain value: {error}.") from None
    except ValueError:  # results are JSON, which has no infinity
        raise UserError(f"{where}={value!r} must be finite.") from None


def _plain(value: Any) -> Any:
    """Enums by value, tuples as lists: what JSON and YAML can say."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def _foreign_code(target: type) -> str | None:
    file = vars(sys.modules[target.__module__]).get("__file__")
    if file is None:  # typed at a prompt
        return None
    suite = Path(__file__).resolve().parents[1]
    inside = any(Path(file).resolve().is_relative_to(suite / name) for name in NAMESPACES)
    if inside:
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
