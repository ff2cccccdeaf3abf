"""Avalanche's methods beside ours of the same name, on the same streams. Not a test by itself.

    PYTHONPATH=. python tests/avalanche_agreement.py

prints the tables of docs/avalanche.md. Both sides learn the same samples in the same order of
classes from the same initial weights with the same optimizer, steps and batch sizes; Avalanche
trains in its own loop, the suite scores both. What differs is the order of the minibatches, which
each side draws for itself, and what is said beside a method.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import nn

from clbench import Result, run
from clbench.nn.backbones import MLP
from clbench.nn.memory import Memory
from clbench.samples import Batch
from clbench.types import Context, Experience, Strategy
from scenarios.digits import Digits
from strategies.avalanche import Avalanche
from strategies.der import DER
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.lwf import LwF
from strategies.replay import Replay

SEEDS = range(5)
#: Such that each method changes what fine-tuning gives; the same on both sides.
LR, EWC_LAMBDA, LWF_LAMBDA, DER_ALPHA = 0.1, 3000.0, 10.0, 0.3
#: As many steps on both sides need a memory of fewer batches than an experience has.
DIGITS = Digits(backbone=MLP(hidden=(100,)), epochs=10, batch_size=32, memory_size=100)

#: Of which part of a result, and its name there.
METRICS: Mapping[str, tuple[str, str]] = {
    "average accuracy": ("metrics", "average_accuracy"),
    "forgetting": ("metrics", "forgetting"),
    "learning accuracy": ("metrics", "learning_accuracy"),
    "task-aware accuracy": ("task_aware_metrics", "average_accuracy"),
}


@dataclass(frozen=True)
class Pair:
    """A method on both sides.

    Attributes:
        theirs: Avalanche's.
        ours: With the options that come nearest.
        same: Whether both are meant to be one method.
    """

    theirs: Avalanche
    ours: Strategy
    same: bool = True


@dataclass(kw_only=True)
class LateDER(DER):
    """DER as Avalanche defines it: memory and logits are those at the end of an experience.

    The paper takes both from the step at which a sample arrives, and replays from the first
    experience on.
    """

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.memory = Memory(context.scenario.memory_size, context, "class_balanced")

    def observe(self, batch: Batch) -> None:
        """Nothing: see `after`."""

    def after(self, experience: Experience) -> None:
        assert experience.train is not None
        count = len(experience.train)
        order = torch.randperm(count, generator=self.context.generator("late"))
        with torch.no_grad():
            for batch in experience.train.batches(order, count):
                self.memory.add(batch, {"logits": self.forward(batch.inputs)})


_DER = Avalanche(name="DER", arguments={"alpha": DER_ALPHA, "beta": 0.0}, lr=LR)
PAIRS: Mapping[str, Pair] = {
    "Naive, `finetune`": Pair(Avalanche(name="Naive", lr=LR), Finetune(lr=LR)),
    "Replay, `replay selection=class_balanced`": Pair(
        Avalanche(name="Replay", lr=LR), Replay(lr=LR, selection="class_balanced")
    ),
    "EWC, `ewc fisher=batch`": Pair(
        Avalanche(name="EWC", arguments={"ewc_lambda": EWC_LAMBDA}, lr=LR),
        EWC(ewc_lambda=2 * EWC_LAMBDA, fisher="batch", lr=LR),
    ),
    "LwF, `lwf cross_entropy_over=all`": Pair(
        Avalanche(name="LwF", arguments={"alpha": LWF_LAMBDA, "temperature": 2.0}, lr=LR),
        LwF(lwf_lambda=LWF_LAMBDA, temperature=2.0, cross_entropy_over="all", lr=LR),
    ),
    "DER, `der` with its definition": Pair(_DER, LateDER(alpha=DER_ALPHA, lr=LR)),
    "DER, `der`": Pair(_DER, DER(alpha=DER_ALPHA, lr=LR), same=False),
}


@dataclass(frozen=True)
class Agreement:
    """One metric of one method on both sides, a value for each seed.

    Attributes:
        theirs: Avalanche's values.
        ours: Ours.
    """

    theirs: Sequence[float]
    ours: Sequence[float]

    @property
    def differences(self) -> list[float]:
        """Ours less theirs."""
        return [o - t for o, t in zip(self.ours, self.theirs, strict=True)]

    @property
    def p_value(self) -> float:
        """Of the paired t test; 1 where the two are equal for every seed."""
        if not any(self.differences):
            return 1.0
        return float(stats.ttest_rel(self.ours, self.theirs).pvalue)


def measured(pair: Pair, seeds: Sequence[int] = SEEDS) -> dict[str, Agreement]:
    """Both sides, for every metric."""
    sides: dict[str, list[Result]] = {"theirs": [], "ours": []}
    for seed in seeds:
        for side, results in sides.items():
            results.append(run(DIGITS, vars(pair)[side], seed, device="cpu", threads=1))
            assert results[-1].status == "complete", results[-1].reason

    def values(side: str, where: tuple[str, str]) -> list[float]:
        return [vars(result)[where[0]][where[1]] for result in sides[side]]

    return {
        name: Agreement(values("theirs", where), values("ours", where))
        for name, where in METRICS.items()
    }


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's correction, in the order of the input."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    largest, found = 0.0, [0.0] * len(p_values)
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        found[i] = largest
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in %."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def table(found: Mapping[str, Mapping[str, Agreement]]) -> str:
    """Markdown, one row for each method and metric.

    p is that of the paired t test, corrected for all pairs that are meant to be the same.
    """
    rows = [(m, n, a) for m, metrics in found.items() for n, a in metrics.items()]
    ps = corrected(found)
    lines = [
        "| method | metric, % | Avalanche | clbench | difference | p, Holm |",
        "|---|---|---|---|---|---|",
    ]
    for method, metric, a in rows:
        cells = [method, metric, *map(spread, (a.theirs, a.ours, a.differences))]
        p = ps.get((method, metric))
        shown = f"{a.p_value:.3f}, alone" if p is None else f"{p:.2f}"
        lines.append("| " + " | ".join([*cells, shown]) + " |")
    return "\n".join(lines)


def corrected(found: Mapping[str, Mapping[str, Agreement]]) -> dict[tuple[str, str], float]:
    """Holm's p of every metric of the pairs that are meant to be the same."""
    tests = {
        (method, metric): agreement.p_value
        for method, metrics in found.items()
        if PAIRS[method].same
        for metric, agreement in metrics.items()
    }
    return dict(zip(tests, adjusted([*tests.values()]), strict=True))


if __name__ == "__main__":
    sys.stdout.write(table({name: measured(pair) for name, pair in PAIRS.items()}) + "\n")
