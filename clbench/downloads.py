"""What is fetched: by one process at a time, whole, and what it should be."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from clbench import checksums, locks
from clbench.archives import kept_inside
from clbench.errors import UserError
from clbench.files import unwritable
from clbench.nn.weights import brief
from clbench.progress import counting

#: Without a name, some servers refuse.
_AGENT = {"User-Agent": "clbench"}
_SECONDS = 30.0
_BLOCK = 2**20


@contextmanager
def fetching(folder: Path) -> Iterator[None]:
    """For a library that may fetch a dataset: others that want it wait, and find it there.

    Args:
        folder: Where it goes; made if it is not there.
    """
    with locks.in_turn(folder), kept_inside():
        yield


def kept(path: Path, addresses: Sequence[str], expected: str, whose: str) -> None:
    """A file that is fetched unless it is there; either way it is what it should be.

    Nothing is ever seen at its place before it is whole. For who alone fetches into its folder.

    Args:
        path: Its place.
        addresses: Where to get it, the first that gives it counts.
        expected: Its SHA-256, or the first digits of it; "": not known.
        whose: Where these come from, for the message.

    Raises:
        UserError: If no address gives it, it is another file, or it can't be written.
    """
    if not path.is_file():
        _fetch(path, addresses, expected, whose)
    checksums.require(path, expected, whose)


def _fetch(path: Path, addresses: Sequence[str], expected: str, whose: str) -> None:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    answers = []
    try:
        for address in addresses:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                try:
                    found = _received(address, file)
                except _Broken as error:
                    answers.append(f"{address}: {brief(error)}")
                    continue
                file.flush()
                os.fsync(file.fileno())
            if found.startswith(expected):
                os.replace(temporary, path)
                return
            answers.append(
                f"{address}: another file, its SHA-256 is {found}, and {whose} says {expected}"
            )
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    raise UserError(
        f"{path.name} can't be fetched: {'; '.join(answers)}. Try again later, or get it elsewhere "
        f"and put it at {path}."
    )


class _Broken(Exception):
    """There is no answer, or not all of it; an OSError, in contrast, is of the disk."""


def _received(address: str, file: BinaryIO) -> str:
    """Writes what an address gives; returns its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with (
        _opened(address) as answer,
        counting(f"fetching {address.rpartition('/')[2]}", "bytes") as show,
    ):
        total = int(answer.headers.get("Content-Length") or 0)
        while block := _block(answer):
            file.write(block)
            digest.update(block)
            size += len(block)
            show(size, max(size, total))
    if size < total:
        raise _Broken(f"only {size:,} of {total:,} bytes came")
    return digest.hexdigest()


def _opened(address: str) -> Any:
    try:
        return urllib.request.urlopen(
            urllib.request.Request(address, headers=_AGENT), timeout=_SECONDS
        )
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise _Broken(brief(error)) from error


def _block(answer: Any) -> bytes:
    try:
        return bytes(answer.read(_BLOCK))
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(brief(error)) from error
