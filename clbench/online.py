"""Test-time adaptation as the engine sees it: what arrives is answered once, and scored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clbench import machine
from clbench.errors import Diverged, UserError
from clbench.retention import Predict, Retention
from clbench.samples import Samples
from clbench.types import Context, Strategy, Stream

#: Equal intervals of confidence that the calibration error compares (Guo et al. 2017, 1706.04599).
CALIBRATION_BINS = 15
#: Batches on which the speed of the model before adaptation is measured.
_TIMED_BATCHES = 5


class Tally:
    """Counts over answers to arriving samples; on the device, so that nothing waits for them.

    Args:
        n_rows: Domains, or experiences, that are counted apart.
        n_outputs: Classes.
        device: Where outputs and labels are.
    """

    def __init__(self, n_rows: int, n_outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.count, self.right = zeros(n_rows), zeros(n_rows)
        self.answered = zeros(n_rows, n_outputs)
        # Per row and interval: samples, summed confidence, right answers.
        self.bins = zeros(3, n_rows, CALIBRATION_BINS)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, outputs: Tensor, targets: Tensor, rows: Tensor) -> None:
        """Counts the answers to one batch.

        Args:
            outputs: Logits [B, n_outputs].
            targets: Labels [B].
            rows: Where each sample counts, [B].
        """
        confidence, answers = outputs.softmax(1).max(1)
        self.finite &= outputs.isfinite().all()
        right = (answers == targets).double()
        one = torch.ones_like(right)
        self.count.index_add_(0, rows, one)
        self.right.index_add_(0, rows, right)
        self.answered.index_put_((rows, answers), one, accumulate=True)
        interval = (confidence * CALIBRATION_BINS).long().clamp_(0, CALIBRATION_BINS - 1)
        for total, value in zip(self.bins, (one, confidence.double(), right), strict=True):
            total.index_put_((rows, interval), value, accumulate=True)

    def scores(self) -> dict[str, list[float | None]]:
        """Per row `error`, `calibration_error`, `collapse` (None without samples), `samples`.

        The calibration error is the expected one, Σ_b n_b/n |accuracy_b − confidence_b| over
        intervals of confidence. Collapse is the share of the class that is answered most.
        """
        count = self.count.clamp_min(1)
        _, confidence, right = self.bins
        table = {
            "error": 1 - self.right / count,
            "calibration_error": (right - confidence).abs().sum(1) / count,
            "collapse": self.answered.max(1).values / count,
        }
        known = (self.count > 0).tolist()
        scores: dict[str, list[float | None]] = {
            name: [v if k else None for v, k in zip(values.tolist(), known, strict=True)]
            for name, values in table.items()
        }
        return scores | {"samples": [int(n) for n in self.count.tolist()]}


class Online:
    """A stream of arrivals on its way through a strategy.

    Args:
        stream: On the device.
        strategy: Not set up yet.
        context: Of the run.
    """

    def __init__(self, stream: Stream, strategy: Strategy, context: Context) -> None:
        self.stream, self.strategy, self.context = stream, strategy, context
        self.batch_size = context.scenario.batch_size
        device, n_outputs = context.device, stream.n_outputs
        self.by_domain = Tally(len(stream.domains), n_outputs, device)
        self.by_experience = Tally(len(stream.experiences), n_outputs, device)
        self.retention = Retention(stream, context, self.batch_size)
        self.source_model: dict[str, Any] = {}

    def look(self, model: nn.Module) -> None:
        """What the model can do, and how fast it is, before a strategy gets it."""
        predict = self.retention.look(model)
        self.source_model = {
            "accuracies": self.retention.tests_before.get("accuracy", []),
            "source_accuracy": self.retention.before.get("accuracy"),
            "seconds_per_sample": self._seconds_per_sample(
                predict, self.stream.arrivals[0].samples
            ),
        }

    def begin(self) -> None:
        """After the strategy's set-up."""
        self.snapshot()

    def meet(self, index: int) -> Iterator[int]:
        """Hands an experience to the strategy batch by batch, and counts what it answers.

        Args:
            index: Of the experience.

        Yields:
            The number of samples of each batch, when it has been answered.

        Raises:
            UserError: If an input is not a finite number.
            Diverged: If an output is not.
        """
        arrivals, reset = self.stream.arrivals[index], self.stream.reset
        samples, device = arrivals.samples, self.context.device
        everything = torch.arange(len(samples), device=device)
        batches = samples.batches(everything, self.batch_size)
        domains = arrivals.domains.to(device).split(self.batch_size)
        if reset == "experience" and index:
            self.strategy.reset()
        for batch, domain in zip(batches, domains, strict=True):
            if not self.context.proceed():
                continue
            # Stored bytes are finite, and looking would make a GPU wait.
            if batch.raw.is_floating_point() and not batch.inputs.isfinite().all():
                raise UserError(
                    f"Experience {index + 1} has an input that is not a finite number. Clean the "
                    "data: a model would carry it on in its statistics."
                )
            outputs = self.strategy.adapt(batch.unlabelled()).detach().float()
            self.by_domain.add(outputs, batch.targets, domain)
            self.by_experience.add(outputs, batch.targets, torch.full_like(domain, index))
            if reset == "batch":
                self.strategy.reset()
            yield len(batch)
        if not self.by_domain.finite:
            raise Diverged("an output of the adapted model is not finite; lower the learning rate")

    def snapshot(self) -> None:
        """How well the strategy does on the clean source now."""
        self.retention.measure(self.strategy.predict)

    @property
    def source_accuracy(self) -> list[float]:
        """Of the strategy on the clean source: before the stream, then after each experience."""
        return self.retention.after.get("accuracy", [])

    def record(self) -> dict[str, Any]:
        """The "online" part of a result, plain data.

        Returns:
            domains (names), by_domain and by_experience (see `Tally.scores`), source_model
            (accuracies on the tests of all experiences, and source_accuracy on the clean source,
            of the model before adaptation, in evaluation mode), source_accuracy (of the strategy
            on the clean source: before the stream, then after each experience).
        """
        return {
            "domains": list(self.stream.domains),
            "by_domain": self.by_domain.scores(),
            "by_experience": self.by_experience.scores(),
            "source_model": self.source_model,
            "source_accuracy": self.source_accuracy,
        }

    def costs(self, seconds: float) -> dict[str, float]:
        """How much slower adapting is than the model's plain inference.

        Args:
            seconds: That all arrivals together took.
        """
        plain = self.source_model["seconds_per_sample"] * float(self.by_domain.count.sum())
        return {"source_inference_seconds": plain, "adaptation_time_ratio": seconds / plain}

    def state_dict(self) -> dict[str, Any]:
        """Everything that has been counted."""
        return {
            "domain": dict(vars(self.by_domain)),
            "experience": dict(vars(self.by_experience)),
            "source_model": self.source_model,
            "retention": self.retention.record(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts `state_dict` back."""
        for tally, key in ((self.by_domain, "domain"), (self.by_experience, "experience")):
            for name, value in vars(tally).items():
                value.copy_(state[key][name])
        self.source_model = dict(state["source_model"])
        self.retention.load_record(state["retention"])

    def _seconds_per_sample(self, predict: Predict, samples: Samples) -> float:
        """Of plain inference on a few batches, after one to warm up."""
        device = self.context.device
        count = min(len(samples), self.batch_size * _TIMED_BATCHES)
        batches = list(samples.batches(torch.arange(count, device=device), self.batch_size))
        predict(batches[0])
        machine.synchronise(device)
        began = time.perf_counter()
        for batch in batches:
            predict(batch)
        machine.synchronise(device)
        return (time.perf_counter() - began) / count


def metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers of a run of test-time adaptation, beside those of its accuracy matrix.

    - `online_error`: mean over domains of the share of wrong answers as the samples arrived, in
      [0, 1]; lower is better.
    - `online_calibration_error`, `collapse`: means over domains; see `Tally.scores`.
    - `source_accuracy`: on the clean source, after the last experience.
    - `source_forgetting`: accuracy of the model as it came on the clean source, minus that; in
      [-1, 1], lower is better. What normalising with the statistics of a batch costs counts too.

    Undefined is None.

    Args:
        record: See `Online.record`.
    """

    def mean(name: str) -> float | None:
        known = [v for v in record["by_domain"][name] if v is not None]
        return sum(known) / len(known) if known else None

    last = record["source_accuracy"][-1] if record["source_accuracy"] else None
    first = record["source_model"]["source_accuracy"]
    return {
        "online_error": mean("error"),
        "online_calibration_error": mean("calibration_error"),
        "collapse": mean("collapse"),
        "source_accuracy": last,
        "source_forgetting": None if last is None or first is None else first - last,
    }
