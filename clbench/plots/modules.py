"""How far each module of a model moves: within an experience, and across a switch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clbench.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS = {
    "convolution": "#0072b2",
    "linear": "#d55e00",
    "norm": "#009e73",
    "statistics": "#cc79a7",
    "other": "#555555",
}


def sensitivity(runs: Sequence[Sequence[Mapping[str, Any]]], title: str = "") -> Figure:
    """How far each module moves within an experience and across a switch, in the model's order.

    A line leads from the mean change within (hollow) to the mean change across (filled), on a
    logarithmic axis; the number is their quotient, the score. Names of modules that were
    fine-tuned at least once are bold. A change of 0 has no place on the axis.

    Args:
        runs: `strategy_facts["sensitivity"]` of runs of one model; means are over them too.
        title: A line above.

    Returns:
        The figure, a fifth of an inch for each module.

    Raises:
        UserError: No runs, or runs of different models.
    """
    from matplotlib.figure import Figure

    if not (runs and runs[0]):
        raise UserError("No run has measured the sensitivity of its modules.")
    modules = [[(m["name"], m["kind"]) for m in run] for run in runs]
    if any(found != modules[0] for found in modules):
        raise UserError("Runs with different modules can't share a figure of sensitivity.")
    count = len(modules[0])
    within, across = (_change(runs, key) for key in ("within", "across"))
    figure = Figure(figsize=(8, 1.4 + 0.2 * count), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(count)
    for row, (_, kind) in enumerate(modules[0]):
        colour = _COLOURS[kind]
        axes.plot([within[row], across[row]], [row, row], color=colour, lw=1.5)
        axes.plot(within[row], row, "o", ms=5, mfc="white", mec=colour)
        axes.plot(across[row], row, "o", ms=5, color=colour)
        if np.isfinite(across[row] / within[row]):
            text = f"{across[row] / within[row]:.3g}"
            axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), size=7, va="center")
    axes.text(1.01, -1, "score", transform=axes.get_yaxis_transform(), size=7, va="center")
    axes.set_xscale("log")
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(rows, [name for name, _ in modules[0]], size=7, family="monospace")
    for label, facts in zip(axes.get_yticklabels(), zip(*runs, strict=True), strict=True):
        label.set_fontweight("bold" if any(m.get("finetuned") for m in facts) else "normal")
    axes.set_xlabel("mean absolute change: within an experience (hollow), across a switch", size=8)
    axes.grid(axis="x", lw=0.3)
    axes.set_axisbelow(True)
    for kind in dict.fromkeys(kind for _, kind in modules[0]):
        axes.plot([], [], "o", color=_COLOURS[kind], label=kind)
    figure.legend(loc="outside upper center", ncols=len(_COLOURS), fontsize=8, frameon=False)
    axes.set_title(title, size=8, parse_math=False)
    return figure


def _change(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> npt.NDArray[np.float64]:
    """The mean over experiences, then over runs, for each module; NaN: not known, or 0."""
    means = []
    for run in runs:
        known = [[x for x in module[key] if x is not None] for module in run]
        means.append([float(np.mean(values)) if values else np.nan for values in known])
    change = np.mean(means, axis=0)
    return np.where(change > 0, change, np.nan)
