"""Trials that train together beside trials one after another and in processes. Not a test.

    python tests/speed/population.py [--trials 8] [--processes 2] [--rounds 3] [--device auto]

K trials of a strategy on random images, each with a learning rate and a seed of its own: whole
runs of the suite, evaluation included, from the start of the first to the end of the last.
Processes have started and imported everything before the clock does. Contenders take turns, in
reverse order in every other round; seconds are on the clock, for processes have theirs elsewhere.
Prints a table, and a line of JSON for each of its rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from turns import ratio

from clbench import machine, protocol
from clbench.conditions import Conditions
from clbench.engines.local import Workers
from clbench.nn.backbones import MLP, Backbone, ConvNet, SlimResNet18
from clbench.population.pool import Population
from clbench.testing import ToyScenario
from strategies.derpp import DERpp
from strategies.replay import Replay

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "mlp": partial(MLP, hidden=(100, 100)),
    "conv": partial(ConvNet, widths=(16, 32)),
    "slim": SlimResNet18,
}
STRATEGIES = {"replay": Replay, "derpp": DERpp}


def trial(case: tuple[str, str], epochs: int, device: Any, number: int) -> float:
    """One whole run; its average accuracy."""
    strategy, backbone = case
    scenario = ToyScenario(
        backbone=BACKBONES[backbone](), epochs=epochs, batch_size=32, memory_size=200, per_class=160
    )
    conditions = Conditions(seed=number, device=device, threads=1 if device == "cpu" else 0)
    method = STRATEGIES[strategy](lr=0.01 * (1 + number % 4))
    return float(protocol.run(scenario, method, conditions).metrics["average_accuracy"] or 0)


def measured(
    contenders: dict[str, Callable[[], Sequence[float]]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each in each round, after one to warm up, and the mean accuracy of its trials."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    accuracy: dict[str, float] = {}
    for index in range(-1, rounds):
        for name in list(contenders) if index % 2 else list(contenders)[::-1]:
            began = time.perf_counter()
            found = list(contenders[name]())
            if index >= 0:
                seconds[name].append(time.perf_counter() - began)
            accuracy[name] = statistics.mean(found)
    return seconds, accuracy


def compared(case: tuple[str, str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each contender."""
    device = machine.choose_device(options.device).type
    work, numbers = partial(trial, case, options.epochs, device), range(options.trials)
    pool = Workers(options.processes) if options.processes > 1 else nullcontext()
    with Population(options.trials) as population, pool as workers:
        contenders: dict[str, Callable[[], Any]] = {
            "one after another": lambda: map(work, numbers),
            "together": lambda: population.map(work, numbers),
        }
        if workers:
            contenders[f"{options.processes} processes"] = lambda: workers.map(work, numbers)
        seconds, accuracy = measured(contenders, options.rounds)
        for name, found in seconds.items():
            yield {
                "strategy": case[0],
                "backbone": case[1],
                "trials": options.trials,
                "contender": name,
                "seconds_per_trial": statistics.median(found) / options.trials,
                "times_throughput": ratio(seconds["one after another"], found),
                "average_accuracy": accuracy[name],
                "shared": population.shared / max(1, population.shared + population.alone),
                "device": device,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--strategies", nargs="+", default=["replay", "derpp"])
    parser.add_argument("--backbones", nargs="+", default=["mlp", "conv"])
    options = parser.parse_args()
    rows = [
        row
        for strategy in options.strategies
        for backbone in options.backbones
        for row in compared((strategy, backbone), options)
    ]
    print("| job | contender | s/trial | x throughput | accuracy |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['strategy']}, {row['backbone']} | {row['contender']} "
            f"| {row['seconds_per_trial']:.3f} | {row['times_throughput']} "
            f"| {row['average_accuracy']:.3f} |"
        )
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
