"""What a person reads: percentages, and no number where there is none."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from clbench.display import WIDEST, tables
from clbench.errors import did_you_mean
from clbench.results import Matrix, Result


def shown(result: Result, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in tables(result):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def triangle(count: int) -> Matrix:
    return [[i / 100 if j <= i else None for j in range(count)] for i in range(count)]


def complete(count: int, **changes: Any) -> Result:
    content: dict[str, Any] = {
        "run": {},
        "experiences": [f"experience {i}" for i in range(count)],
        "accuracy_matrix": triangle(count),
        "metrics": {"average_accuracy": 0.1234, "forgetting": None},
        "task_aware_metrics": {"average_accuracy": 0.5},
        "costs": {
            "train_seconds": 1.25,
            "evaluate_seconds": 0.5,
            "memory_samples": 20,
            "parameters": 12345,
        },
    }
    return Result(**{**content, **changes})


def cells(text: str, first: str) -> list[str]:
    (line,) = [li for li in text.splitlines() if li.strip("│ ").startswith(first)]
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_metrics_in_percent_and_a_dash_where_there_is_none() -> None:
    text = shown(complete(2))
    assert cells(text, "average accuracy") == ["average accuracy", "12.3", "50.0"]
    assert cells(text, "forgetting") == ["forgetting", "-", "-"]
    assert "20 samples kept, 12,345 parameters" in " ".join(text.split())


def test_without_task_aware_metrics_there_is_no_column_for_them() -> None:
    assert "task-aware" not in shown(complete(2, task_aware_metrics={}))


@pytest.mark.parametrize("count", [1, WIDEST])
def test_a_matrix_is_shown_whole(count: int) -> None:
    text = shown(complete(count), 400)
    for i in range(count):
        row = cells(text, f"{i + 1}: ")
        assert row[1:] == [f"{i:.1f}"] * (i + 1) + ["-"] * (count - i - 1)


def test_of_a_wide_matrix_the_ends_are_shown() -> None:
    text = shown(complete(20), 400)
    last = cells(text, "20: ")
    assert last[1:] == ["19.0"] * 5 + ["..."] + ["19.0"] * 5
    assert not [li for li in text.splitlines() if li.strip("│ ").startswith("8: ")]


def test_a_run_without_numbers_shows_none() -> None:
    result = complete(2, accuracy_matrix=[], metrics={}, costs={}, status="diverged")
    assert shown(result) == ""


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ewcc", ["lwf", "ewc"], "Did you mean 'ewc'? Available: ewc, lwf."),
        ("xyz", ["lwf", "ewc"], "Available: ewc, lwf."),
        ("ewc", [], "Available: none."),
    ],
)
def test_the_nearest_name_is_offered(name: str, options: list[str], said: str) -> None:
    assert did_you_mean(name, options) == said
