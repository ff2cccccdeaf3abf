"""Searches for hyper-parameters: every trial, and which hyper-parameters mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clbench.errors import UserError
from clbench.plots import style
from clbench.search import Outcome, Space, Values, importances
from clbench.study import Study, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

#: Fewer complete trials say nothing about importance.
ENOUGH = 10


@style.styled
def importance(study: Study) -> Figure:
    """How much of the scores' variance each hyper-parameter explains, by Optuna's fANOVA.

    Source: Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance".

    Raises:
        UserError: Too few trials, or nothing was searched.
    """
    complete = [trial for trial in study.trials if trial.mean is not None]
    if len(complete) < ENOUGH or not study.space:
        raise UserError(
            f"{len(complete)} complete trials of {study.name} do not tell what mattered: it takes "
            f"{ENOUGH}, and a search space."
        )
    outcomes = [Outcome(t.values, t.scores, t.state) for t in complete]
    found = importances(Space(_node(study.space)), outcomes)
    figure = style.new(5.2, 0.9 + 0.28 * len(found))
    axes = figure.add_subplot()
    rows = np.arange(len(found))
    axes.barh(rows, [100 * v for v in found.values()], 0.6, color=style.COLOURS[0])
    axes.set_yticks(rows, [style.plain(name) for name in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 108)
    for row, value in enumerate(found.values()):
        axes.text(100 * value + 1, row, f"{100 * value:.0f}", va="center")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("share of the scores' variance, %")
    style.titled(axes, f"{study.name}: {len(complete)} complete trials")
    return figure


@style.styled
def trials(study: Study) -> Figure:
    """Parallel coordinates: a line a trial, the chosen one on top, those that failed dotted.

    Raises:
        UserError: There are none, or nothing was searched.
    """
    if not (study.trials and study.space):
        raise UserError(f"{study.name} has no trials with values to draw.")
    names = list(study.space)
    scales = [
        _Scale(name, study.space[name], [t.values[name] for t in study.trials]) for name in names
    ]
    figure = style.new(max(style.WIDTH, 1.4 + 1.2 * len(scales)), 3.6)
    axes = figure.add_subplot()
    scores = [t.mean for t in study.trials if t.mean is not None]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    chosen = max((t for t in study.trials if t.mean is not None), key=_mean, default=None)
    for trial in study.trials:
        heights = [
            scale.place(trial.values[name]) for scale, name in zip(scales, names, strict=True)
        ]
        _line(axes, trial, heights, low, high, trial is chosen)
    for place, scale in enumerate(scales):
        scale.label(axes, place)
    _scores(axes, len(scales), low, high, study.metric)
    _bare(axes, len(scales))
    failed = sum(t.state == "failed" for t in study.trials)
    pruned = sum(t.state == "pruned" for t in study.trials)
    words = f"{study.name}: {len(study.trials)} trials, {failed} failed, {pruned} pruned"
    style.titled(axes, words)
    return figure


class _Scale:
    """One vertical axis: where values of a hyper-parameter lie between 0 and 1."""

    def __init__(self, name: str, text: str, values: Sequence[Any]) -> None:
        self.name = name
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        self.choices = [] if numbers else sorted({str(v) for v in values})
        self.log = numbers and "log" in text and min(values) > 0
        if numbers:
            self.low, self.high = self._moved(min(values)), self._moved(max(values))

    def place(self, value: Any) -> float:
        if self.choices:
            return (self.choices.index(str(value)) + 0.5) / len(self.choices)
        width = self.high - self.low
        return (self._moved(value) - self.low) / width if width else 0.5

    def label(self, axes: Axes, place: int) -> None:
        axes.plot([place, place], [0, 1], color="#555555", lw=0.8, zorder=0)
        title = f"{style.plain(self.name, 18)}{' (log)' if self.log else ''}"
        axes.text(place, -0.09, title, ha="center", va="top", size=8)
        if self.choices:
            ticks = {self.place(c): style.plain(c, 14) for c in self.choices}
        else:
            ends = {0.0: self.low, 1.0: self.high}
            ticks = {h: f"{10**v if self.log else v:.3g}" for h, v in ends.items()}
        for height, words in ticks.items():
            text = axes.text(place + 0.03, height, words, va="center", size=7, zorder=5)
            text.set_bbox({"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.8})

    def _moved(self, value: float) -> float:
        return float(np.log10(value)) if self.log else float(value)


def _line(
    axes: Axes, trial: Trial, heights: list[float], low: float, high: float, chosen: bool
) -> None:
    import matplotlib

    if trial.mean is None:
        axes.plot(heights, color="#999999", lw=0.8, ls=":", marker="x", ms=3, zorder=1)
        return
    height = (trial.mean - low) / (high - low) if high > low else 0.5
    # The lightest end of the map vanishes on white.
    colour = "black" if chosen else matplotlib.colormaps[style.MAP](0.9 * (1 - height))
    width, marker = (2.4, "o") if chosen else (0.9, "")
    axes.plot([*heights, height], color=colour, lw=width, marker=marker, zorder=2 + height)


def _scores(axes: Axes, place: int, low: float, high: float, metric: str) -> None:
    axes.plot([place, place], [0, 1], color="#555555", lw=0.8, zorder=0)
    sign = -1 if metric.startswith("-") else 1
    words = metric.removeprefix("-").replace("_", " ")
    axes.text(place, -0.09, f"{style.plain(words, 24)}, %", ha="center", va="top", size=8)
    for height, value in {0.0: low, 1.0: high}.items():
        axes.text(place + 0.04, height, f"{sign * 100 * value:.1f}", va="center", size=7)


def _bare(axes: Axes, last: int) -> None:
    """No frame: every hyper-parameter has its own axis."""
    axes.set_xlim(-0.3, last + 0.4)
    axes.set_ylim(-0.2, 1.05)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])


def _mean(trial: Trial) -> float:
    return trial.mean if trial.mean is not None else -np.inf


def _node(space: Mapping[str, str]) -> dict[str, Any]:
    """A configuration in which these names are options, to read their sweeps from."""
    node: dict[str, Any] = {}
    for name in space:
        here: Values = node
        *parents, last = name.split(".")
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = None
    return {**node, "search": dict(space)}
