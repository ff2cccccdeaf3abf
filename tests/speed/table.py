"""All comparisons with loops by hand: one table, and a JSON line for each case. Not a test.

    python tests/speed/table.py DATA_DIR [--rounds 5] [--only replay,mos] [--avalanche]

DATA_DIR has MNIST/raw. The cases are those of split_mnist.py, vit_by_loops.py, adaptation.py,
teachers.py, instructions.py and startup.py, which say what the contenders do. They take turns in
one process, one thread, the order reversed in every other round, after one pass to warm up; a
ratio compares CPU seconds of two runs of one round (start-up: seconds on the clock). Peak memory
is that of a process of its own for each contender, with everything that it imports; cases import
what they need.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import split_mnist
import torch
from turns import Pass, clocked, in_turns, spread
from watch import Job

from clbench import machine
from scenarios.split_mnist import SplitMNIST

BASE = "by hand"
CPU = torch.device("cpu")
#: Training images of split MNIST.
IMAGES = {"mlp": 12_000, "slim": 750}


@dataclass(frozen=True)
class Spent:
    """What one run took.

    Attributes:
        seconds: By part of the job.
        outcome: Its accuracy, or a function that finds it out; anything else: there is none.
    """

    seconds: Mapping[str, float]
    outcome: object


@dataclass(frozen=True)
class Contender:
    """One side.

    Attributes:
        warm: What a process does once before.
        run: The job.
    """

    warm: Callable[[], object]
    run: Callable[[], Spent]


Contenders = Mapping[str, Contender]


@dataclass(frozen=True)
class Options:
    """Of this command.

    Attributes:
        data: Folder with MNIST/raw.
        avalanche: Run this peer too.
        stack: Keeps folders until the end.
    """

    data: Path
    avalanche: bool
    stack: ExitStack


@dataclass(frozen=True)
class Case:
    """A job.

    Attributes:
        make: Its contenders, one of them `BASE`.
        targets: The ratio that the suite should not exceed, by part.
    """

    make: Callable[[Options], Contenders]
    targets: Mapping[str, float]


def incremental(method: str, model: str, options: Options) -> Contenders:
    """Split MNIST, as in split_mnist.py."""

    def thinned(images: int) -> Path:
        folder = Path(options.stack.enter_context(tempfile.TemporaryDirectory()))
        return split_mnist.thinned(options.data, folder, images)

    scenario = SplitMNIST(
        backbone=split_mnist.BACKBONES[model](),
        data_dir=thinned(IMAGES[model]),
        tuning_fraction=0.0,
    )
    few = replace(scenario, data_dir=thinned(600))

    def run(contender: split_mnist.Contender) -> Spent:
        watch = split_mnist.measure(contender, Job(scenario))
        seconds = {"training": watch.train_cpu, "evaluation": watch.evaluate_cpu}
        return Spent(seconds, statistics.mean(watch.accuracies))

    found = split_mnist.contenders(method, avalanche=options.avalanche)
    return {
        BASE if name == "plain" else name: Contender(
            partial(split_mnist.measure, contender, Job(few)), partial(run, contender)
        )
        for name, contender in found.items()
    }


def passes(part: str, sides: Mapping[str, Pass]) -> Contenders:
    """Contenders that are one part, and warm up by one whole pass."""

    def run(side: Pass) -> Spent:
        seconds, outcome = clocked(side)
        return Spent({part: seconds}, outcome)

    return {name: Contender(side, partial(run, side)) for name, side in sides.items()}


def transformer(method: str, options: Options) -> Contenders:  # noqa: ARG001
    import vit_by_loops

    task = vit_by_loops.Task(method, epochs=4, images=20)
    return passes("training", task.contenders())


def tent(options: Options) -> Contenders:  # noqa: ARG001
    import adaptation

    images, labels = adaptation.random_images(600)
    method, by_hand = adaptation.JOBS["tent"]
    sides = {
        "clbench": adaptation.suite(method, images, labels, 200),
        BASE: by_hand(images, labels, 200, adaptation.LAST),
    }
    return passes("adaptation", sides)


def cotta(title: str, count: int, options: Options) -> Contenders:  # noqa: ARG001
    import adaptation
    import teachers

    images, labels = adaptation.random_images(count)
    least, size = teachers.THRESHOLDS[title], count // 2
    sides = {
        "clbench": adaptation.suite(teachers.METHODS[title], images, labels, size),
        BASE: teachers.cotta_steps(least, images, labels, size),
    }
    return passes("adaptation", sides)


def llama(answering: bool, options: Options) -> Contenders:  # noqa: ARG001
    import instructions

    job = instructions.Job(200)
    if answering:
        return passes("answering", {"clbench": job.suite_answers(), BASE: job.generated()})
    return passes("training", {"clbench": job.suite(), BASE: job.by_hand(grouped=True)})


#: What the suite may take, as a multiple of the loop by hand.
_TARGETS = {
    "mlp": {"training": 1.05},
    "slim": {"training": 0.95, "evaluation": 0.70},
}
CASES: Mapping[str, Case] = {
    **{
        f"{method}/{model}": Case(partial(incremental, method, model), _TARGETS[model])
        for model in split_mnist.BACKBONES
        for method in split_mnist.STRATEGIES
    },
    "mos/vit": Case(partial(transformer, "mos"), {"training": 1.10}),
    "l2p/vit": Case(partial(transformer, "l2p"), {"training": 1.10}),
    "tent/resnet20": Case(tent, {"adaptation": 1.10}),
    "cotta/resnet20": Case(partial(cotta, "cotta, sure: no views", 400), {"adaptation": 1.10}),
    "cotta/resnet20/views": Case(
        partial(cotta, "cotta, unsure: 32 views", 60), {"adaptation": 1.10}
    ),
    "instructions/llama": Case(partial(llama, False), {"training": 1.10}),
    "answers/llama": Case(partial(llama, True), {"answering": 1.10}),
}
STARTUP = "start-up"


def accuracy(outcome: object) -> float | None:
    """Of a run, where it has one."""
    found = outcome() if callable(outcome) else outcome
    return found if isinstance(found, float) else None


def measured(name: str, options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """A case: seconds, ratios, accuracy and memory of every contender."""
    case = CASES[name]
    sides = case.make(Options(options.data, options.avalanche, stack))
    for side in sides.values():
        side.warm()
    runs = in_turns({n: side.run for n, side in sides.items()}, options.rounds)
    found: dict[str, Any] = {}
    for mine, spent in runs.items():
        found[mine] = {
            "accuracy": accuracy(spent[-1].outcome),
            "peak_mib": None if options.no_memory else alone(name, mine, options),
        }
        for part in spent[0].seconds:
            seconds = [run.seconds[part] for run in spent]
            ratio = spread(seconds, [run.seconds[part] for run in runs[BASE]])
            found[mine][part] = {"cpu_seconds": seconds, "ratio": ratio}
    return {"case": name, "targets": case.targets, "contenders": found}


def alone(name: str, side: str, options: argparse.Namespace) -> float:
    """Peak MiB of a process that runs one contender once."""
    command = [sys.executable, __file__, str(options.data), "--alone", name, side]
    command += ["--avalanche"] if options.avalanche else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def started(rounds: int) -> dict[str, Any]:
    """The case of `startup.py`; its loop by hand is the plain script."""
    import startup

    found = startup.measure(rounds)
    base = found["plain script, first step on digits"]
    nothing = {"accuracy": None, "peak_mib": None}
    contenders = {
        name: {**nothing, "start": {"seconds": seconds, "ratio": spread(seconds, base)}}
        for name, seconds in found.items()
    }
    return {"case": STARTUP, "targets": {}, "contenders": contenders}


def rows(case: Mapping[str, Any]) -> list[str]:
    """Lines of the table."""
    lines = []
    for name, mine in case["contenders"].items():
        for part in [p for p in mine if p not in ("accuracy", "peak_mib")]:
            seconds = statistics.median(next(iter(mine[part].values())))
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*mine[part]["ratio"])
            target = case["targets"].get(part, "") if name == "clbench" else ""
            right = "" if mine["accuracy"] is None else f"{mine['accuracy']:.3f}"
            peak = "" if mine["peak_mib"] is None else f"{mine['peak_mib']:,.0f}"
            cells = [case["case"], part, name, f"{seconds:.2f}", ratio, target, right, peak]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def chosen(only: str) -> list[str]:
    """Cases whose names begin with one of these words."""
    words = tuple(only.split(",")) if only else ("",)
    return [name for name in (*CASES, STARTUP) if name.startswith(words)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with MNIST/raw/*-ubyte")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="how the names of cases begin, by comma")
    parser.add_argument("--avalanche", action="store_true", help="run this peer where it can")
    parser.add_argument("--no-memory", action="store_true", help="no process for each contender")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if options.alone:
            name, side = options.alone
            CASES[name].make(Options(options.data, options.avalanche, stack))[side].run()
            print(machine.peak_memory(CPU) / 2**20)
            return
        cases = []
        for name in chosen(options.only):
            case = started(options.rounds) if name == STARTUP else measured(name, options, stack)
            case["environment"] = dict(machine.environment(CPU, 1))
            print(json.dumps(case), flush=True)
            cases.append(case)
    print("\n| job | part | contender | seconds | x by hand | target | accuracy | peak MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        print("\n".join(rows(case)))


if __name__ == "__main__":
    main()
