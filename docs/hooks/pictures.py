"""The pictures of the documentation: the suite's own plots of runs that the build makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from clbench import run
from clbench.plots import accuracy, domains, style
from clbench.results import Result
from clbench.testing import ToyDrift

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEEDS = (0, 1, 2)
_TOY = "a toy that drifts"


def files() -> Mapping[str, Callable[[], bytes]]:
    """What makes each picture, by the path that pages name."""
    plots: dict[str, Callable[[], Figure]] = {
        "matrices": lambda: accuracy.matrices(_digits(), "digits, 5 epochs"),
        "curves": lambda: accuracy.curves(_digits(), "digits, 5 epochs"),
        "errors": lambda: domains.errors(_drift("source", "bn_adapt", "tent"), _TOY),
        "source": lambda: domains.source(_hurried(), _TOY),
    }
    return {f"pictures/{name}.svg": partial(_drawn, plot) for name, plot in plots.items()}


def _drawn(plot: Callable[[], Figure]) -> bytes:
    return style.rendered(plot(), "svg")


@cache
def _digits() -> Mapping[str, Sequence[Result]]:
    few = "scenario.epochs=5"
    names = ("finetune", "replay", "derpp")
    return {name: [run("digits", name, seed, few, threads=1) for seed in _SEEDS] for name in names}


def _drift(*names: str) -> Mapping[str, Sequence[Result]]:
    return {name: [run(ToyDrift(), name, seed, threads=1) for seed in _SEEDS] for name in names}


def _hurried() -> Mapping[str, Sequence[Result]]:
    """A method with the learning rate of its YAML, and with one that is too large."""
    large = [run(ToyDrift(), "tent", seed, "strategy.lr=0.1", threads=1) for seed in _SEEDS]
    return {**_drift("tent"), "tent, lr 0.1": large}
