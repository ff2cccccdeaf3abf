"""What is scored, and when: after every experience, on the way, and at the end."""

from __future__ import annotations

import math
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench import machine, metrics, online
from clbench.account import Account
from clbench.conditions import Conditions
from clbench.errors import Diverged
from clbench.online import Online
from clbench.results import Matrix, Result
from clbench.retention import Retention
from clbench.types import Context, Experience, Setting, Strategy, Stream


class Scoring:
    """Every score of one run, written into its result.

    Args:
        stream: On the device.
        strategy: Whose predictions.
        context: Of the run.
        conditions: Of the run.
        result: Gets the matrices, the evaluations and the metrics.
        account: Gets the seconds that it takes.

    Attributes:
        online: What arrives without labels, answered and scored; None: nothing does.
        retention: What the model could do before; None: it came untaught.
    """

    def __init__(
        self,
        stream: Stream,
        strategy: Strategy,
        context: Context,
        conditions: Conditions,
        result: Result,
        account: Account,
    ) -> None:
        self.stream, self.strategy, self.context = stream, strategy, context
        self.conditions, self.result, self.account = conditions, result, account
        self.online = Online(stream, strategy, context) if stream.arrivals else None
        self._packed: defaultdict[str, PackedRows] = defaultdict(PackedRows)
        self.retention: Retention | None = None
        if self.online is None and stream.source_test is not None:
            self.retention = Retention(stream, context, conditions.evaluate_batch_size)

    def look(self, model: nn.Module) -> None:
        """What the model can do before a strategy gets it."""
        if self.online:
            self.online.look(model)
        if self.retention:
            with self._apart():
                self.retention.look(model)

    def measure(self, experience: Experience) -> Mapping[str, list[float]]:
        """A new row of every matrix.

        Raises:
            Diverged: If a score is no number.
        """
        began = time.perf_counter()
        everything = self.context.scenario.setting != Setting.CLASS_INCREMENTAL
        upto = len(self.stream.tests) if everything else experience.index + 1
        scores = self._scores(upto)
        if self.online:
            self.online.snapshot()
        if self.retention:
            with self._apart():
                self.retention.measure(self.strategy.predict)
        unknown = [None] * (len(self.stream.tests) - upto)
        _require_finite(scores)
        for name, matrix in self._matrices(scores).items():
            matrix.append([*scores[name], *unknown])
        self.account.costs["evaluate_seconds"] += time.perf_counter() - began
        return scores

    def glance(self, experience: Experience) -> list[float]:
        """Accuracies in the midst of an experience, on a part of each test met so far."""
        began = time.perf_counter()
        scores = self._scores(experience.index + 1, self.conditions.evaluate_samples)
        accuracies = scores["accuracy"]
        self.result.evaluations.append(
            {"step": self.account.step, "experience": experience.index, "accuracies": accuracies}
        )
        self.account.costs["evaluate_seconds"] += time.perf_counter() - began
        return accuracies

    def conclude(self) -> None:
        """All metrics.

        Raises:
            Diverged: If one is no number.
        """
        result, sizes = self.result, self.result.test_sizes
        general = self.retention.record() if self.retention else {}
        baseline = general.get("tests_before", {}).get("accuracy")
        if result.accuracy_matrix:
            result.metrics = metrics.summary(result.accuracy_matrix, sizes, baseline)
        if self.context.scenario.setting is Setting.INSTRUCTION_TUNING:
            result.general = general
            result.metrics |= metrics.instruction_summary(
                result.accuracy_matrix, result.scores, general
            )
        if result.task_aware_accuracy_matrix:
            result.task_aware_metrics = metrics.summary(result.task_aware_accuracy_matrix, sizes)
        if result.evaluations:
            result.metrics |= metrics.anytime_summary(result.evaluations, len(sizes))
        if self.online:
            result.online = self.online.record()
            result.metrics |= online.metrics(result.online)
            costs = self.account.costs
            costs |= self.online.costs(costs["train_seconds"])
        _require_finite({**result.metrics, **result.task_aware_metrics})

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, as tensors: of a thousand experiences they are a million numbers."""
        result = self.result
        return {
            "accuracy_matrix": self._packed["accuracy"](result.accuracy_matrix),
            "task_aware_accuracy_matrix": self._packed["task_aware_accuracy"](
                result.task_aware_accuracy_matrix
            ),
            "scores": {name: self._packed[name](matrix) for name, matrix in result.scores.items()},
            "retention": self.retention.record() if self.retention else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts `state_dict` back."""
        width = len(self.stream.tests)
        self.result.accuracy_matrix = unpacked(state["accuracy_matrix"], width)
        aware = state["task_aware_accuracy_matrix"]
        self.result.task_aware_accuracy_matrix = unpacked(aware, width)
        self.result.scores = {n: unpacked(found, width) for n, found in state["scores"].items()}
        if self.retention:
            self.retention.load_record(state["retention"])

    def _matrices(self, scores: Mapping[str, Any]) -> Mapping[str, Matrix]:
        """Where the rows of each score go."""
        known = {
            "accuracy": self.result.accuracy_matrix,
            "task_aware_accuracy": self.result.task_aware_accuracy_matrix,
        }
        more = self.result.scores
        return {n: known[n] if n in known else more.setdefault(n, []) for n in scores}

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Whatever happens here costs no training and leaves no trace in random numbers."""
        rng = machine.isolated_rng(self.conditions.seed, "score")
        with torch.inference_mode(), rng, self.account.passes.counting(False):
            yield

    def _scores(self, upto: int, at_most: int = 0) -> Mapping[str, list[float]]:
        tests = list(self.stream.tests[:upto])
        if at_most:
            device = self.context.device
            tests = [
                t.subset(torch.arange(0, len(t), -(-len(t) // at_most), device=device))
                for t in tests
            ]
        # What normalises with the statistics of a batch is scored on batches as they arrive.
        size = self.conditions.evaluate_batch_size
        size = self.context.scenario.batch_size if self.online else size
        with self._apart():
            return self.context.objective.score(
                self.strategy.predict, tests, self.stream.experiences[:upto], size
            )


def _require_finite(numbers: Mapping[str, Any]) -> None:
    """A score or metric that is no number ends the run, before it is averaged with others."""
    for name, found in numbers.items():
        for value in found if isinstance(found, list) else [found]:
            if value is not None and not math.isfinite(value):
                raise Diverged(f"{name} is {value}")


class PackedRows:
    """A matrix as tensors; each of its rows is converted once, up to its last number."""

    def __init__(self) -> None:
        self._numbers = array("d")
        self._lengths: list[int] = []

    def __call__(self, matrix: Matrix) -> dict[str, Tensor]:
        """The numbers of all rows, NaN where there is none, and how many are in each."""
        for row in matrix[len(self._lengths) :]:
            known = [i for i, value in enumerate(row) if value is not None]
            length = known[-1] + 1 if known else 0
            self._numbers.extend(math.nan if value is None else value for value in row[:length])
            self._lengths.append(length)
        numbers = torch.from_numpy(np.array(self._numbers))
        return {"numbers": numbers, "lengths": torch.tensor(self._lengths, dtype=torch.int64)}


def unpacked(found: Mapping[str, Tensor], width: int) -> Matrix:
    """Rows of so many columns."""
    rows = [row.tolist() for row in found["numbers"].split(found["lengths"].tolist())]
    return [
        [*(None if math.isnan(value) else value for value in row), *[None] * (width - len(row))]
        for row in rows
    ]
