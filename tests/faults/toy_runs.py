"""Toy runs in processes of their own, to be killed: what they are, how they start and go on."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from clbench.cells import Cell, Ended, execute
from clbench.conditions import Conditions, Names
from clbench.errors import Busy, Interrupted, UserError
from clbench.limits import Limits
from clbench.results import Result

MLP = {"_target_": "clbench.nn.backbones.MLP", "hidden": [8]}
#: About 60 steps; small enough to be started hundreds of times.
TOY: Mapping[str, Any] = {
    "_target_": "clbench.testing.ToyScenario",
    "epochs": 5,
    "batch_size": 20,
    "backbone": MLP,
}
REPLAY: Mapping[str, Any] = {
    "_target_": "strategies.replay.Replay",
    "lr": 0.05,
    "momentum": 0.9,
    "schedule": "cosine",
}
#: Costs that a clock or another process decides.
CLOCKED = ("train_seconds", "evaluate_seconds", "peak_memory_bytes", "adaptation_time_ratio")
CLOCKED += ("source_inference_seconds",)
#: What a run imports, so that a process that is made finds it there.
PRELOADED = ["__main__", "toy_runs", "clbench.testing", "strategies.replay"]
PRELOADED += ["torch._dynamo", "torch._inductor", "torch.onnx"]
OFTEN = Limits(checkpoint_every=1e-9)


def planned(
    root: Path,
    strategy: Mapping[str, Any] = REPLAY,
    scenario: Mapping[str, Any] = TOY,
    seed: int = 0,
    limits: Limits | None = None,
    **changes: Any,
) -> Cell:
    """A run of the toy."""
    return Cell(
        composed={"scenario": dict(scenario), "strategy": dict(strategy)},
        conditions=Conditions(device="cpu", threads=1, seed=seed),
        names=Names("toy", str(strategy["_target_"]).split(".")[1]),
        tuned=None,
        results_dir=root,
        limits=limits or Limits(),
        **changes,
    )


def numbers(ended: Ended | Result) -> dict[str, Any]:
    """Everything in a result but for what clocks and machines decide."""
    result = ended.result if isinstance(ended, Ended) else ended
    content: dict[str, Any] = json.loads(result.to_json())
    for name in CLOCKED:
        content["costs"].pop(name, None)
    content.get("online", {}).get("source_model", {}).pop("seconds_per_sample", None)
    content.pop("environment")
    return content


class Stepping:
    """Progress that a test sees: every step is noted, and takes a moment.

    Args:
        note: File whose size is the number of steps.
        seconds: That a step takes at least.
    """

    def __init__(self, note: Path, seconds: float) -> None:
        self.note, self.seconds = note, seconds

    def __enter__(self) -> Stepping:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def start(self, name: str, samples: int) -> None:
        """See `clbench.progress.Progress`."""

    def advance(self, samples: int) -> None:  # noqa: ARG002
        with self.note.open("a") as file:
            file.write(".")
        time.sleep(self.seconds)

    def finish(self, summary: str) -> None:
        """See `clbench.progress.Progress`."""


def run_one(cell: Cell, note: Path | None = None, seconds: float = 0.0) -> None:
    """What a process does: a run, and an exit code like the command line's."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
    try:
        execute(cell, (lambda: Stepping(note, seconds)) if note else None)
    except (Interrupted, Busy):
        os._exit(75)
    except KeyboardInterrupt:
        os._exit(130)
    except UserError:
        os._exit(2)
    except Exception:
        os._exit(1)
    os._exit(0)


def run_all(cells: Sequence[Cell], note: Path | None = None, seconds: float = 0.0) -> None:
    """A sweep: one run after another, those that others are at left out."""
    for cell in cells:
        try:
            execute(cell, (lambda: Stepping(note, seconds)) if note else None)
        except Busy:
            continue
    os._exit(0)


def started(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that does some work; made by a server that has everything imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def stepped(note: Path) -> int:
    """Steps that were noted so far."""
    return note.stat().st_size if note.exists() else 0


def wait_for(ready: Callable[[], bool], process: BaseProcess | None = None) -> None:
    """Until something is so, at most a minute; or until the process ends, which it must not."""
    deadline = time.monotonic() + 60
    while not ready():
        assert process is None or process.exitcode is None, f"it ended with {process.exitcode}"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.002)
