"""Names of another library's classes in a configuration: what they may mean, and be given."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from clbench.errors import UserError, did_you_mean


def found(name: str, home: str, own: str, where: str, below: str = "") -> Any:
    """The class or function that a name means, from the library or from the user's own files.

    Nothing but modules of these two is imported, and only what is defined in them is found: a
    function that they have imported from elsewhere is not.

    Args:
        name: A bare name in `home`, a dotted one below it, or `<own>.<file>.<name>`.
        home: The module of the library that may be looked into, with all below it.
        own: The user's folder.
        where: Option that has the name, for messages.
        below: Where in `home` bare names are looked for.

    Raises:
        UserError: If it lies elsewhere, or is not there.
    """
    parts = name.split(".")
    words = all(part.isidentifier() and not part.startswith("_") for part in parts)
    inside = len(parts) == 1 or name.startswith(f"{home}.") or (parts[0] == own and len(parts) > 2)
    if not (words and inside):
        raise UserError(
            f"{where}={name} is refused: give a name from {home}, or {own}.<file>.<name> from your "
            f"own {own}/ in your working folder."
        )
    place = name.rpartition(".")[0] or ".".join(filter(None, (home, below)))
    try:
        with quietly():
            known = vars(importlib.import_module(place))
    except ModuleNotFoundError as error:
        raise UserError(f"{where}={name}: there is no module {error.name}.") from error
    allowed = f"{home if place.startswith(home) else place}."
    mine = {
        key: value
        for key, value in known.items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and not key.startswith("_")
        and f"{value.__module__}.".startswith(allowed)
    }
    if parts[-1] not in mine:
        raise UserError(f"{where}: {place} has no {parts[-1]}. {did_you_mean(parts[-1], mine)}")
    return mine[parts[-1]]


def parameters(made: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Named parameters of a function or of a class's constructor."""
    function = made.__init__ if inspect.isclass(made) else made
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.items()
    return {name: p for name, p in found if p.kind in named and name != "self"}


def check_arguments(
    made: Callable[..., Any],
    arguments: Mapping[str, Any],
    offered: Collection[str],
    where: str,
    reserved: Collection[str] = (),
) -> None:
    """Refuses arguments that do not exist or are not the user's, and asks for those that lack.

    Args:
        made: What gets them.
        arguments: The user's.
        offered: Names of those that the run has to give.
        where: Option that has them, for messages.
        reserved: Of those on offer, the ones that nobody else may give.

    Raises:
        UserError: With the name, and what would work.
    """
    known = parameters(made)
    free = known.keys() - {*reserved}
    for name in arguments:
        if name not in free:
            ours, nobody = "is given by the run", f"is no argument of {made.__name__}"
            reason = ours if name in reserved else nobody
            raise UserError(f"{where}.{name} {reason}. {did_you_mean(name, free)}")
    lacking = [
        name
        for name, parameter in known.items()
        if parameter.default is inspect.Parameter.empty
        and name not in arguments
        and name not in offered
    ]
    if lacking:
        raise UserError(
            f"{made.__name__} needs {', '.join(lacking)}. Set '{where}={{{lacking[0]}: ...}}'; "
            "only numbers, texts and lists can be given here."
        )


def filled(
    made: Callable[..., Any], arguments: Mapping[str, Any], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments, and of those on offer the ones that it takes."""
    known = parameters(made)
    return {**{k: v for k, v in offered.items() if k in known}, **arguments}


@contextmanager
def quietly() -> Iterator[None]:
    """Warnings of a library, and of those that it imports, are no concern of its user's."""
    # Recorded, and so not shown even by those that insist.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("ignore")
        yield
