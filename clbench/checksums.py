"""SHA-256 of what is fetched: known beforehand, or remembered of the first time.

Files that everybody fetches are in `checksums.sha256` of the suite. What that does not know is
remembered beside the files, when they come, in a `clbench.sha256` of the same form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

from clbench import locks
from clbench.errors import UserError
from clbench.files import write_atomically
from clbench.nn.weights import sha256

REMEMBERED = "clbench.sha256"
_OURS = Path(__file__).with_name("checksums.sha256")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@cache
def known() -> Mapping[str, str]:
    """Those of the suite, by path below data_dir, or by the name of a file of weights."""
    return _read(_OURS)


def require(path: Path, expected: str, whose: str) -> None:
    """Refuses a file that is another one.

    Args:
        path: Of the file.
        expected: Its SHA-256, or the first digits of it.
        whose: Where these come from, for the message.

    Raises:
        UserError: With the path, both SHA-256 and what to do.
    """
    found = _digest(path)
    if not found.startswith(expected):
        raise UserError(
            f"{path} is another file than expected: its SHA-256 is {found}, and {whose} says "
            f"{expected}. Delete it, so that it is fetched again."
        )


def compare(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Refuses files that are no longer what they were when they were fetched.

    Args:
        folder: Whose remembered files.
        files: Only these of them; default: all that are there.

    Raises:
        UserError: If one has changed.
    """
    remembered = _read(folder / REMEMBERED)
    names = remembered if files is None else [_name(folder, file) for file in files]
    for name in names:
        if name in remembered and (folder / name).is_file():
            whose = f"{folder / REMEMBERED} (where a line can be removed)"
            require(folder / name, remembered[name], whose)


def remember(folder: Path, files: Iterable[Path]) -> None:
    """Keeps the SHA-256 of files that were fetched; for who alone fetches there.

    Raises:
        UserError: If one was there before, and was another one.
    """
    files = sorted(file for file in files if file.is_file() and "\n" not in file.name)
    compare(folder, files)
    before = _read(folder / REMEMBERED)
    found = {**before, **{_name(folder, file): _digest(file) for file in files}}
    if found != before:
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))
        write_atomically(folder / REMEMBERED, lines.encode("utf-8", "surrogateescape"))


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """For a library that fetches into a folder what it likes, and does not say what.

    Files that come in the block are remembered. Those that came before must be as they were then.

    Args:
        folder: Where it does. Others that would fetch there wait, where it can be written.

    Raises:
        UserError: If a file has changed.
    """
    compare(folder)
    # Who can't write there fetches nothing.
    with locks.in_turn(folder) if _writable(folder) else nullcontext():
        before = set(_files(folder))
        yield
        remember(folder, set(_files(folder)) - before)


def _writable(folder: Path) -> bool:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return os.access(there, os.W_OK)


def _files(folder: Path) -> Iterator[Path]:
    """All files that are the library's own."""
    for path in folder.rglob("*"):
        ours = path.name.startswith(".") or path.name == REMEMBERED
        if not ours and path.is_file() and not path.is_symlink():
            yield path


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _read(manifest: Path) -> dict[str, str]:
    """SHA-256 by path.

    Raises:
        UserError: If it is damaged.
    """
    try:
        lines = manifest.read_text("utf-8", "surrogateescape").split("\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{manifest} can't be read: {error.strerror}.") from error
    found = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match:
            found[match[2]] = match[1]
        elif line and not line.startswith("#"):
            raise UserError(
                f"{manifest} is damaged: {line[:80]!r} is no SHA-256 and path. Mend the line, or "
                "delete the file and what was fetched beside it."
            )
    return found


def _digest(path: Path) -> str:
    """SHA-256, computed once as long as the file stays as it is."""
    found = path.stat()
    return _computed(path, found.st_mtime_ns, found.st_size, found.st_ino)


@cache
def _computed(path: Path, *_: int) -> str:
    return sha256(path)
