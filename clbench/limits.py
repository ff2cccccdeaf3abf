"""What a run may take of time, memory and disk, and what happens where that is too little."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from clbench.errors import TimedOut, UserError
from clbench.types import require

#: Copies of a model that checkpoints hold at most: with its optimizer's two averages, the state
#: between experiences and that within one, each beside the next while that is written.
COPIES = 8
#: Bytes for the log, the result, and what is not the model.
_ROOM = 2**24
#: What PyTorch says where main memory is refused to it; it has no class of error for that.
_REFUSED = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a run may take, and how much of it may be lost; decides no number.

    Attributes:
        timeout: Seconds that a run may take, from where it was interrupted on too; 0: any.
        checkpoint_every: Minutes between checkpoints within an experience; 0: only between
            experiences, and where a signal asks for one.
    """

    timeout: float = 0.0
    checkpoint_every: float = 30.0

    def __post_init__(self) -> None:
        require(self, "timeout", "checkpoint_every", at_least=0)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, of the device or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _REFUSED)


def require_space(folder: Path, model: nn.Module, samples: int) -> None:
    """Refuses to begin what could not be saved.

    Args:
        folder: Where checkpoints go.
        model: What they hold.
        samples: Bytes of the memory's samples.

    Raises:
        UserError: With the folder, what is free, and what is needed.
    """
    tensors = (*model.parameters(), *model.buffers())
    needed = COPIES * sum(t.nbytes for t in tensors) + 4 * samples + _ROOM
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"Can't write {folder}: the disk has {free / 2**20:,.0f} MiB left, and checkpoints of "
            f"this run may take {needed / 2**20:,.0f} MiB. Free some space, or choose another "
            "folder with results_dir=."
        )


@contextmanager
def no_orphans() -> Iterator[None]:
    """What the block has started and not ended when its time is up is ended too."""
    before = _descendants(os.getpid())
    try:
        yield
    except TimedOut:
        for process in _descendants(os.getpid()) - before:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        raise


def _descendants(process: int) -> set[int]:
    """Children, theirs, and so on; none where the system does not list processes."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may have ended meanwhile
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: set[int] = set()
    new = set(children.get(process, ()))
    while new:
        found |= new
        new = {child for one in new for child in children.get(one, ())} - found
    return found
