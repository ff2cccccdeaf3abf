"""Where the time of a replay step goes, in the suite and in the loop by hand: a picture. No test.

    python tests/speed/where_time_goes.py DATA_DIR [--rounds 3] [--images 12000] [--picture FILE]

Split MNIST, MLP, as in split_mnist.py. Clocks of processor time start and stop where a part of a
step begins and ends, an inner part stops the outer one's, and what has no clock of its own is
"the rest": a profiler would charge its own cost to what is called often. The cost of the clocks is
measured by the same runs without them, in turns, and told.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import by_hand
import split_mnist
import torch
from torch import Tensor
from torch.nn import functional
from turns import in_turns
from watch import Job, Watch

from clbench.nn.heads import Classifier
from clbench.nn.memory import Memory
from clbench.nn.transforms import ImageTransform
from clbench.samples import Samples
from clbench.training import GradientStrategy, Trainer
from scenarios.split_mnist import SplitMNIST

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "assets" / "replay_profile.png"
REST = "the rest: loop, counting"
PARTS = (
    "forward pass and loss",
    "backward pass",
    "optimizer",
    "memory: draw",
    "memory: write",
    "join old and new",
    "gather batches",
    "normalise",
    REST,
)


FORWARD, BACKWARD, OPTIMIZER, DRAW, WRITE, JOIN, GATHER, NORMALISE, _ = PARTS
#: What both sides call, or one of them, and the part of a step that it is.
SEAMS: Sequence[tuple[Any, str, str]] = (
    (Classifier, "forward", FORWARD),
    (GradientStrategy, "forward", FORWARD),
    (functional, "cross_entropy", FORWARD),
    (Tensor, "backward", BACKWARD),
    (torch.optim.SGD, "zero_grad", OPTIMIZER),
    (torch.optim.SGD, "step", OPTIMIZER),
    (GradientStrategy, "descend", OPTIMIZER),
    (Memory, "draw", DRAW),
    (by_hand.Reservoir, "draw", DRAW),
    (Memory, "add", WRITE),
    (by_hand.Reservoir, "add", WRITE),
    (torch, "cat", JOIN),
    (by_hand, "gathered", GATHER),
    (ImageTransform, "test", NORMALISE),
)


class Clock:
    """Seconds by part within training, each moment counted once, for the innermost part."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        self._turn()
        self._open.append(part)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted where training is under way."""

        @wraps(function)  # attributes too: by one of them torch knows its optimizers
        def clocked(*arguments: Any, **options: Any) -> Any:
            if not self._open:
                return function(*arguments, **options)
            self._turn()
            self._open.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._turn()
                self._open.pop()

        return clocked

    def over(self, part: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
        """What makes an iterator, the way to each of its items counted."""

        def clocked(*arguments: Any, **options: Any) -> Iterator[Any]:
            step = partial(next, function(*arguments, **options), None)
            return iter(self.around(part, step), None)

        return clocked

    def _turn(self) -> None:
        now = time.process_time()
        if self._open:
            self.spent[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Clocks at all seams."""
        fit, training = Trainer.fit, Watch.training

        def counted_fit(strategy: Trainer, *arguments: Any) -> None:
            with self.counting(REST):
                fit(strategy, *arguments)

        @contextmanager
        def counted_training(watch: Watch) -> Iterator[None]:
            with training(watch), self.counting(REST):
                yield

        with ExitStack() as stack:
            for owner, name, part in SEAMS:
                around = self.around(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, around))
            batches = self.over(GATHER, Samples.batches)
            stack.enter_context(patch.object(Samples, "batches", batches))
            stack.enter_context(patch.object(Trainer, "fit", counted_fit))
            stack.enter_context(patch.object(Watch, "training", counted_training))
            yield


def clocked(contender: split_mnist.Contender, job: Job) -> Mapping[str, float]:
    """Seconds of one run by part."""
    clock = Clock()
    with clock.everywhere():
        split_mnist.measure(contender, job)
    return clock.spent


def whole(contender: split_mnist.Contender, job: Job) -> Mapping[str, float]:
    """Seconds of training, nothing clocked within."""
    return {"all": split_mnist.measure(contender, job).train_cpu}


def drawn(steps: Mapping[str, Mapping[str, float]], picture: Path) -> None:
    """Horizontal bars, a pair for each part.

    Args:
        steps: Microseconds of a step by part, by contender.
        picture: The file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="tight")
    height = 0.8 / len(steps)
    for number, (name, spent) in enumerate(steps.items()):
        places = [i + (number - (len(steps) - 1) / 2) * height for i in range(len(PARTS))]
        values = [spent.get(part, 0.0) for part in PARTS]
        label = f"{name}: {sum(values):,.0f} us a step"
        bars = axes.barh(places, values, height, label=label)
        axes.bar_label(bars, [f"{v:,.0f}" if v else "" for v in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(PARTS)), PARTS)
    axes.invert_yaxis()
    axes.set_xlabel("processor time of a training step, us")
    axes.set_title("replay, MLP 784-400-400-10, 32 new and 32 stored images", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(picture, dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with MNIST/raw/*-ubyte")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = split_mnist.thinned(asked.data, Path(folder), asked.images)
        backbone = split_mnist.BACKBONES["mlp"]()
        job = Job(SplitMNIST(backbone=backbone, data_dir=data, tuning_fraction=0.0))
        sides = split_mnist.contenders("replay", avalanche=False)
        sides = {"clbench": sides["clbench"], "by hand": sides["plain"]}
        train, _, _ = job.prepared()
        count = sum(-(-len(labels) // job.batch_size) for _, labels in train)
        passes = {
            f"{name}, {kind.__name__}": partial(kind, side, job)
            for name, side in sides.items()
            for kind in (clocked, whole)
        }
        runs = in_turns(passes, 1 + asked.rounds)
    medians = {
        name: {p: 1e6 * statistics.median(r[p] for r in found[1:]) / count for p in found[-1]}
        for name, found in runs.items()
    }
    for name, spent in medians.items():
        print(json.dumps({"microseconds of a step": name, **spent}))
    steps = {name: medians[f"{name}, clocked"] for name in sides}
    print("\n| part | " + " | ".join(f"{name}, us a step" for name in steps) + " |\n|---|---|---|")
    for part in PARTS:
        print(f"| {part} | " + " | ".join(f"{s.get(part, 0):,.0f}" for s in steps.values()) + " |")
    for title, kind in (("all of them", clocked), ("without clocks", whole)):
        sums = (sum(medians[f"{name}, {kind.__name__}"].values()) for name in steps)
        print(f"| {title} | " + " | ".join(f"{s:,.0f}" for s in sums) + " |")
    drawn(steps, asked.picture)


if __name__ == "__main__":
    main()
