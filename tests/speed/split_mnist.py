"""Five methods on split MNIST: what the suite costs beside loops written by hand. Not a test.

    python tests/speed/split_mnist.py DATA_DIR --avalanche
    python tests/speed/split_mnist.py DATA_DIR --avalanche --model slim --images 3000 --threads 2

Every contender learns the same images from the same initial weights, with the same number of
optimizer steps on as many samples, and is scored on the same test images. They take turns in
one process, the order reversed in every other round; a ratio compares two runs of one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import peers
import torch
from turns import in_turns, spread
from watch import EVALUATE_AT_ONCE, LEARNING_RATE, Job, Watch

from clbench import machine, protocol
from clbench.conditions import Conditions
from clbench.nn.backbones import MLP, Backbone, SlimResNet18
from clbench.progress import Silent
from clbench.training import Trainer
from clbench.types import Experience
from scenarios.split_mnist import SplitMNIST
from strategies.derpp import DERpp
from strategies.ewc import EWC
from strategies.lwf import LwF
from strategies.refresh import Refresh
from strategies.replay import Replay

BACKBONES: Mapping[str, Callable[[], Backbone]] = {"mlp": MLP, "slim": SlimResNet18}
#: The suite's options, equal to what the loops by hand and Avalanche do.
STRATEGIES: Mapping[str, Callable[[], Trainer]] = {
    "replay": partial(Replay, lr=LEARNING_RATE),
    "derpp": partial(DERpp, lr=LEARNING_RATE),
    "ewc": partial(EWC, lr=LEARNING_RATE, ewc_lambda=by_hand.EWC.ewc_lambda, fisher="batch"),
    "lwf": partial(LwF, lr=LEARNING_RATE, cross_entropy_over="all"),
    "refresh": lambda: Refresh(base=DERpp(lr=LEARNING_RATE)),
}
BY_HAND: Mapping[str, by_hand.Method] = {
    "replay": by_hand.Replay,
    "derpp": by_hand.DERpp,
    "ewc": by_hand.EWC,
    "lwf": by_hand.LwF,
    "refresh": by_hand.Refresh,
}
COLUMNS = ("train", "evaluate", "train_cpu", "evaluate_cpu", "total")

Contender = Callable[[Job, Watch], None]


class _CPUClock(Silent):
    """CPU seconds from the start of each experience until it is learned and scored."""

    seconds = 0.0

    def start(self, name: str, samples: int) -> None:  # noqa: ARG002
        self.began = time.process_time()

    def finish(self, summary: str) -> None:  # noqa: ARG002
        self.seconds += time.process_time() - self.began


def clbench(strategy: Callable[[], Trainer], job: Job, watch: Watch) -> None:
    """The suite, as `python -m clbench` runs it, without a run folder."""
    made = strategy()
    kind: type[Any] = type(made)

    def learn(self: Any, experience: Experience) -> None:
        began = time.process_time()
        kind.learn(self, experience)
        watch.train_cpu += time.process_time() - began

    made.__class__ = type(kind.__name__, (kind,), {"learn": learn})
    clock = _CPUClock()
    threads = torch.get_num_threads()
    conditions = Conditions(device="cpu", threads=threads, evaluate_batch_size=EVALUATE_AT_ONCE)
    result = protocol.run(job.scenario, made, conditions, progress=clock)
    watch.train = float(result.costs["train_seconds"] or 0)
    watch.evaluate = float(result.costs["evaluate_seconds"] or 0)
    watch.evaluate_cpu = clock.seconds - watch.train_cpu
    watch.accuracies = [a for a in result.accuracy_matrix[-1] if a is not None]


def thinned(data: Path, into: Path, images: int) -> Path:
    """MNIST's files with so many training images and a sixth as many to test, evenly spaced."""
    raw = into / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", images), ("t10k", images // 6)):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            name = f"{part}-{kind}-ubyte"
            content = (data / "MNIST" / "raw" / name).read_bytes()
            total = int.from_bytes(content[4:8], "big")
            rows = np.frombuffer(content, np.uint8, offset=header).reshape(total, -1)
            some = rows[np.linspace(0, total - 1, count).astype(int)]
            counted = content[:4] + count.to_bytes(4, "big") + content[8:header]
            (raw / name).write_bytes(counted + some.tobytes())
    return into


def measure(contender: Contender, job: Job) -> Watch:
    """One run, from the files to the last accuracy."""
    watch, began = Watch(), time.perf_counter()
    torch.manual_seed(0)
    contender(job, watch)
    watch.total = time.perf_counter() - began
    return watch


def compare(contenders: Mapping[str, Contender], job: Job, rounds: int) -> dict[str, list[Watch]]:
    """All contenders in turns."""
    return in_turns({n: partial(measure, c, job) for n, c in contenders.items()}, rounds)


def summary(runs: Sequence[Watch], reference: Sequence[Watch]) -> dict[str, Any]:
    """Median seconds; median, smallest and largest ratio to the reference, round by round."""
    seconds, ratios = {}, {}
    for name in COLUMNS:
        own, others = ([vars(run)[name] for run in part] for part in (runs, reference))
        seconds[name] = statistics.median(own)
        ratios[name] = spread(own, others)
    return {"seconds": seconds, "ratio_to_plain": ratios, "accuracies": runs[-1].accuracies}


def contenders(name: str, *, avalanche: bool) -> dict[str, Contender]:
    """Those of one method."""
    found: dict[str, Contender] = {
        "clbench": partial(clbench, STRATEGIES[name]),
        "plain": partial(by_hand.plain, BY_HAND[name]),
    }
    if name == "replay":
        found["limit"] = by_hand.limit
    if avalanche and name in peers.MAKERS:
        found["avalanche"] = partial(peers.avalanche, peers.MAKERS[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with MNIST/raw/*-ubyte")
    parser.add_argument("--methods", default=",".join(STRATEGIES))
    parser.add_argument("--model", choices=BACKBONES, default="mlp")
    parser.add_argument("--images", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--avalanche", action="store_true", help="run this peer too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        data = options.data
        if options.images:
            data = thinned(options.data, folders[0], options.images)
        scenario = SplitMNIST(
            backbone=BACKBONES[options.model](), data_dir=data, tuning_fraction=0.0
        )
        few = thinned(options.data, folders[1], 600)
        lines = []
        for name in options.methods.split(","):
            found = contenders(name, avalanche=options.avalanche)
            for contender in found.values():  # what PyTorch does once in a process
                measure(contender, Job(replace(scenario, data_dir=few)))
            runs = compare(found, Job(scenario), options.rounds)
            case = {"method": name, "model": options.model, "threads": options.threads}
            lines += [
                {**case, "contender": n, **summary(watches, runs["plain"])}
                for n, watches in runs.items()
            ]
    show(lines)


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """A table, and a JSON line for each of its rows."""
    titles = " | ".join(f"{c.replace('_', ' ')} [s] | x plain" for c in COLUMNS)
    print(f"| method | contender | {titles} | accuracy |")
    print("|---" * (3 + 2 * len(COLUMNS)) + "|")
    for line in lines:
        cells = [
            "{:.2f} | {:.2f} ({:.2f} to {:.2f})".format(
                line["seconds"][c], *line["ratio_to_plain"][c]
            )
            for c in COLUMNS
        ]
        accuracy = statistics.mean(line["accuracies"])
        row = [line["method"], line["contender"], *cells, f"{accuracy:.3f}"]
        print("| " + " | ".join(row) + " |")
    peak = machine.peak_memory(torch.device("cpu")) / 2**20
    print(f"\nPeak memory of this process, all contenders': {peak:.0f} MiB.\n")
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
