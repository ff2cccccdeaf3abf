"""Boards from made-up runs whose means and deviations are worked out by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from clbench import report
from clbench.errors import UserError
from clbench.leaderboard import AVERAGED, HEADLINE, boards
from clbench.results import Result, RunFolder, read


def run(strategy: str, seed: int, accuracy: float | None = None, **changes: Any) -> dict[str, Any]:
    """A row as `read` gives it; without an accuracy it is a run that did not complete."""
    row = {
        "run_id": f"{strategy}-{seed}",
        "status": "failed" if accuracy is None else "complete",
        "scenario": "digits",
        "strategy": strategy,
        "base": None,
        "split": "evaluate",
        "seed": seed,
        "precision": "fp32",
        "scenario.epochs": 1,
        "strategy.lr": 0.1,
        "average_accuracy": accuracy,
    }
    return {**row, **changes}


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


def rows(board: pd.DataFrame) -> list[tuple[str, int, int]]:
    return list(zip(board["strategy"], board["seeds"], board["incomplete"], strict=True))


def test_means_and_sample_deviations_over_seeds() -> None:
    (board,) = boards(table(run("a", 0, 0.2), run("a", 1, 0.4), run("a", 2, 0.9), run("b", 0, 0.6)))
    assert rows(board) == [("b", 1, 0), ("a", 3, 0)]
    a = board.set_index("strategy").loc["a"]
    assert a[HEADLINE] == pytest.approx(0.5)
    # ((0.3)^2 + (0.1)^2 + (0.4)^2) / (3 - 1) = 0.13
    assert a[f"{HEADLINE}_std"] == pytest.approx(0.13**0.5)
    b = board.set_index("strategy").loc["b"]
    assert b[HEADLINE] == pytest.approx(0.6)
    assert pd.isna(b[f"{HEADLINE}_std"]), "one seed has no deviation"


def test_every_averaged_column_is_there_even_if_no_run_has_it() -> None:
    (board,) = boards(table(run("a", 0, 0.2, forgetting=0.5), run("a", 1, 0.4, forgetting=None)))
    for column in AVERAGED:
        assert {column, f"{column}_std"} <= set(board)
    assert board["forgetting"][0] == pytest.approx(0.5)
    assert pd.isna(board["learning_accuracy"][0])


@pytest.mark.parametrize(
    "change",
    [
        {"scenario": "mnist"},
        {"scenario.epochs": 2},
        {"split": "tune"},
        {"precision": "bf16"},
        {"scenario.head": "cosine"},
        {"scenario.backbone.hidden": "[3]"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_results_of_different_scenarios_never_mix(change: dict[str, Any]) -> None:
    found = boards(table(run("a", 0, 0.2), run("a", 1, 0.9, **change)))
    assert [rows(board) for board in found] == [[("a", 1, 0)], [("a", 1, 0)]]
    assert {board[HEADLINE][0] for board in found} == {0.2, 0.9}
    (key,) = change
    assert change[key] in [board.attrs[key] for board in found]


def test_the_device_and_the_machine_divide_nothing() -> None:
    (board,) = boards(
        table(run("a", 0, 0.2, device="cpu", code="1"), run("a", 1, 0.4, device="H", code="2"))
    )
    assert rows(board) == [("a", 2, 0)]


def test_incomplete_runs_are_counted_and_never_a_number() -> None:
    (board,) = boards(
        table(
            run("a", 0, 0.2),
            run("a", 1, status="diverged"),
            run("a", 2, status="failed", average_accuracy=0.99),
            run("b", 0, status="diverged"),
        )
    )
    assert rows(board) == [("a", 1, 2), ("b", 0, 1)]
    assert board[HEADLINE][0] == pytest.approx(0.2)
    assert pd.isna(board[HEADLINE][1])


def test_a_seed_counts_once() -> None:
    """Two machines, or two copies of one folder, are no second seed."""
    (board,) = boards(table(run("a", 0, 0.2), run("a", 0, 0.2), run("a", 1, 0.4)))
    assert rows(board) == [("a", 2, 0)]
    assert board[HEADLINE][0] == pytest.approx(0.3)


def test_namesakes_are_told_apart_by_the_options_that_differ() -> None:
    (board,) = boards(
        table(
            run("a", 0, 0.3, **{"strategy.lr": 0.1, "strategy.momentum": 0.9}),
            run("a", 0, 0.2, **{"strategy.lr": 0.2, "strategy.momentum": 0.9}),
            run("b", 0, 0.1, **{"strategy.lr": 0.5, "strategy.momentum": 0.0}),
        )
    )
    assert list(board["strategy"]) == ["a (lr=0.1)", "a (lr=0.2)", "b"]


def test_wrappers_are_named_with_what_they_wrap() -> None:
    (board,) = boards(
        table(
            run("refresh", 0, 0.3, base="derpp", **{"strategy.base.alpha": 0.1}),
            run("refresh", 0, 0.2, base="er_ace"),
            run("refresh", 1, 0.4, base="derpp", **{"strategy.base.alpha": 0.1}),
            run("derpp", 0, 0.1, **{"strategy.alpha": 0.1}),
        )
    )
    assert rows(board) == [
        *(("refresh over derpp", 2, 0), ("refresh over er_ace", 1, 0), ("derpp", 1, 0)),
    ]


def test_options_of_mixed_types_are_no_obstacle() -> None:
    values = [0.5, "auto", None, True]
    (board,) = boards(
        table(*(run("a", 0, 0.1 * i, **{"strategy.x": v}) for i, v in enumerate(values)))
    )
    assert len(board) == 4
    assert board["seeds"].tolist() == [1] * 4


def test_the_order_of_the_rows_does_not_matter() -> None:
    made = [run(s, i, 0.1 * i + 0.05 * len(s)) for s in ("a", "bb", "ccc") for i in range(3)]
    (expected,) = boards(table(*made))
    random.Random(0).shuffle(made)
    (found,) = boards(table(*made))
    pd.testing.assert_frame_equal(found, expected)


def test_the_table_stays_as_it_was() -> None:
    given = table(run("a", 0, 0.2), run("b", 0))
    before = given.copy()
    boards(given)
    pd.testing.assert_frame_equal(given, before)


def test_no_runs_no_boards() -> None:
    assert boards(pd.DataFrame()) == []
    unreadable = {"run_id": "x", "status": "unreadable", "reason": "", "path": "x"}
    assert boards(table(unreadable)) == []
    (board,) = boards(table(run("a", 0, 0.2), unreadable))
    assert rows(board) == [("a", 1, 0)]


# On disk.


def stored(root: Path, row: dict[str, Any]) -> None:
    accuracy = row["average_accuracy"]
    options = {"scenario": {"epochs": row["scenario.epochs"]}, "strategy": {"lr": 0.1}}
    names = ("scenario", "strategy", "base", "split", "seed", "precision")
    result = Result(
        run={**{name: row[name] for name in names}, "options": options},
        metrics={} if accuracy is None else {"average_accuracy": accuracy},
        status=row["status"],
    )
    RunFolder(root, str(row["run_id"])).write_result(result)


def test_the_report_shows_means_and_what_is_missing(tmp_path: Path) -> None:
    for row in (run("a", 0, 0.25), run("a", 1, 0.75), run("a", 2), run("b|<i>", 0)):
        stored(tmp_path, row)
    broken = tmp_path / "runs" / "broken" / "result.json"
    broken.parent.mkdir()
    broken.write_text("{")
    written = report.write(tmp_path)
    assert all(path.is_file() for path in written)
    text = (tmp_path / "leaderboard" / "leaderboard.md").read_text()
    # Deviation √((0.25² + 0.25²) / 1) = 0.354, its mean's √(0.125 / 2) = 0.25; Student's t for
    # one degree of freedom is tan(0.475 π) = 12.706, and 12.706 · 0.25 = 317.7 %.
    assert "| 1 | a | 2 (1 incomplete) | 50.0 ± 317.7 |" in text
    assert "| 2 | b\\|&lt;i> | 0 (1 incomplete) | - |" in text
    assert f"- `{broken.parent}`" in text
    assert "nan" not in text.lower()


def test_the_report_is_the_same_when_made_again(tmp_path: Path) -> None:
    for row in (run("a", 0, 0.25), run("b", 1, 0.75), run("a", 0, 0.5, **{"scenario.epochs": 3})):
        stored(tmp_path, {**row, "run_id": f"{row['run_id']}-{row['scenario.epochs']}"})
    first = {path: path.read_bytes() for path in report.write(tmp_path)}
    assert {path: path.read_bytes() for path in report.write(tmp_path)} == first
    assert len(read(tmp_path)) == 3


def test_the_csv_says_the_same_as_the_boards(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.25, 0.75)):
        stored(tmp_path, run("a", seed, accuracy))
    report.write(tmp_path)
    (row,) = pd.read_csv(tmp_path / "leaderboard" / "leaderboard.csv").to_dict("records")
    assert row["strategy"] == "a"
    assert row["seeds"] == 2
    assert row["average_accuracy"] == 0.5
    assert row["scenario"] == "digits"
    assert row["epochs"] == 1


def measured(*modules: tuple[str, float, float]) -> dict[str, Any]:
    keys = {"kind": "linear", "size": 1, "score": None, "finetuned": 0}
    return {
        "sensitivity": [{"name": n, "within": [w], "across": [a], **keys} for n, w, a in modules]
    }


def test_a_report_draws_the_sensitivity_that_runs_have_measured(tmp_path: Path) -> None:
    """One figure for the seeds of a configuration; none of tuning, nor of what is incomplete."""
    changes: list[dict[str, Any]] = [
        *({"seed": seed, "strategy_facts": measured(("head", 1.0, 2.0))} for seed in (0, 1)),
        {"run_id": "digits-b-00-s0", "split": "tune", "strategy_facts": measured(("x", 1.0, 2.0))},
        {"run_id": "digits-c-00-s0", "status": "failed", "strategy_facts": measured(("x", 1, 2))},
        {"run_id": "digits-d-00-s0"},
    ]
    for change in changes:
        facts = change.pop("strategy_facts", {})
        status = change.pop("status", "complete")
        name = f"digits-a-00-s{change.get('seed')}"
        row = {"scenario": "digits", "strategy": "a", "seed": 0, "split": "evaluate"}
        row |= {"run_id": name, **change}
        result = Result(run=row, strategy_facts=facts, status=status)
        RunFolder(tmp_path, str(row["run_id"])).write_result(result)
    written = report.write(tmp_path)
    (figure,) = [path for path in written if path.suffix == ".png"]
    assert figure.name == "sensitivity-digits-a-00.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "leaderboard" / "leaderboard.md").read_text()
    assert "![sensitivity-digits-a-00](sensitivity-digits-a-00.png)" in markdown
    before = figure.read_bytes()
    report.write(tmp_path)
    assert figure.read_bytes() == before


def test_a_report_of_unreadable_runs_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "runs" / "broken" / "result.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    report.write(tmp_path)
    assert str(broken.parent) in (tmp_path / "leaderboard" / "leaderboard.md").read_text()


def test_a_report_of_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No runs below"):
        report.write(tmp_path)
