"""What must not be told: secrets of the environment, names of people and hosts, their folders."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from clbench.errors import UserError

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE|AUTH", re.I)
#: Shorter values are words that may stand anywhere.
_SHORTEST = 8
#: An even number of backslashes before it: with an odd one it is words.
_ENVIRONMENT = re.compile(r"(?<!\\)(?:\\\\)*\$\{\s*oc\.(env|decode)\b")


def discreet(text: str) -> str:
    """A text without secrets of the environment, the user's name, home folder and host."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    home, user, host = _names()
    if home:
        text = re.sub(rf"{re.escape(home)}(?=[/\s'\":,;)\]]|$)", "~", text)
    if user:
        text = re.sub(rf"(?<=/){re.escape(user)}(?=/)", "USER", text)
    if host:
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "HOST", text)
    return text


def refuse_environment(tree: Any, where: str = "") -> None:
    """Refuses a configuration that reads the environment: it would land in the result.

    Args:
        tree: Plain data, interpolations not resolved.
        where: Its place, for the message.

    Raises:
        UserError: Naming the option.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            refuse_environment(value, f"{where}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for value in tree:
            refuse_environment(value, where)
    elif isinstance(tree, str) and _ENVIRONMENT.search(tree):
        raise UserError(
            f"{where}={tree} reads the environment, which would land in the result. Write the "
            f"value itself, or let the shell put it there: {where}=$NAME"
        )


def _secrets() -> Iterator[str]:
    """Longest first: one may be a part of another."""
    values = (v for name, v in os.environ.items() if _SECRET.search(name))
    yield from sorted({v for v in values if len(v) >= _SHORTEST}, key=len, reverse=True)


@cache
def _names() -> tuple[str, str, str]:
    """Home folder, user, host; empty where there is none, or it is a word like any other."""
    try:
        home, user = str(Path.home()), getpass.getuser()
    except (OSError, KeyError, RuntimeError):  # a user without an entry
        home, user = "", ""
    host = socket.gethostname()
    home = home if len(home) > 1 else ""
    return home, user, "" if host in ("", "localhost") else host
