"""What a model could do before the stream, and how much of it a strategy keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clbench.samples import Batch
from clbench.types import Context, Stream

Predict = Callable[[Batch], Tensor]


class Retention:
    """Scores on `Stream.source_test`, and before the stream on all of its tests.

    Args:
        stream: On the device.
        context: Of the run.
        batch_size: Samples predicted at once.

    Attributes:
        tests_before: Every score of the model as it came, on the test of each experience.
        before: Every score of the model as it came on the source's test; empty without one.
        after: Every score of the strategy there, a value for each time that it was measured.
    """

    def __init__(self, stream: Stream, context: Context, batch_size: int) -> None:
        self.stream, self.context, self.batch_size = stream, context, batch_size
        self.tests_before: dict[str, list[float]] = {}
        self.before: dict[str, float] = {}
        self.after: dict[str, list[float]] = {}

    def look(self, model: nn.Module) -> Predict:
        """What the model can do before a strategy gets it.

        Returns:
            The model's plain answers, in evaluation mode.
        """
        model.eval()

        @torch.inference_mode()
        def predict(batch: Batch) -> Tensor:
            with self.context.autocast():
                outputs: Tensor = model(batch.inputs)
            return outputs.float()

        stream, objective = self.stream, self.context.objective
        if stream.tests:
            self.tests_before = objective.score(
                predict, stream.tests, stream.experiences, self.batch_size
            )
        self.before = self._on_source(predict)
        return predict

    @torch.inference_mode()
    def measure(self, predict: Predict) -> None:
        """How well a strategy does on the source now."""
        for name, value in self._on_source(predict).items():
            self.after.setdefault(name, []).append(value)

    def record(self) -> dict[str, Any]:
        """The "general" part of a result, plain data: the attributes by name."""
        return {"tests_before": self.tests_before, "before": self.before, "after": self.after}

    def load_record(self, record: Mapping[str, Any]) -> None:
        """Puts `record` back."""
        self.tests_before = dict(record["tests_before"])
        self.before = dict(record["before"])
        self.after = {name: list(values) for name, values in record["after"].items()}

    def _on_source(self, predict: Predict) -> dict[str, float]:
        test = self.stream.source_test
        if test is None:
            return {}
        one = self.stream.experiences[:1]
        scores = self.context.objective.score(predict, [test], one, self.batch_size)
        return {name: values[0] for name, values in scores.items()}
