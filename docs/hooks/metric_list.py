"""The metrics of the suite and what others call by the same names, from the code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import docstrings

from clbench import metrics

#: The first is known best after the second, the second best at the end: conventions differ.
EXAMPLE = (
    (0.80, None, None, None),
    (0.90, 0.80, None, None),
    (0.75, 0.60, 0.85, None),
    (0.70, 0.85, 0.70, 0.90),
)


def markdown() -> str:
    """Every metric with its formula, range, sign and source."""
    return "\n\n".join(f"### `{name}`\n\n{_said(metric)}" for name, metric in _metrics()) + "\n"


def conventions() -> str:
    """One matrix and what each convention makes of it."""
    head = "| after | on 1 | on 2 | on 3 | on 4 |\n|---|--:|--:|--:|--:|"
    rows = (f"| {i} | {' | '.join(_cell(v) for v in row)} |" for i, row in enumerate(EXAMPLE, 1))
    forgetting = _named(metrics.FORGETTING_CONVENTIONS)
    transfer = _named(metrics.BACKWARD_TRANSFER_CONVENTIONS)
    return "\n\n".join(
        [
            "\n".join([head, *rows]),
            "\n".join(["| forgetting as | in % |", "|---|--:|", *forgetting]),
            "\n".join(["| backward transfer as | in % |", "|---|--:|", *transfer]),
        ]
    )


def _metrics() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions that say where they come from."""
    for name, found in vars(metrics).items():
        own = inspect.isfunction(found) and found.__module__ == metrics.__name__
        if own and not name.startswith("_") and "Source:" in (found.__doc__ or ""):
            yield name, found


def _said(metric: Callable[..., Any]) -> str:
    text = (inspect.getdoc(metric) or "").partition("\nArgs:")[0].partition("\nRaises:")[0]
    first, _, rest = text.partition("\n")
    return f"{docstrings.escaped(first)}\n\n{docstrings.markdown(rest)}"


def _named(conventions: Mapping[str, metrics.Convention]) -> Iterator[str]:
    for name, convention in conventions.items():
        value = convention(EXAMPLE)
        yield f"| `{name}` | {'-' if value is None else f'{100 * value:.1f}'} |"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"
