"""Accuracy of runs: over experiences, and experience by experience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clbench.errors import UserError
from clbench.plots import style
from clbench.results import Result
from clbench.statistics import half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Floats = NDArray[np.float64]
Series = Mapping[str, Sequence[Result]]

#: More experiences than this have no number in each cell.
NUMBERED = 10
#: The interval of two seeds is nine deviations wide: a band of it hides everything else.
BANDED = 3
_COLUMNS = 3


@style.styled
def curves(series: Series, title: str = "") -> Figure:
    """Mean accuracy on the experiences met so far, after each; 95 % bands over seeds.

    Args:
        series: Complete runs of one scenario, one list for each line.
        title: A line above.

    Raises:
        UserError: No runs, or runs of different numbers of experiences.
    """
    values = {name: _met(runs) for name, runs in series.items()}
    counts = {v.shape[1] for v in values.values()}
    if len(counts) != 1:
        raise UserError(f"Runs of {sorted(counts)} experiences have no accuracy over them to draw.")
    (count,) = counts
    figure = style.new()
    axes = figure.add_subplot()
    after = np.arange(1, count + 1)
    handles = [banded(axes, after, v, style.mark(i)) for i, v in enumerate(values.values())]
    axes.set_xlabel("experiences learned")
    axes.set_ylabel("accuracy on them, %")
    axes.set_xticks(after if count <= 20 else after[:: -(-count // 10)])
    axes.set_ylim(0, 101)
    style.titled(axes, title)
    style.legend(figure, handles, list(values), loc="outside right upper")
    return figure


@style.styled
def matrices(series: Series, title: str = "") -> Figure:
    """Accuracy on each experience after each: a heat map of the mean over seeds for each line.

    Args:
        series: Complete runs of one scenario, one list for each map; a handful of maps.
        title: A line above.

    Raises:
        UserError: No runs.
    """
    means = {name: _mean_matrix(runs) for name, runs in series.items() if runs}
    if not means:
        raise UserError("No complete run has an accuracy matrix to draw.")
    columns = min(_COLUMNS, len(means))
    rows = -(-len(means) // columns)
    figure = style.new(0.9 + 2.3 * columns, 0.5 + 2.4 * rows)
    figure.set_layout_engine("constrained", h_pad=0.09)
    places = [figure.add_subplot(rows, columns, i + 1) for i in range(len(means))]
    for axes, (name, matrix) in zip(places, means.items(), strict=True):
        image = axes.imshow(100 * matrix, vmin=0, vmax=100, cmap=style.MAP)
        _numbers(axes, matrix)
        axes.set_title(style.plain(name, 30), loc="left", size=8)
        ticks = np.arange(0, len(matrix), -(-len(matrix) // NUMBERED))
        axes.set_xticks(ticks, [str(t + 1) for t in ticks], size=7)
        axes.set_yticks(ticks, [str(t + 1) for t in ticks], size=7)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    figure.supxlabel("accuracy on experience", size=8)
    figure.supylabel("after experience", size=8)
    bar = figure.colorbar(image, ax=places, shrink=0.7)
    bar.set_label("accuracy, %", size=8)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(
            style.plain(title, int(11 * figure.get_figwidth())), size=9, x=0.01, ha="left"
        )
    return figure


def banded(
    axes: Axes, x: Floats | NDArray[np.int_], values: Floats, mark: style.Mark, lowest: float = 0.0
) -> Line2D:
    """A line of means, in percent, with a 95 % band from `BANDED` seeds on; returns the line."""
    mean = 100 * values.mean(0)
    sparse = -(-len(x) // 12)
    (line,) = axes.plot(
        x, mean, color=mark.colour, marker=mark.marker, ls=mark.line, markevery=sparse
    )
    if len(values) >= BANDED:
        half = 100 * half_width(len(values)) * values.std(0, ddof=1)
        low, high = np.clip(mean - half, lowest, 100), np.clip(mean + half, lowest, 100)
        axes.fill_between(x, low, high, color=mark.colour, alpha=0.15, lw=0)
    return line


def _met(runs: Sequence[Result]) -> Floats:
    """[runs, experiences]: after each experience, the mean over those met."""
    if not runs:
        raise UserError("A line needs at least one complete run.")
    rows = [[np.mean(row[: i + 1]) for i, row in enumerate(_matrix(r))] for r in runs]
    if len({len(row) for row in rows}) != 1:
        raise UserError("Runs of different numbers of experiences can't share a line.")
    return np.array(rows, np.float64)


def _matrix(run: Result) -> Floats:
    return np.array(run.accuracy_matrix, np.float64)


def _mean_matrix(runs: Sequence[Result]) -> Floats:
    mean: Floats = np.mean([_matrix(run) for run in runs], axis=0)
    return mean


def _numbers(axes: Axes, matrix: Floats) -> None:
    if len(matrix) > NUMBERED:
        return
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            ink = "black" if value > 0.5 else "white"
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=ink, size=7)
