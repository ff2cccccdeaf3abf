"""What a run has spent so far: seconds, steps, samples, passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from clbench import machine
from clbench.passes import BACKWARD, FORWARD, Passes


class Account:
    """Counters of a run, and the clocks behind them.

    Args:
        device: Waited for before a clock is read.
        clock: Seconds from some moment on.

    Attributes:
        costs: By name, as a result has them.
        step: Training steps so far.
        passes: Counts samples through the model, into `costs`.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device, self._clock = device, clock
        self.costs: dict[str, float | int] = {
            "train_seconds": 0.0,
            "evaluate_seconds": 0.0,
            "train_samples": 0,
            FORWARD: 0,
            BACKWARD: 0,
        }
        self.step = 0
        self.passes = Passes(self.costs)
        self._earlier = self._apart = 0.0
        self._started = self._began = clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, without those between an interruption and its end."""
        return self._earlier + self._clock() - self._started

    def begin(self) -> None:
        """Training begins now."""
        machine.synchronise(self.device)
        self.go_on()

    def go_on(self) -> None:
        """`begin`, where nothing is under way on the device."""
        self._began, self._apart = self._clock(), 0.0

    def train(self) -> None:
        """Counts the seconds since the last time as training."""
        machine.synchronise(self.device)
        now = self._clock()
        self.costs["train_seconds"] += now - self._began - self._apart
        self._began, self._apart = now, 0.0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The seconds that the block takes are no training."""
        began = self._clock()
        yield
        self._apart += self._clock() - began

    def compile(self, seconds: float) -> None:
        """Counts seconds of the compiler, which are no training even where they fall into it."""
        self.costs["compile_seconds"] += seconds
        self._apart += seconds

    def resume(self, elapsed: float) -> None:
        """The run is that old already."""
        self._earlier = elapsed
