"""Mean ranks over scenarios, and which of them mean anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clbench.errors import UserError
from clbench.plots import style
from clbench.statistics import critical_difference, mean_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]


@style.styled
def critical_differences(scores: pd.DataFrame, higher: bool = True, title: str = "") -> Figure:
    """A critical-difference diagram: bars join methods whose mean ranks can't be told apart.

    Source: Demšar 2006; see `clbench.statistics.critical_difference`.

    Args:
        scores: One row a scenario, one column a method, no cell missing.
        higher: Whether more is better.
        title: A line above.

    Raises:
        UserError: Fewer than two methods.
    """
    count = scores.shape[1]
    if count < 2 or scores.empty:
        raise UserError(f"{count} methods have no ranks to compare.")
    table = scores.to_numpy(np.float64)
    ranks = mean_ranks(table, higher)
    order = np.argsort(ranks, kind="stable")
    found = critical_difference(table)
    groups = joined(ranks[order], np.inf if found.value is None else found.value)
    half = -(-count // 2)
    figure = style.new(6.8, 1.0 + 0.2 * half + 0.12 * len(groups))
    axes = figure.add_subplot()
    axes.set_axis_off()
    _scale(axes, count)
    top = -0.35 * len(groups) - 0.3
    for level, (first, last) in enumerate(groups):
        ends = ranks[order][[first, last]] + np.array([-0.05, 0.05])
        axes.plot(ends, [-0.35 * (level + 1)] * 2, color="black", lw=3, solid_capstyle="butt")
    for place, method in enumerate(order):
        _method(axes, place, count, ranks[method], str(scores.columns[method]), top)
    words = f"{len(scores)} scenarios; rank 1 is best"
    if found.value is not None:
        words += f"; bars: less than the critical difference {found.value:.2f} apart"
    elif found.reason:
        words += f"; {found.reason}"
    axes.text(0.5, 0.0, words, transform=axes.transAxes, ha="center", va="top", size=7)
    axes.set_ylim(top - half - 0.4, 1.2)
    style.titled(axes, title)
    return figure


def joined(ranks: Floats, difference: float) -> list[tuple[int, int]]:
    """First and last place of each longest run of sorted ranks less than a difference apart."""
    groups: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = int(np.flatnonzero(ranks < ranks[first] + difference)[-1])
        if last > first and not any(a <= first and last <= b for a, b in groups):
            groups.append((first, last))
    return groups


def _scale(axes: Axes, count: int) -> None:
    axes.plot([1, count], [0, 0], color="black", lw=0.8)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [0, 0.15], color="black", lw=0.8)
        axes.text(rank, 0.25, str(rank), ha="center", va="bottom", size=8)


def _method(axes: Axes, place: int, count: int, rank: float, name: str, top: float) -> None:
    """A name at the side with a line up to its mean rank; the better half on the left."""
    half = -(-count // 2)
    left = place < half
    row = place if left else count - 1 - place
    height = top - row - 0.4
    room = 0.04 * count
    edge = 1 - room if left else count + room
    axes.plot([rank, rank, edge], [0, height, height], color="#555555", lw=0.8)
    text = (
        f"{style.plain(name, 26)}  {rank:.2f}" if left else f"{rank:.2f}  {style.plain(name, 26)}"
    )
    side = "right" if left else "left"
    axes.text(edge + (-room if left else room) / 4, height, text, ha=side, va="center", size=8)
