"""Save and restore a run, bit for bit."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from clbench.errors import UserError
from clbench.files import sweep, write_atomically

_STATE, _DIGEST = "state.pt", "state.sha256"


def save(folder: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint and its SHA-256; the one before stays until this one can be read.

    Args:
        folder: The run's checkpoint folder.
        content: Tensors and plain data only.

    Raises:
        UserError: If it can't be written, or what was written does not come back.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest[:16]}.{_STATE}"
    write_atomically(folder / name, data)
    if _read(folder / name, digest, torch.device("cpu")) is None:
        raise UserError(
            f"Can't write {folder / name}: what was written does not come back. Check the disk, "
            "or choose another folder with results_dir=."
        )
    write_atomically(folder / _DIGEST, f"{digest}  {name}\n".encode())
    for old in folder.glob(f"*.{_STATE}"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest whole checkpoint, or None where there is none or it is damaged.

    Nothing in the file is executed: only tensors and plain data are read.
    """
    try:
        digest, name = (folder / _DIGEST).read_text().split()
    except (OSError, ValueError):
        return None
    return _read(folder / Path(name).name, digest, device)


def load_for(run: Mapping[str, Any], folder: Path, device: torch.device) -> dict[str, Any] | None:
    """`load`, of this run and no other.

    Raises:
        UserError: If another run left it; says in what the two differ.
    """
    content = load(folder, device)
    differ = [] if content is None else list(_differences(run, content.get("run", run)))[:5]
    if not differ:
        return content
    raise UserError(
        f"The checkpoint in {folder} is of another run: {'; '.join(differ)}. Remove it, or use "
        "another results_dir; force=true begins anew here."
    )


def remains(folder: Path) -> bool:
    """Whether there is a checkpoint, readable or not."""
    return any(folder.glob(f"*{_STATE}")) or (folder / _DIGEST).exists()


def _read(file: Path, digest: str, device: torch.device) -> dict[str, Any] | None:
    try:
        data = file.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != digest:
        return None
    try:
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception:  # whatever an unpickler stumbles over
        return None
    return content if isinstance(content, dict) else None


def _differences(mine: Any, other: Any, where: str = "") -> Iterator[str]:
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys((*mine, *other)):
            if key == "run_id":  # a digest of the rest, and of where it runs
                continue
            yield from _differences(mine.get(key), other.get(key), f"{where}.{key}".lstrip("."))
    elif mine != other:
        yield f"{where} is {mine!r}, there {other!r}"


def discard(folder: Path) -> None:
    """Removes a checkpoint that is no longer needed."""
    sweep(folder)
    for name in (*folder.glob(f"*{_STATE}"), folder / _DIGEST):
        name.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
