"""Test-time adaptation: errors domain by domain, and what becomes of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clbench.errors import UserError
from clbench.plots import style
from clbench.plots.accuracy import banded
from clbench.results import Result
from clbench.statistics import half_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Series = Mapping[str, Sequence[Result]]


@style.styled
def errors(series: Series, title: str = "") -> Figure:
    """The online error in each domain with 95 % intervals over seeds, methods side by side.

    Args:
        series: Complete runs over the same domains, one list for each method.
        title: A line above.

    Raises:
        UserError: No runs, or runs over different domains.
    """
    streams = {tuple(run.online.get("domains", ())) for runs in series.values() for run in runs}
    if len(streams) != 1 or not all(series.values()):
        raise UserError(f"Runs over {len(streams)} different streams of domains can't be compared.")
    (domains,) = streams
    figure = style.new(max(style.WIDTH, 1.6 + 0.45 * len(domains)), 4.2)
    axes = figure.add_subplot()
    for band in range(0, len(domains) + 1, 2):
        axes.axvspan(band - 0.5, band + 0.5, color="#f2f2f2", lw=0, zorder=0)
    handles = []
    for place, runs in enumerate(series.values()):
        mark = style.mark(place)
        values = np.array([_errors(run) for run in runs])
        shift = 0.7 * ((place + 0.5) / len(series) - 0.5)
        mean = 100 * np.append(values.mean(0), values.mean())
        half = _halves(np.column_stack([values, values.mean(1)]))
        where = np.arange(len(domains) + 1) + shift
        low = np.minimum(half, mean)  # an error is not negative
        bars = axes.errorbar(
            where, mean, [low, np.minimum(half, 100 - mean)], fmt=mark.marker, color=mark.colour,
            ms=4, elinewidth=0.8,
        )  # fmt: skip
        handles.append(bars.lines[0])
    names = [*(style.plain(name, 20) for name in domains), "mean"]
    axes.set_xticks(np.arange(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.axvline(len(domains) - 0.5, color="#555555", lw=0.8)
    axes.set_xlim(-0.5, len(domains) + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("online error, %")
    axes.grid(visible=False, axis="x")
    style.titled(axes, title)
    style.legend(figure, handles, list(series), loc="outside right upper")
    return figure


@style.styled
def source(series: Series, title: str = "") -> Figure:
    """Accuracy on the clean source before the stream and after each experience, with bands.

    Args:
        series: Complete runs of one scenario, one list for each method.
        title: A line above.

    Raises:
        UserError: No run has measured it, or streams of different lengths.
    """
    values = {
        name: [run.online["source_accuracy"] for run in runs if run.online.get("source_accuracy")]
        for name, runs in series.items()
    }
    values = {name: found for name, found in values.items() if found}
    lengths = {len(one) for found in values.values() for one in found}
    if len(lengths) != 1:
        raise UserError(f"Streams of lengths {sorted(lengths)} have no source accuracy to draw.")
    figure = style.new()
    axes = figure.add_subplot()
    after = np.arange(lengths.pop())
    handles = [
        banded(axes, after, np.array(found), style.mark(list(series).index(name)))
        for name, found in values.items()
    ]
    axes.set_xlabel("experiences answered")
    axes.set_ylabel("accuracy on the clean source, %")
    style.titled(axes, title)
    style.legend(figure, handles, list(values), loc="outside right upper")
    return figure


def _errors(run: Result) -> list[float]:
    return [np.nan if e is None else float(e) for e in run.online["by_domain"]["error"]]


def _halves(values: Floats) -> Floats:
    """Half widths in percent; 0 for one seed, which has no interval."""
    if len(values) < 2:
        return np.zeros(values.shape[1])
    halves: Floats = 100 * half_width(len(values)) * values.std(0, ddof=1)
    return halves
