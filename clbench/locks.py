"""Locks that free themselves when their holder dies."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from clbench.errors import Busy, UserError
from clbench.files import unwritable

_ATTEMPTS = 5
_NONE_OFFERED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Makes a folder this process's own; it ends with the block, or with the process.

    Args:
        folder: Made if it is not there. Its file `.lock` stays: a process that removed it could
            take the lock from another one.
        what: Runs there, for the message.

    Raises:
        Busy: If another process has it.
        UserError: If it can't be written, or its file system offers no locks.
    """
    lock = _taken(folder, what)
    try:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the folder, where locks are offered.

    Raises:
        UserError: If the folder can't be written.
    """
    import fcntl

    lock = _opened(folder)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _taken(folder: Path, what: str) -> int:
    """The descriptor that holds the lock."""
    while True:
        lock = _opened(folder)
        try:
            _lock(lock, folder, what)
            if os.path.samestat(os.fstat(lock), os.stat(folder / ".lock")):
                return lock
        except FileNotFoundError:  # its holder forgot the whole folder meanwhile
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _opened(folder: Path) -> int:
    for attempt in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            # Another process may have removed the folder between the two calls.
            if not isinstance(error, FileNotFoundError) or attempt + 1 == _ATTEMPTS:
                raise unwritable(folder, error) from error
    raise AssertionError


def _lock(lock: int, folder: Path, what: str) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(
            f"Another process is running {what} now. Wait for it, or choose another seed or "
            "results_dir."
        ) from None
    except OSError as error:
        if error.errno not in _NONE_OFFERED:
            raise unwritable(folder / ".lock", error) from error
        raise UserError(
            f"The file system of {folder} offers no locks ({error.strerror}), so two processes "
            "could run the same thing there. Set results_dir to another file system, or mount "
            "this one with locks."
        ) from error
