"""What a score is bought with: seconds, memory, or learning less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clbench.errors import UserError
from clbench.leaderboard import Board
from clbench.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

TITLES = {
    "average_accuracy": "average accuracy, %",
    "online_error": "online error, %",
    "forgetting": "forgetting, %",
    "learning_accuracy": "accuracy right after learning, %",
    "source_forgetting": "forgetting of the source, %",
    "train_seconds": "training, s",
    "memory_samples": "samples kept",
}
_COSTS = ("train_seconds", "memory_samples")
#: An axis whose largest value is so many times its smallest is logarithmic.
_WIDE = 20


@dataclass(frozen=True)
class Axis:
    """The numbers along one axis.

    Attributes:
        name: Column of the table.
        values: In seconds, samples or percent.
        halves: Half widths of their 95 % intervals, 0 where there is none.
    """

    name: str
    values: Floats
    halves: Floats


@style.styled
def cost(board: Board, title: str = "") -> Figure:
    """The score against seconds of training, with the Pareto front: nobody is better for less.

    Raises:
        UserError: No row has both numbers.
    """
    return _scattered(board, "train_seconds", board.headline, title, front=True)


@style.styled
def memory(board: Board, title: str = "") -> Figure:
    """The score against samples kept, with the Pareto front.

    Raises:
        UserError: No row has both numbers.
    """
    return _scattered(board, "memory_samples", board.headline, title, front=True)


@style.styled
def plasticity(board: Board, title: str = "") -> Figure:
    """Learning against forgetting; of test-time adaptation, its error against the source's loss.

    Raises:
        UserError: No row has both numbers.
    """
    return _scattered(board, *trade(board), title, front=False)


def trade(board: Board) -> tuple[str, str]:
    """What is lost and what is won, as columns."""
    if board.headline == "online_error":
        return "source_forgetting", "online_error"
    return "forgetting", "learning_accuracy"


def on_front(x: Floats, y: Floats, higher: bool) -> NDArray[np.bool_]:
    """Which points no other dominates: at most as much x, at least as good a y, one strictly.

    Args:
        x: Costs.
        y: Scores.
        higher: Whether more of y is better.
    """
    score = y if higher else -y
    cheap, good = x[None] <= x[:, None], score[None] >= score[:, None]
    strictly = (x[None] < x[:, None]) | (score[None] > score[:, None])
    dominated: NDArray[np.bool_] = np.any(cheap & good & strictly, axis=1)
    return ~dominated


def _scattered(board: Board, across: str, up: str, title: str, front: bool) -> Figure:
    rows = board.table[board.table[across].notna() & board.table[up].notna()]
    if rows.empty:
        raise UserError(f"No row of {board.scenario} has both {across} and {up}.")
    x, y = (_axis(rows[name], rows[f"{name}_half_width"]) for name in (across, up))
    figure = style.new(height=max(style.HEIGHT, 0.8 + 0.17 * len(rows)))
    axes = figure.add_subplot()
    filled: NDArray[np.bool_] = np.ones(len(rows), np.bool_)
    if front:
        filled = on_front(x.values, y.values, board.higher)
    points = [
        _point(axes, x, y, i, style.mark(int(place)), filled[i], with_x=not front)
        for i, place in enumerate(rows.index)
    ]
    _scaled(axes, x)
    _limited(axes, y)
    if front:
        _staircase(axes, x.values[filled], y.values[filled])
        height, towards = (0.02, "bottom") if board.higher else (0.98, "top")
        words = axes.text(0.99, height, "filled: none is better for less", size=7)
        words.set(transform=axes.transAxes, ha="right", va=towards)
    axes.set_xlabel(TITLES[across])
    axes.set_ylabel(TITLES[up])
    style.titled(axes, title)
    handles = [point.lines[0] for point in points]
    style.legend(figure, handles, list(rows["strategy"]), loc="outside right upper")
    return figure


def _axis(means: pd.Series, halves: pd.Series) -> Axis:
    name = str(means.name)
    scale = 1 if name in _COSTS else 100
    return Axis(name, scale * means.to_numpy(float), scale * halves.fillna(0).to_numpy(float))


def _point(
    axes: Axes, x: Axis, y: Axis, place: int, mark: style.Mark, filled: np.bool_, with_x: bool
) -> ErrorbarContainer:
    return axes.errorbar(
        x.values[place],
        y.values[place],
        xerr=x.halves[place] if with_x else None,
        yerr=y.halves[place],
        fmt=mark.marker,
        color=mark.colour,
        mfc=mark.colour if filled else "white",
        elinewidth=0.7,
        ms=6,
    )


def _scaled(axes: Axes, x: Axis) -> None:
    """A logarithmic axis where costs need one; with a place for 0 if there is one."""
    positive = x.values[x.values > 0]
    if x.name not in _COSTS or not len(positive) or positive.max() < _WIDE * positive.min():
        return
    if len(positive) < len(x.values):
        axes.set_xscale("symlog", linthresh=float(positive.min()))
    else:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(lambda *_: "")


def _limited(axes: Axes, y: Axis) -> None:
    """Points and what fits of their intervals: one of two seeds would dwarf everything."""
    room = max(5.0, 0.25 * float(np.ptp(y.values)))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, y.values.min() - room), min(high, y.values.max() + room))


def _staircase(axes: Axes, x: Floats, y: Floats) -> None:
    """Through the points of a front."""
    limits = axes.get_xlim()
    order = np.argsort(x, kind="stable")
    across, up = np.append(x[order], limits[1]), np.append(y[order], y[order][-1])
    axes.plot(across, up, drawstyle="steps-post", color="#555555", lw=0.9, ls="--", zorder=1)
    axes.set_xlim(limits)
