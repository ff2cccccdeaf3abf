"""The Hugging Face hub, asked once: its libraries try six times for half a minute, aloud."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from clbench.errors import UserError
from clbench.nn.weights import brief

_SECONDS = 10.0
_LOGS = ("datasets", "huggingface_hub", "httpx", "timm", "transformers")


class Unreachable(Exception):
    """There is no network, or no hub at its end."""


def commit(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> str | None:
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
