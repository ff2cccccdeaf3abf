"""Weight files: reading them, finding their final layer, fitting them into a module."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from clbench.errors import UserError

State = dict[str, Tensor]

SUFFIXES = (".safetensors", ".pt", ".pth")
#: Prefixes that data parallelism and compilation put before every key.
WRAPPERS = ("module.", "_orig_mod.")
#: Names of final layers, ours and the usual ones elsewhere.
HEADS = ("linear", "fc", "head", "classifier")

# Training scripts keep the state dict under one of these beside the optimizer's.
_CONTAINERS = ("state_dict", "model")


def read(weights: str) -> State:
    """All tensors of a weight file, on the CPU.

    Args:
        weights: Path with one of `SUFFIXES`; a leading ~ is the home folder.

    Raises:
        UserError: If it is absent, of another format, or holds more than tensors.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"backbone.weights={weights}: there is no file {path.absolute()}.")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    # A file of another format fails wherever the reader happens to stumble, with any exception.
    except Exception as error:
        raise UserError(
            f"backbone.weights={weights} can't be read: {brief(error)}. "
            "Save the state dict alone, best as .safetensors."
        ) from error
    for key in _CONTAINERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"backbone.weights={weights} holds more than tensors: save the state dict.")
    return dict(state)


def unwrap(state: State, prefixes: Sequence[str]) -> State:
    """Keys without the prefixes that wrappers, in this order, put before them."""
    for prefix in prefixes:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def split_head(state: State, names: Collection[str]) -> tuple[State, State]:
    """Takes the final layer off a state dict.

    Args:
        state: Tensors by key.
        names: A final layer is one of these, with a two-dimensional weight.

    Returns:
        The state without final layers; the tensors of the final layer by their own names, or {}
        if there are none or several.
    """
    heads = [n for n in names if f"{n}.weight" in state and state[f"{n}.weight"].ndim == 2]
    final = {key for key in state if any(key.startswith(f"{name}.") for name in heads)}
    body = {key: value for key, value in state.items() if key not in final}
    head = {key.removeprefix(f"{heads[0]}."): state[key] for key in final} if heads else {}
    return body, head if len(heads) == 1 else {}


def fit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copies tensors into a module of exactly these keys and shapes.

    Batch norm's count of batches may be absent, as in files older than PyTorch 0.4.1.

    Args:
        module: Changed in place, also when this raises.
        state: Tensors by key.
        source: Where they come from, for the message.

    Raises:
        UserError: If keys are missing, unexpected or of another shape; names them.
    """
    own = module.state_dict()
    other = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    result = module.load_state_dict(
        {k: v for k, v in state.items() if k not in other}, strict=False
    )
    shapes = [f"{k} {[*state[k].shape]} instead of {[*own[k].shape]}" for k in own if k in other]
    problems = {
        "missing": [key for key in result.missing_keys if key not in other],
        "unexpected": result.unexpected_keys,
        "of another shape": shapes,
    }
    found = [f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise UserError(
            f"{source} doesn't fit {type(module).__name__}; {'; '.join(found)}. "
            "Choose the backbone, its options and the head that the file was saved with."
        )


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def brief(error: Exception) -> str:
    """An exception's message on one line, cut to 600 characters, without a full stop."""
    return textwrap.shorten(str(error) or type(error).__name__, 600).rstrip(".")


def _listed(keys: Sequence[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
