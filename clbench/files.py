"""Files that are never half-visible."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

from clbench.errors import UserError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EIO: "Input/output error; the disk or the way to it is broken, choose another folder",
    errno.EXDEV: "a part of the path is another file system; choose a folder that is on one",
    errno.EFBIG: "the file would be too large for the file system or your limits",
    errno.EACCES: "it is not writable for you; choose another folder",
    errno.EPERM: "it is not writable for you; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EEXIST: "a part of the path is a file; choose another folder",
}


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that readers see the old content or the new, never a part.

    Raises:
        UserError: If it can't be written; names the path and what to do.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # with the user's umask; tempfile hides from others
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


def sweep(folder: Path) -> None:
    """Removes what killed writers left half-written; only for who alone writes in this folder."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry)


def unwritable(path: Path, error: OSError) -> UserError:
    """The message for a file or folder that the system refuses to write."""
    advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    return UserError(f"Can't write {path}: {advice}.")


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable; not every file system offers it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
