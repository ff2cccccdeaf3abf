"""Replay on split MNIST: what the suite costs beside a hand-written loop. Not a test.

    python tests/speed/replay_mnist.py DATA_DIR [--avalanche] [--startup]
    python tests/speed/replay_mnist.py DATA_DIR --model slim --images 3000 --threads 2

Every contender learns the same images from the same initial weights, with the same number of
optimizer steps on as many samples, and is scored on the same test images. They take turns in
one process, the order reversed in every other round; a ratio compares two runs of one round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench import machine, protocol
from clbench.classification import Images, class_order
from clbench.nn.backbones import MLP, Backbone, SlimResNet18
from clbench.progress import Silent
from clbench.samples import Samples, Source, TensorSource
from clbench.types import Split, Stream
from scenarios.split_mnist import SplitMNIST
from strategies.replay import Replay

LEARNING_RATE = 0.1
EVALUATE_AT_ONCE = 1000
STEPS_AT_ONCE = 32
BACKBONES: Mapping[str, Callable[[], Backbone]] = {"mlp": MLP, "slim": SlimResNet18}

Labelled = tuple[Tensor, Tensor]


@dataclass(kw_only=True)
class Part(SplitMNIST):
    """Split MNIST with `at_most` training images and a sixth as many to test; 0: all."""

    at_most: int = 0

    def whole(self) -> Images:
        images = super().whole()
        if not self.at_most:
            return images
        train, test = _thinned(images.train, self.at_most), _thinned(images.test, self.at_most // 6)
        return replace(images, train=train, test=test)


def _thinned(source: Source, count: int) -> Source:
    """So many of its samples, evenly spaced."""
    some = torch.linspace(0, len(source) - 1, count).long()
    return TensorSource(source.gather(some), source.targets[some])


@dataclass
class Watch:
    """Seconds of one run: in training, in evaluation, CPU seconds of both, and in all."""

    train: float = 0.0
    evaluate: float = 0.0
    cpu: float = 0.0
    total: float = 0.0
    accuracies: list[float] = field(default_factory=list)

    @contextmanager
    def training(self) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.train += time.perf_counter() - began
        self.cpu += time.process_time() - cpu

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.evaluate += time.perf_counter() - began
        self.cpu += time.process_time() - cpu


Contender = Callable[[Part, Watch], None]
COLUMNS = ("train", "evaluate", "cpu", "total")


class _CPUClock(Silent):
    """CPU seconds from the start of each experience until it is learned and scored."""

    seconds = 0.0

    def start(self, name: str, samples: int) -> None:  # noqa: ARG002
        self.began = time.process_time()

    def finish(self, summary: str) -> None:  # noqa: ARG002
        self.seconds += time.process_time() - self.began


def clbench(scenario: Part, watch: Watch) -> None:
    """The suite, as `python -m clbench` runs it, without a run folder."""
    clock = _CPUClock()
    conditions = protocol.Conditions(
        device="cpu", threads=torch.get_num_threads(), evaluate_batch_size=EVALUATE_AT_ONCE
    )
    result = protocol.run(scenario, Replay(lr=LEARNING_RATE), conditions, progress=clock)
    watch.train = float(result.costs["train_seconds"] or 0)
    watch.evaluate = float(result.costs["evaluate_seconds"] or 0)
    watch.cpu = clock.seconds
    watch.accuracies = [a for a in result.accuracy_matrix[-1] if a is not None]


def plain(scenario: Part, watch: Watch) -> None:
    """A loop written for this job alone: float tensors in memory, no DataLoader."""
    train, test, model = _prepared(scenario)
    size, n_classes = scenario.memory_size, 10 // scenario.n_experiences
    memory_x = torch.empty(size, *train[0][0].shape[1:])
    memory_y = torch.empty(size, dtype=torch.int64)
    seen = 0
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for index, (x, y) in enumerate(train):
        with watch.training():
            model.train()
            for chosen in torch.randperm(len(x)).split(scenario.batch_size):
                batch_x, batch_y = x[chosen], y[chosen]
                inputs, targets = batch_x, batch_y
                if seen:
                    drawn = torch.randperm(min(seen, size))[: scenario.batch_size]
                    inputs = torch.cat((batch_x, memory_x[drawn]))
                    targets = torch.cat((batch_y, memory_y[drawn]))
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                arrival = torch.arange(seen, seen + len(batch_x))
                slots = _reservoir_slots(arrival, size)
                kept = slots < size
                memory_x[slots[kept]], memory_y[slots[kept]] = batch_x[kept], batch_y[kept]
                seen += len(batch_x)
        with watch.evaluating(), torch.no_grad():
            model.eval()
            met = n_classes * (index + 1)
            watch.accuracies = []
            for x, y in test[: index + 1]:
                right = 0
                parts = zip(x.split(EVALUATE_AT_ONCE), y.split(EVALUATE_AT_ONCE), strict=True)
                for some, labels in parts:
                    right += int((model(some)[:, :met].argmax(1) == labels).sum())
                watch.accuracies.append(right / len(y))


def limit(scenario: Part, watch: Watch) -> None:
    """Every trick that keeps the steps: a plan in advance, fused SGD, evaluation in one pass.

    The plan names the samples of every step, replayed ones included, so that a step is a slice
    of one gather for many steps. It needs all past data at hand, which no strategy may have.
    """
    train, test, model = _prepared(scenario)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, fused=True)
    (all_x, all_y), (test_x, test_y) = _joined(train), _joined(test)
    owner = torch.arange(len(test)).repeat_interleave(torch.tensor([len(y) for _, y in test]))
    memory = np.full(scenario.memory_size, -1)
    seen, n_classes = 0, 10 // scenario.n_experiences
    for index, (_, labels) in enumerate(train):
        with watch.training():
            model.train()
            steps = _plan(seen + torch.randperm(len(labels)), memory, seen, scenario)
            for begin in range(0, len(steps), STEPS_AT_ONCE):
                group = steps[begin : begin + STEPS_AT_ONCE]
                sizes, joined = [len(step) for step in group], torch.cat(group)
                xs, ys = all_x.index_select(0, joined), all_y.index_select(0, joined)
                for x, y in zip(xs.split(sizes), ys.split(sizes), strict=True):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
            seen += len(labels)
        with watch.evaluating(), torch.inference_mode():
            model.eval()
            met = owner[owner <= index]
            outputs = torch.cat([model(x) for x in test_x[: len(met)].split(EVALUATE_AT_ONCE)])
            answers = outputs[:, : n_classes * (index + 1)].argmax(1)
            right = torch.bincount(met[answers == test_y[: len(met)]], minlength=index + 1)
            watch.accuracies = (right / torch.bincount(met)).tolist()


def _plan(order: Tensor, memory: Any, seen: int, scenario: Part) -> list[Tensor]:
    """Positions of every step's samples; leaves in `memory` who is stored at the end."""
    size, width = scenario.memory_size, scenario.batch_size
    arriving = order.numpy()
    slots = _reservoir_slots(torch.arange(seen, seen + len(order)), size).numpy()
    random = np.random.default_rng(seen)
    steps = []
    for begin in range(0, len(order), width):
        batch, places = arriving[begin : begin + width], slots[begin : begin + width]
        drawn = random.permutation(min(seen + begin, size))[:width]
        steps.append(torch.from_numpy(np.concatenate((batch, memory[drawn]))))
        kept = places < size
        memory[places[kept]] = batch[kept]
    return steps


def avalanche(scenario: Part, watch: Watch) -> None:
    """Avalanche as its documentation does it: SplitMNIST, Naive, ReplayPlugin, no loggers."""
    from avalanche.benchmarks.classic import SplitMNIST as Peer
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.supervised import Naive

    _, model = _started(scenario)
    stream = Peer(
        n_experiences=scenario.n_experiences,
        fixed_class_order=class_order(10, 0).tolist(),
        dataset_root=scenario.data_dir,
    )
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=scenario.batch_size,
        train_epochs=scenario.epochs,
        eval_mb_size=EVALUATE_AT_ONCE,
        plugins=[ReplayPlugin(mem_size=scenario.memory_size)],
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    )
    for index, experience in enumerate(stream.train_stream):
        with watch.training():
            strategy.train(experience)
        with watch.evaluating():
            scores = strategy.eval(stream.test_stream[: index + 1])
    watch.accuracies = [v for k, v in sorted(scores.items()) if k.startswith("Top1_Acc_Exp")]


def _started(scenario: Part) -> tuple[Stream, nn.Module]:
    """The stream and the initial model of the suite's own run."""
    stream = scenario.stream(Split.EVALUATE, 0)
    with machine.isolated_rng(0, "model"):
        return stream, scenario.model(0, stream)


def _prepared(scenario: Part) -> tuple[list[Labelled], list[Labelled], nn.Module]:
    """Normalised floats and labels, one pair per experience: to learn, to test; the model."""
    stream, model = _started(scenario)

    def tensors(samples: Samples) -> Labelled:
        whole = samples.take(torch.arange(len(samples)))
        return whole.inputs, whole.targets

    train = [tensors(e.train) for e in stream.experiences if e.train is not None]
    return train, [tensors(test) for test in stream.tests], model


def _joined(parts: Sequence[Labelled]) -> Labelled:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _reservoir_slots(arrival: Tensor, size: int) -> Tensor:
    """Where each sample goes, by its place in the stream; nowhere from `size` on. Algorithm R."""
    drawn = (torch.rand(len(arrival), dtype=torch.float64) * (arrival + 1)).long()
    return torch.where(arrival < size, arrival, drawn)


def measure(contender: Contender, scenario: Part) -> Watch:
    """One run, from the files to the last accuracy."""
    watch, began = Watch(), time.perf_counter()
    torch.manual_seed(0)
    contender(scenario, watch)
    watch.total = time.perf_counter() - began
    return watch


def compare(contenders: Sequence[Contender], scenario: Part, rounds: int) -> dict[str, list[Watch]]:
    """All contenders in turns."""
    runs: dict[str, list[Watch]] = {contender.__name__: [] for contender in contenders}
    for index in range(rounds):
        for contender in contenders if index % 2 == 0 else reversed(contenders):
            runs[contender.__name__].append(measure(contender, scenario))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return runs


def summary(runs: Sequence[Watch], reference: Sequence[Watch]) -> dict[str, Any]:
    """Median seconds; median, smallest and largest ratio to the reference, round by round."""
    seconds, ratios = {}, {}
    for name in COLUMNS:
        own, others = ([vars(run)[name] for run in part] for part in (runs, reference))
        seconds[name] = statistics.median(own)
        pairs = [a / b for a, b in zip(own, others, strict=True)]
        ratios[name] = (statistics.median(pairs), min(pairs), max(pairs))
    return {"seconds": seconds, "ratio_to_plain": ratios, "accuracies": runs[-1].accuracies}


def startup(command: Sequence[str], folder: Path, repeats: int) -> list[float]:
    """Seconds from the start of a process to its end, each time."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return taken


#: A user's strategy that ends its process after its first training step.
FIRST_STEP = """
import os
from dataclasses import dataclass
from strategies.replay import Replay

@dataclass(kw_only=True)
class FirstStep(Replay):
    def update(self, loss):
        super().update(loss)
        os._exit(0)
"""
#: The least a script does before the end of its first step on the same data.
PLAIN_STEP = """
import os
import torch
from sklearn.datasets import load_digits
x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
model = torch.nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
torch.nn.functional.cross_entropy(model(x[:32].float()), y[:32]).backward()
optimizer.step()
os._exit(0)
"""


def startups(repeats: int) -> dict[str, list[float]]:
    """Start-up times in turns, the first of each, which warms the file cache, left out."""
    suite = [sys.executable, "-m", "clbench"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("strategies", "conf/strategy"):
            (folder / part).mkdir(parents=True)
        (folder / "strategies" / "first_step.py").write_text(FIRST_STEP)
        target = "_target_: strategies.first_step.FirstStep\n"
        (folder / "conf" / "strategy" / "first_step.yaml").write_text(target)
        options = ["scenario=digits", "strategy=first_step", "progress=false", "force=true"]
        commands = {
            "clbench --help": [*suite, "--help"],
            "clbench, first step on digits": [*suite, *options],
            "plain script, first step on digits": [sys.executable, "-c", PLAIN_STEP],
            "import torch": [sys.executable, "-c", "import torch"],
        }
        rounds = [
            {n: startup(c, folder, 1)[0] for n, c in commands.items()} for _ in range(1 + repeats)
        ]
    return {n: [r[n] for r in rounds[1:]] for n in commands}


def _spread(values: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with MNIST/raw/*-ubyte")
    parser.add_argument("--model", choices=BACKBONES, default="mlp")
    parser.add_argument("--images", type=int, default=0, help="training images; 0: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--avalanche", action="store_true", help="run this peer too")
    parser.add_argument("--startup", action="store_true", help="measure start-up times too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scenario = Part(
        backbone=BACKBONES[options.model](),
        data_dir=options.data,
        tuning_fraction=0.0,
        at_most=options.images,
    )
    contenders: list[Contender] = [clbench, plain, limit]
    if options.avalanche:
        if options.images:
            parser.error("--avalanche goes with all images: its SplitMNIST has no part of them")
        warnings.simplefilter("ignore", DeprecationWarning)
        contenders.append(avalanche)
    for contender in (clbench, plain, limit):  # what PyTorch does once in a process
        measure(contender, replace(scenario, at_most=640))
    runs = compare(contenders, scenario, options.rounds)
    case = {"model": options.model, "images": options.images, "threads": options.threads}
    lines = [{"contender": n, **case, **summary(w, runs["plain"])} for n, w in runs.items()]
    print("| contender | " + " | ".join(f"{c} [s] | x plain" for c in COLUMNS) + " | accuracy |")
    print("|---" * (2 + 2 * len(COLUMNS)) + "|")
    for line in lines:
        cells = [
            f"{line['seconds'][c]:.2f} | {_spread(line['ratio_to_plain'][c])}" for c in COLUMNS
        ]
        accuracy = statistics.mean(line["accuracies"])
        print(f"| {line['contender']} | " + " | ".join(cells) + f" | {accuracy:.3f} |")
    if options.startup:
        print("\n| start-up | seconds |\n|---|---|")
        for name, taken in startups(options.rounds).items():
            print(f"| {name} | {_spread((statistics.median(taken), min(taken), max(taken)))} |")
            lines.append({"startup": name, "seconds": taken})
    print()
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
