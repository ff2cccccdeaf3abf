"""Continual-learning benchmarks: one loop, one result format, one honest protocol."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clbench.conditions import Conditions as Conditions
    from clbench.errors import UserError as UserError
    from clbench.from_python import run as run
    from clbench.results import Result as Result
    from clbench.results import read as read

_PUBLIC = {
    "Conditions": "clbench.conditions",
    "Result": "clbench.results",
    "UserError": "clbench.errors",
    "read": "clbench.results",
    "run": "clbench.from_python",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Imports on first use: `import clbench` itself takes no time."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'clbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
