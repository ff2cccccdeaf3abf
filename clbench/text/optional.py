"""Libraries for language models, imported only when something needs them."""

from __future__ import annotations

import importlib
from typing import Any

from clbench.errors import UserError


def needed(name: str) -> Any:
    """A library of the extra `text`.

    Raises:
        UserError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"This needs the package {error.name}, which is not installed. "
            "Install it with: pip install 'clbench[text]'"
        ) from error
