"""A search that was made: what was tried, what came of it, what was chosen, what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clbench.search import Values

Protocol = Literal["two_phase", "conventional"]
_SCHEMA = 1


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        values: Of the searched hyper-parameters.
        scores: Headline metric of its runs, one a seed; larger is better.
        state: "complete", "pruned" or "failed".
        reason: Why it failed.
        runs: Ids of its runs.
        seconds: Training and evaluating, summed over its runs.
        samples: Trained on, summed.
        peak_memory_bytes: Largest of its runs.
    """

    values: Values
    scores: tuple[float, ...]
    state: Literal["complete", "pruned", "failed"]
    reason: str | None
    runs: tuple[str, ...]
    seconds: float
    samples: int
    peak_memory_bytes: int

    @property
    def mean(self) -> float | None:
        """Of a complete trial."""
        return sum(self.scores) / len(self.scores) if self.state == "complete" else None


@dataclass(frozen=True)
class Study:
    """A search, as it is kept beside the runs.

    Attributes:
        name: Of its file.
        protocol: "two_phase" or "conventional".
        scenario: Name and options of the scenario.
        strategy: Label of the strategy.
        space: Search space, as text.
        metric: What was maximised (or, with a minus, minimised).
        budget: Of the search.
        shared_samples: Samples that both splits hold, of those compared.
        trials: All of them.
        chosen: Values of the best trial; None if none completed.
    """

    name: str
    protocol: Protocol
    scenario: Mapping[str, Any]
    strategy: str
    space: Mapping[str, str]
    metric: str
    budget: Mapping[str, Any]
    shared_samples: int
    trials: tuple[Trial, ...]
    chosen: Values | None

    def costs(self) -> dict[str, float | int]:
        """What the search cost: seconds, samples, the largest memory, runs.

        A configuration that was proposed twice was run once.
        """
        run = {t.runs: t for t in self.trials}.values()
        return {
            "tuning_seconds": sum(t.seconds for t in run),
            "tuning_samples": sum(t.samples for t in run),
            "tuning_peak_memory_bytes": max((t.peak_memory_bytes for t in run), default=0),
            "tuning_runs": sum(len(t.runs) for t in run),
        }

    def to_json(self) -> str:
        """The text of its file."""
        content = {"schema": _SCHEMA, **asdict(self), "costs": self.costs()}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Study:
        """Reads its file.

        Raises:
            ValueError: If it is none of this schema.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.pop("schema", None) != _SCHEMA:
            raise ValueError(f"not a tuning record of schema {_SCHEMA}")
        content.pop("costs", None)
        try:
            trials = tuple(
                Trial(**{**t, "scores": tuple(t["scores"]), "runs": tuple(t["runs"])})
                for t in content.pop("trials")
            )
            return Study(**content, trials=trials)
        except (TypeError, KeyError) as error:
            raise ValueError(str(error)) from error
