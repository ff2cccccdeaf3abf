"""Contenders that take turns: what a busy machine costs one of them, it costs the others too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Pass = Callable[[], object]


def compare(contenders: Mapping[str, Pass], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contender in each round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(-1, rounds):
        for name in list(contenders) if index % 2 else list(contenders)[::-1]:
            began = time.process_time()
            contenders[name]()
            if index >= 0:
                seconds[name].append(time.process_time() - began)
    return seconds


def ratio(mine: Sequence[float], base: Sequence[float]) -> str:
    """Median and range of the rounds' ratios."""
    found = [a / b for a, b in zip(mine, base, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def show(
    title: str, seconds: Mapping[str, Sequence[float]], floor: str, count: int, unit: str = "sample"
) -> None:
    """Prints a table: milliseconds of each of `count` units, and times the floor."""
    print(f"\n| {title} | CPU ms/{unit} | x by hand |\n|---|---|---|")
    for name, found in seconds.items():
        each = 1000 * statistics.median(found) / count
        print(f"| {name} | {each:.3f} | {ratio(found, seconds[floor])} |")
