"""Contenders that take turns: what a busy machine costs one of them, it costs the others too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

Pass = Callable[[], object]
T = TypeVar("T")


def in_turns(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each contender returns in each round, the order reversed in every other one."""
    found: dict[str, list[T]] = {name: [] for name in contenders}
    for index in range(rounds):
        for name in list(contenders)[:: -1 if index % 2 else 1]:
            found[name].append(contenders[name]())
    return found


def clocked(contender: Pass) -> tuple[float, object]:
    """CPU seconds that it takes, and what it returns."""
    began = time.process_time()
    found = contender()
    return time.process_time() - began, found


def compare(contenders: Mapping[str, Pass], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contender in each round, after one to warm up."""
    passes = in_turns({n: partial(clocked, c) for n, c in contenders.items()}, 1 + rounds)
    return {name: [seconds for seconds, _ in found[1:]] for name, found in passes.items()}


def spread(mine: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Of the rounds' ratios the median, the smallest and the largest."""
    found = [a / b for a, b in zip(mine, base, strict=True)]
    return statistics.median(found), min(found), max(found)


def ratio(mine: Sequence[float], base: Sequence[float]) -> str:
    """Median and range of the rounds' ratios."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*spread(mine, base))


def show(
    title: str, seconds: Mapping[str, Sequence[float]], floor: str, count: int, unit: str = "sample"
) -> None:
    """Prints a table: milliseconds of each of `count` units, and times the floor."""
    print(f"\n| {title} | CPU ms/{unit} | x by hand |\n|---|---|---|")
    for name, found in seconds.items():
        each = 1000 * statistics.median(found) / count
        print(f"| {name} | {each:.3f} | {ratio(found, seconds[floor])} |")
