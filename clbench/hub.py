"""The Hugging Face hub: asked once, as its libraries try six times for half a minute, aloud.

What they keep of it is compared with what it publishes.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from clbench import checksums
from clbench.errors import UserError
from clbench.nn.weights import brief

Kind = Literal["model", "dataset"]

_SECONDS = 10.0
_LOGS = ("datasets", "huggingface_hub", "httpx", "timm", "transformers")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Unreachable(Exception):
    """There is no network, or no hub at its end."""


def commit(name: str, kind: Kind, revision: str | None = None) -> str | None:
    """The commit that a name stands for.

    Args:
        name: owner/name.
        kind: Of what.
        revision: Branch, tag or commit; None: the newest.

    Returns:
        Its hash; None where HF_HUB_OFFLINE forbids to ask.

    Raises:
        UserError: If the hub has no such thing, or does not give it.
        Unreachable: If there is no network.
    """
    hub = importlib.import_module("huggingface_hub")
    if hub.constants.HF_HUB_OFFLINE:
        return None
    api = hub.HfApi()
    ask: Any = api.model_info if kind == "model" else api.dataset_info
    try:
        with quiet():
            found = ask(name, revision=revision, timeout=_SECONDS)
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError) as error:
        raise UserError(
            f"The Hugging Face hub does not give {name!r}: {brief(error)}. Check the name, and "
            "that you have access."
        ) from error
    except Exception as error:  # what its transport raises differs from version to version
        raise Unreachable(brief(error)) from error
    return str(found.sha)


@cache
def cached_only(where: str) -> bool:
    """Whether a model is to be looked for in the hub's cache alone, as the hub can't be reached.

    Args:
        where: A folder, for which there is nothing to ask, or a name on the hub.
    """
    if Path(where).expanduser().is_dir():
        return False
    try:
        return commit(where, "model") is None
    except Unreachable:
        return True
    except UserError:  # transformers says it in its own words
        return False


@contextmanager
def verified(name: str, kind: Kind) -> Iterator[None]:
    """What a library takes from the hub's cache in the block is what the hub publishes.

    The cache keeps each file under its SHA-256, or, if it is small, under Git's SHA-1 of it. A
    model's files are compared with these before and after, a dataset's when they come.

    Args:
        name: owner/name; a folder is nobody's but the user's.
        kind: Of what.

    Raises:
        UserError: If a file is another one; says which.
    """
    if Path(name).expanduser().is_dir():
        yield
        return
    constants = importlib.import_module("huggingface_hub.constants")
    place = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}", "blobs")
    before = _blobs(place)
    if kind == "model":
        _require_published(before, name)
    yield
    _require_published(_blobs(place) - before, name)


def _blobs(place: Path) -> set[Path]:
    found = place.iterdir() if place.is_dir() else ()
    return {file for file in found if _BLOB.fullmatch(file.name)}


def _require_published(files: Iterable[Path], name: str) -> None:
    for file in sorted(files):
        if len(file.name) == 64:
            checksums.require(file, file.name, f"the Hugging Face hub's {name}")
            continue
        data = file.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if found != file.name:
            raise UserError(
                f"{file} is another file than expected: its Git SHA-1 is {found}, and the Hugging "
                f"Face hub's {name} says {file.name}. Delete it, so that it is fetched again."
            )


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries' logs stay out of ours in the block."""
    logs = [logging.getLogger(name) for name in _LOGS]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
