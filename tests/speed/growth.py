"""How time and memory grow with experiences, samples and run folders, as one picture. Not a test.

    python tests/speed/growth.py [--picture FILE] [--largest 1.0]

Each point is a process of its own, one thread. "experiences": fine-tuning of an MLP on so many
experiences of 2 classes and 20 samples each, with a run folder and a checkpoint after each;
learning and saving apart from evaluation, which after each experience asks about all classes met,
of a model with outputs for all classes of the stream: questions times outputs, the third power of
the number of experiences whatever does it. "samples": a run on one stream of so
many 8x8 images in 5 experiences, one epoch. "run folders": read, ranked, gathered for a report.
Seconds are of the processor, memory is the largest resident; `--largest` takes a part of each
range's end.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clbench import machine
from clbench.types import Scenario

HERE = Path(__file__).resolve()
SIZES: Mapping[str, Sequence[int]] = {
    "experiences": (10, 30, 100, 300, 1000),
    "samples": (1_000, 10_000, 100_000, 1_000_000),
    "run folders": (10, 100, 1_000, 10_000),
}


def experiences(count: int) -> dict[str, float]:
    """A run with so many tiny experiences."""
    from clbench import protocol
    from clbench.conditions import Conditions
    from clbench.results import RunFolder
    from clbench.scoring import Scoring
    from strategies.finetune import Finetune

    spent = {"evaluation": 0.0}
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place), "growth")
        folder.path.mkdir(parents=True)
        scenario = _toy(2 * count, count, 20)
        score = Scoring.measure

        def timed(*arguments: object) -> object:
            began = time.process_time()
            try:
                return score(*arguments)  # type: ignore[arg-type]
            finally:
                spent["evaluation"] += time.process_time() - began

        Scoring.measure = timed  # type: ignore[method-assign,assignment]
        began = time.process_time()
        protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1), folder=folder)
        whole = time.process_time() - began
    return {"learning and saving": whole - spent["evaluation"], **spent}


def samples(count: int) -> dict[str, float]:
    """A run on so many samples."""
    from clbench import protocol
    from clbench.conditions import Conditions
    from strategies.finetune import Finetune

    scenario = _toy(10, 5, count // 10)
    began = time.process_time()
    protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1))
    return {"whole run": time.process_time() - began}


def run_folders(count: int) -> dict[str, float]:
    """Everything about so many run folders that a report says."""
    sys.path.insert(0, str(HERE.parents[1]))
    import made_up  # type: ignore[import-not-found,unused-ignore]

    from clbench import findings

    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            strategy, seed = divmod(number, 10)
            run = made_up.run(
                f"strategy_{strategy % 100:03d}", seed, 0.5, scenario=f"scenario_{strategy // 100}"
            )
            made_up.stored(Path(place), run)
        began = time.process_time()
        findings.gather(Path(place))
        return {"report": time.process_time() - began}


#: Powers with which work grows that is not in proportion by its nature.
POWERS: Mapping[str, int] = {"evaluation": 3}
JOBS: Mapping[str, Callable[[int], dict[str, float]]] = {
    "experiences": experiences,
    "samples": samples,
    "run folders": run_folders,
}


def _toy(classes: int, count: int, per_class: int) -> Scenario:
    """Random 8x8 images; as many for testing as 5 of each class, at most 10,000."""
    from clbench.classification import ClassIncrementalImages, Images
    from clbench.nn.backbones import MLP
    from clbench.samples import TensorSource
    from clbench.types import Split

    @dataclass(kw_only=True)
    class Random(ClassIncrementalImages):
        """Noise."""

        def images(self, split: Split) -> Images:  # noqa: ARG002
            def part(each: int) -> TensorSource:
                targets = torch.arange(classes).repeat(each)
                return TensorSource(
                    torch.randint(256, (len(targets), 1, 8, 8), dtype=torch.uint8), targets
                )

            names = [str(c) for c in range(classes)]
            return Images(part(per_class), part(min(5, per_class)), names, (0.5,), (0.3,))

    return Random(backbone=MLP(hidden=(16,)), n_experiences=count, batch_size=32)


def drawn(found: Mapping[str, Mapping[int, dict[str, float]]], picture: Path) -> None:
    """Seconds above, memory below, beside the line to the last point that grows as the work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(10, 5.4), sharex="col", layout="tight")
    for column, (kind, points) in enumerate(found.items()):
        sizes = list(points)
        above, below = axes[0, column], axes[1, column]
        for name in next(iter(points.values())):
            values = [points[size][name] for size in sizes]
            if name == "resident_mib":
                below.plot(sizes, values, "o-", color="C2")
                continue
            above.plot(sizes, values, "o-", label=name)
            line = [values[-1] * (size / sizes[-1]) ** POWERS.get(name, 1) for size in sizes]
            above.plot(sizes, line, ":", color="0.6", zorder=0)
        above.set(xscale="log", yscale="log", title=kind)
        below.set(
            xlabel=kind, ylim=(0, 1.2 * max(point["resident_mib"] for point in points.values()))
        )
        above.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("processor, s (dotted: as the work)")
    axes[1, 0].set_ylabel("resident, MiB")
    figure.savefig(picture, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=HERE.parents[2] / "docs/assets/growth.png")
    parser.add_argument("--largest", type=float, default=1.0)
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        torch.set_num_threads(1)
        kind, size = arguments.point
        spent = JOBS[kind](int(size))
        resident = machine.peak_memory(torch.device("cpu")) / 2**20
        print(json.dumps({**spent, "resident_mib": resident}))
        return
    found: dict[str, dict[int, dict[str, float]]] = {}
    for kind, sizes in SIZES.items():
        for size in (s for s in sizes if s <= arguments.largest * sizes[-1]):
            command = [sys.executable, str(HERE), "--point", kind, str(size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(kind, {})[size] = json.loads(done.stdout)
            print(json.dumps({"growth": kind, "size": size, **found[kind][size]}), flush=True)
    print("| of | size | seconds | exponent | resident, MiB |\n|---|---|---|---|---|")
    for kind, points in found.items():
        for name in [n for n in next(iter(points.values())) if n != "resident_mib"]:
            before: tuple[int, float] | None = None
            for size, line in points.items():
                power = ""
                if before:
                    power = f"{math.log(line[name] / before[1]) / math.log(size / before[0]):.2f}"
                before = size, line[name]
                memory = f"{line['resident_mib']:,.0f}"
                print(f"| {kind}: {name} | {size:,} | {line[name]:.2f} | {power} | {memory} |")
    drawn(found, arguments.picture)


if __name__ == "__main__":
    main()
