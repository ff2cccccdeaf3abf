"""A result as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from clbench.metrics import headline
from clbench.results import Matrix, Result
from clbench.statistics import interval

if TYPE_CHECKING:
    from clbench.conditions import Names
    from clbench.study import Study, Trial

#: Wider matrices show only their last rows and columns' ends; the file has everything.
WIDEST = 12
#: Trials of a study that are shown, best first.
BEST = 10
#: Metrics of the evaluation phase that are shown, where a run has them.
EVALUATED = (
    "online_error",
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "learning_accuracy",
    "source_forgetting",
)


def tables(result: Result) -> Iterator[Table]:
    """The accuracy matrix, or what happened in each domain without labels, and the metrics."""
    if result.online:
        yield _domains(result)
    elif result.accuracy_matrix:
        yield _matrix(result.accuracy_matrix, result.experiences)
    if result.metrics:
        yield _metrics(result)


def _matrix(matrix: Matrix, names: list[str]) -> Table:
    count = len(matrix[0])
    shown = list(range(count)) if count <= WIDEST else [*range(5), -1, *range(count - 5, count)]
    table = Table(title="Accuracy in % after each experience (row) on each (column)")
    table.add_column("learned")
    for j in shown:
        table.add_column("..." if j < 0 else names[j][:12], justify="right")
    for i, row in enumerate(matrix):
        if count <= WIDEST or i in shown:
            cells = ["..." if j < 0 else _percent(row[j]) for j in shown]
            table.add_row(f"{i + 1}: {names[i][:18]}", *cells)
    return table


def _domains(result: Result) -> Table:
    """One row for each domain of a stream without labels."""
    scores = result.online["by_domain"]
    table = Table(title="Answers as the images arrived, in %")
    table.add_column("domain")
    for title in ("error", "calibration error", "most frequent answer"):
        table.add_column(title, justify="right")
    for i, name in enumerate(result.online["domains"]):
        columns = ("error", "calibration_error", "collapse")
        table.add_row(name, *(_percent(scores[column][i]) for column in columns))
    return table


def _metrics(result: Result) -> Table:
    table = Table()
    table.add_column("metric, %")
    compete = not result.online and result.run.get("setting") != "instruction_tuning"
    table.add_column("all seen classes compete" if compete else "value", justify="right")
    if result.task_aware_metrics:
        table.add_column("task-aware", justify="right")
    for name, value in result.metrics.items():
        row = [name.replace("_", " "), _percent(value)]
        if result.task_aware_metrics:
            row.append(_percent(result.task_aware_metrics.get(name)))
        table.add_row(*row)
    costs = result.costs
    doing = "adapt" if result.online else "train"
    seconds = f"{costs['train_seconds']:.1f} s {doing}, {costs['evaluate_seconds']:.1f} s evaluate"
    memory = f"{costs['memory_samples']} samples kept, {costs['parameters']:,} parameters"
    table.caption = f"{seconds}, {memory}"
    return table


def title(names: Names) -> str:
    """Scenario and strategy on one line."""
    return f"{names.scenario} {'+'.join(filter(None, (names.strategy, names.base)))}"


def trial(one: Trial) -> str:
    """What was tried and what came of it, on one line."""
    values = ", ".join(f"{name}={_short(value)}" for name, value in one.values.items())
    outcome = f"{_percent(one.mean)}" if one.mean is not None else f"{one.state} {one.reason or ''}"
    return f"{outcome.strip()} with {values}"


def study(one: Study) -> Table:
    """The best trials of a search, and what it cost."""
    table = Table(title=f"Trials by {one.metric.replace('_', ' ')}, %, mean over seeds")
    table.add_column("trial", justify="right")
    table.add_column("score", justify="right")
    for name in one.space:
        table.add_column(name, justify="right")
    numbered = list(enumerate(one.trials, start=1))
    ranked = sorted(numbered, key=lambda x: -(x[1].mean if x[1].mean is not None else -1e9))
    for number, each in ranked[:BEST]:
        score = _percent(each.mean) if each.mean is not None else each.state
        cells = (_short(each.values[name]) for name in one.space)
        table.add_row(str(number), score, *cells, style="bold" if each is ranked[0][1] else "")
    costs = one.costs()
    failed = sum(t.state == "failed" for t in one.trials)
    table.caption = (
        f"{len(one.trials)} trials, {failed} failed, {costs['tuning_runs']} runs, "
        f"{costs['tuning_seconds']:.1f} s"
    )
    return table


def evaluation(results: Sequence[Result]) -> Table:
    """Means over the seeds of the evaluation phase, with their 95 % intervals."""
    complete = [r for r in results if r.status == "complete"]
    table = Table(title=f"{len(complete)} of {len(results)} seeds, mean and 95 % interval, %")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name in EVALUATED:
        known = [v for r in complete if (v := r.metrics.get(name)) is not None]
        if known:
            found = interval(known)
            spread = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
            table.add_row(name.replace("_", " "), f"{_percent(found.mean)}{spread}")
    return table


def ending(result: Result) -> str:
    """How a run ended, in words."""
    if result.status != "complete":
        return f"{result.status}: {result.reason}"
    name, _ = headline(result.run["setting"])
    return f"{name.replace('_', ' ')} {_percent(result.metrics.get(name))} %"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
