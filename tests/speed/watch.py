"""The job that contenders of `split_mnist.py` do, and the clocks that time them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from clbench import machine
from clbench.samples import Samples
from clbench.types import Split
from scenarios.split_mnist import SplitMNIST

LEARNING_RATE = 0.1
EVALUATE_AT_ONCE = 1000

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Job:
    """Split MNIST, one epoch.

    Attributes:
        scenario: The suite's.
    """

    scenario: SplitMNIST

    @property
    def batch_size(self) -> int:
        """Of new samples, and of stored ones."""
        return self.scenario.batch_size

    @property
    def memory_size(self) -> int:
        """In samples."""
        return self.scenario.memory_size

    @property
    def classes(self) -> int:
        """Of each experience; in the order in which they come."""
        return 10 // self.scenario.n_experiences

    @property
    def data(self) -> Path:
        """Folder with MNIST/raw."""
        return Path(self.scenario.data_dir)

    def model(self) -> nn.Module:
        """The initial model of the suite's own run."""
        stream = self.scenario.stream(Split.EVALUATE, 0)
        with machine.isolated_rng(0, "model"):
            return self.scenario.model(0, stream)

    def prepared(self) -> tuple[list[Labelled], list[Labelled], nn.Module]:
        """Normalised floats and labels, one pair per experience: to learn, to test; the model."""
        stream = self.scenario.stream(Split.EVALUATE, 0)

        def tensors(samples: Samples) -> Labelled:
            whole = samples.take(torch.arange(len(samples)))
            return whole.inputs, whole.targets

        train = [tensors(e.train) for e in stream.experiences if e.train is not None]
        return train, [tensors(test) for test in stream.tests], self.model()


@dataclass
class Watch:
    """Seconds of one run: in training, in evaluation, CPU seconds of each, and in all."""

    train: float = 0.0
    evaluate: float = 0.0
    train_cpu: float = 0.0
    evaluate_cpu: float = 0.0
    total: float = 0.0
    accuracies: list[float] = field(default_factory=list)

    @contextmanager
    def training(self) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.train += time.perf_counter() - began
        self.train_cpu += time.process_time() - cpu

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.evaluate += time.perf_counter() - began
        self.evaluate_cpu += time.process_time() - cpu
