"""A result as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from clbench.results import Matrix, Result

#: Wider matrices show only their last rows and columns' ends; the file has everything.
WIDEST = 12


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
    table.add_column("value" if result.online else "all seen classes compete", justify="right")
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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
