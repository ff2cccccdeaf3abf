"""Save and restore a run between experiences, bit for bit."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from clbench.files import write_atomically

_STATE, _DIGEST = "state.pt", "state.sha256"


def save(folder: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint and its SHA-256; the one before stays until this one is whole.

    Args:
        folder: The run's checkpoint folder.
        content: Tensors and plain data only.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.{_STATE}"
    write_atomically(folder / name, data)
    write_atomically(folder / _DIGEST, f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode())
    for old in folder.glob(f"*.{_STATE}"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest whole checkpoint, or None where there is none or it is damaged.

    Nothing in the file is executed: only tensors and plain data are read.
    """
    try:
        digest, name = (folder / _DIGEST).read_text().split()
        data = (folder / Path(name).name).read_bytes()
    except (OSError, ValueError):
        return None
    if hashlib.sha256(data).hexdigest() != digest:
        return None
    try:
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception:  # whatever an unpickler stumbles over
        return None
    return content if isinstance(content, dict) else None


def discard(folder: Path) -> None:
    """Removes a checkpoint that is no longer needed."""
    for name in (*folder.glob(f"*{_STATE}"), folder / _DIGEST):
        name.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
