"""Boards from made-up runs whose means and deviations are worked out by hand."""

from __future__ import annotations

import random
from typing import Any

import pandas as pd
import pytest

from clbench.leaderboard import AVERAGED, Board, build
from clbench.statistics import deviation, interval

SCORE = "average_accuracy"
TUNED = {"tuned": "two_phase", "study": "s", "budget.trials": 8, "budget.seeds": 2}


def run(strategy: str, seed: int, accuracy: float | None = None, **changes: Any) -> dict[str, Any]:
    """A row as `read` gives it; without an accuracy it is a run that did not complete."""
    row = {
        "run_id": f"{strategy}-{seed}",
        "status": "failed" if accuracy is None else "complete",
        "reason": "it was killed" if accuracy is None else None,
        "path": f"runs/{strategy}-{seed}-{sorted(changes.items())}",
        "scenario": "digits",
        "setting": "class_incremental",
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


def boards(*rows: dict[str, Any]) -> list[Board]:
    return build(table(*rows)).boards


def rows(board: Board) -> list[tuple[Any, ...]]:
    """Strategy, complete seeds, and those that failed, diverged or are missing."""
    names = ["strategy", "seeds", "failed", "diverged", "missing"]
    return list(board.table[names].itertuples(index=False, name=None))


def test_means_and_sample_deviations_over_seeds() -> None:
    (board,) = boards(run("a", 0, 0.2), run("a", 1, 0.4), run("a", 2, 0.9), run("b", 0, 0.6))
    assert rows(board) == [("b", 1, 0, 0, 0), ("a", 3, 0, 0, 0)]
    assert board.table["rank"].tolist() == [1, 2]
    a = board.table.set_index("strategy").loc["a"]
    assert a[SCORE] == pytest.approx(0.5)
    # ((0.3)^2 + (0.1)^2 + (0.4)^2) / (3 - 1) = 0.13; t of two degrees is 4.303, √3 = 1.732.
    assert a[f"{SCORE}_std"] == pytest.approx(0.13**0.5)
    assert a[f"{SCORE}_half_width"] == pytest.approx(4.30265 * 0.13**0.5 / 3**0.5, rel=1e-5)
    b = board.table.set_index("strategy").loc["b"]
    assert b[SCORE] == pytest.approx(0.6)
    assert pd.isna(b[f"{SCORE}_std"]), "one seed has no deviation"
    assert pd.isna(b[f"{SCORE}_half_width"])


def test_a_table_says_what_the_statistics_say() -> None:
    generator = random.Random(0)
    drawn = {s: [generator.random() for _ in range(n)] for s, n in (("a", 2), ("b", 5), ("c", 30))}
    (board,) = boards(*(run(s, i, v) for s, values in drawn.items() for i, v in enumerate(values)))
    for _, row in board.table.iterrows():
        values = drawn[row["strategy"]]
        found = interval(values)
        assert row[SCORE] == pytest.approx(found.mean)
        assert row[f"{SCORE}_std"] == pytest.approx(deviation(values))
        assert row[f"{SCORE}_half_width"] == pytest.approx(found.half_width)


def test_every_averaged_column_is_there_even_if_no_run_has_it() -> None:
    (board,) = boards(run("a", 0, 0.2), run("a", 1, 0.4))
    for column in AVERAGED:
        assert {column, f"{column}_std", f"{column}_half_width"} <= set(board.table)
    assert pd.isna(board.table["learning_accuracy"][0])


def test_a_mean_is_null_where_one_seed_lacks_the_number() -> None:
    (board,) = boards(run("a", 0, 0.2, forgetting=0.5), run("a", 1, 0.4, forgetting=None))
    assert board.table[SCORE][0] == pytest.approx(0.3)
    assert pd.isna(board.table["forgetting"][0])


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"scenario.epochs": 2}, (1, 2)),
        ({"split": "tune"}, ("evaluate", "tune")),
        ({"precision": "bf16"}, ("fp32", "bf16")),
        ({"benchmark": 2}, (None, 2)),
        ({"scenario.head": "cosine"}, (None, "cosine")),
        ({"data.fonts": "5f3a"}, (None, "5f3a")),
        ({"scenario.backbone.hidden": "[3]"}, (None, "[3]")),
    ],
    ids=lambda change: next(iter(change)),
)
def test_results_of_different_scenarios_never_mix_and_say_why(
    change: dict[str, Any], values: tuple[Any, Any]
) -> None:
    found = boards(run("a", 0, 0.2), run("a", 1, 0.9, **change))
    assert [rows(board) for board in found] == [[("a", 1, 0, 0, 0)]] * 2
    by_score = {board.table[SCORE][0]: board for board in found}
    (key,) = change
    assert by_score[0.2].options.get(key) == values[0]
    assert by_score[0.9].options.get(key) == values[1]
    assert by_score[0.2].differs == {key: (values[1],)}
    assert by_score[0.9].differs == {key: (values[0],)}


def test_other_scenarios_are_other_boards_and_need_no_reason() -> None:
    found = boards(run("a", 0, 0.2), run("a", 0, 0.9, scenario="glyphs", **{"scenario.width": 3}))
    assert [(b.scenario, b.table[SCORE][0]) for b in found] == [("digits", 0.2), ("glyphs", 0.9)]
    assert [b.differs for b in found] == [{}, {}]
    assert "scenario.width" not in found[0].options


def test_the_device_and_the_machine_divide_nothing() -> None:
    (board,) = boards(
        run("a", 0, 0.2, device="cpu", code="1"), run("a", 1, 0.4, device="H", code="2")
    )
    assert rows(board) == [("a", 2, 0, 0, 0)]


def test_runs_that_did_not_complete_are_counted_and_leave_no_mean() -> None:
    found = build(
        table(
            run("a", 0, 0.2),
            run("a", 1, status="diverged", reason="the loss is nan"),
            run("a", 2, status="failed", average_accuracy=0.99),
            run("b", 0, status="diverged"),
            run("c", 0, 0.1),
        )
    )
    (board,) = found.boards
    assert rows(board) == [("c", 1, 0, 0, 0), ("a", 1, 1, 1, 0), ("b", 0, 0, 1, 0)]
    assert board.table[SCORE][0] == pytest.approx(0.1)
    assert board.table[SCORE][1:].isna().all(), "the seeds that survived are no fair sample"
    assert board.table["rank"].tolist() == [1, pd.NA, pd.NA]
    assert found.left_out["kind"].tolist() == ["failed", "diverged", "diverged"]
    assert "the loss is nan" in found.left_out["reason"].tolist()
    assert len(board.runs) == 5


def test_seeds_that_a_budget_planned_and_nobody_ran_are_missing() -> None:
    planned = {**TUNED, "budget.seeds": 3}
    (board,) = boards(
        *(run("a", seed, 0.5, **planned) for seed in range(3)),
        *(run("b", seed, 0.9, **{**planned, "study": "t"}) for seed in range(2)),
        run("c", 0, 0.7),
    )
    assert rows(board) == [("c", 1, 0, 0, 0), ("a", 3, 0, 0, 0), ("b", 2, 0, 0, 1)]
    assert pd.isna(board.table[SCORE][2])


def test_a_seed_counts_once_and_the_others_are_named() -> None:
    """Two machines, or two copies of one folder, are no second seed."""
    found = build(
        table(
            run("a", 0, 0.2, path="runs/1"),
            run("a", 0, 0.2, path="theirs/1"),
            run("a", 0, 0.8, path="theirs/2"),
            run("a", 1, 0.4, path="runs/2"),
            run("a", 1, path="runs/0", reason="killed"),
        )
    )
    (board,) = found.boards
    assert rows(board) == [("a", 2, 0, 0, 0)]
    assert board.table[SCORE][0] == pytest.approx(0.3)
    left = {row.path: (row.kind, row.reason) for row in found.left_out.itertuples()}
    assert left == {
        "theirs/1": ("duplicate", "the same numbers as runs/1, which counts"),
        "theirs/2": ("duplicate", "other numbers than runs/1, which counts"),
        "runs/0": ("failed", "killed; runs/2 is another attempt"),
    }


def test_namesakes_are_told_apart_by_the_options_that_differ() -> None:
    (board,) = boards(
        run("a", 0, 0.3, **{"strategy.lr": 0.1, "strategy.momentum": 0.9}),
        run("a", 0, 0.2, **{"strategy.lr": 0.2, "strategy.momentum": 0.9}),
        run("b", 0, 0.1, **{"strategy.lr": 0.5, "strategy.momentum": 0.0}),
    )
    assert list(board.table["strategy"]) == ["a (lr=0.1)", "a (lr=0.2)", "b"]
    assert list(board.table["name"]) == ["a", "a", "b"]


def test_what_was_tuned_needs_no_options_to_be_told_from_what_was_not() -> None:
    (board,) = boards(
        *(run("a", seed, 0.5, **TUNED) for seed in range(2)),
        run("a", 0, 0.3, **{"strategy.lr": 0.123456}),
        run("a", 0, 0.2, **{"strategy.lr": 1e-9}),
    )
    names = ["a (two-phase)", "a (untuned, lr=0.1235)", "a (untuned, lr=1e-09)"]
    assert list(board.table["strategy"]) == names


def test_options_that_differ_in_their_last_digits_are_written_out() -> None:
    values = (0.123456, 0.123457)
    (board,) = boards(*(run("a", 0, v, **{"strategy.lr": v}) for v in values))
    assert list(board.table["strategy"]) == ["a (lr=0.123457)", "a (lr=0.123456)"]


def test_wrappers_are_named_with_what_they_wrap() -> None:
    (board,) = boards(
        run("refresh", 0, 0.3, base="derpp", **{"strategy.base.alpha": 0.1}),
        run("refresh", 0, 0.2, base="er_ace"),
        run("refresh", 1, 0.4, base="derpp", **{"strategy.base.alpha": 0.1}),
        run("derpp", 0, 0.1, **{"strategy.alpha": 0.1}),
    )
    names = ["refresh over derpp", "refresh over er_ace", "derpp"]
    assert list(board.table["strategy"]) == names


def test_options_of_mixed_types_are_no_obstacle() -> None:
    values = [0.5, "auto", None, True]
    (board,) = boards(*(run("a", 0, 0.1 * i, **{"strategy.x": v}) for i, v in enumerate(values)))
    assert len(board.table) == 4
    assert board.table["seeds"].tolist() == [1] * 4


def test_equal_scores_share_a_rank() -> None:
    (board,) = boards(run("a", 0, 0.5), run("b", 0, 0.5), run("c", 0, 0.4))
    assert board.table["rank"].tolist() == [1, 1, 3]


def test_errors_are_ranked_the_other_way_round() -> None:
    way = {"setting": "test_time_adaptation"}
    (board,) = boards(
        run("a", 0, 0.9, online_error=0.4, **way), run("b", 0, 0.1, online_error=0.2, **way)
    )
    assert board.headline == "online_error"
    assert list(board.table["strategy"]) == ["b", "a"]


# Protocols and budgets.


def test_trials_of_a_search_are_counted_and_in_no_board() -> None:
    found = build(table(run("a", 0, 0.2), run("a", 10**6, 0.9, tuned="trial", split="tune")))
    assert [rows(board) for board in found.boards] == [[("a", 1, 0, 0, 0)]]
    assert found.trials == 1


def test_what_nobody_tuned_stands_beside_what_was_tuned_and_is_told_apart() -> None:
    (board,) = boards(
        *(run("a", seed, 0.5, **TUNED) for seed in range(2)),
        run("a", 0, 0.3, **{"strategy.lr": 0.2}),
        run("b", 0, 0.4),
    )
    assert board.protocol == "two_phase"
    assert list(board.table["strategy"]) == ["a (two-phase)", "b", "a (untuned)"]
    assert board.table["tuned"].fillna("").tolist() == ["two_phase", "", ""]


def test_budgets_never_share_a_board_and_both_stand_beside_what_nobody_tuned() -> None:
    small, large = TUNED, {**TUNED, "budget.trials": 30, "study": "t"}
    found = boards(
        *(run("a", seed, 0.5, **small) for seed in range(2)),
        *(run("a", seed, 0.6, **large) for seed in range(2)),
        run("b", 0, 0.4),
    )
    assert [b.options["budget.trials"] for b in found] == [30, 8]
    assert [list(b.table["strategy"]) for b in found] == [["a", "b"]] * 2
    assert [b.differs for b in found] == [{"budget.trials": (8,)}, {"budget.trials": (30,)}]


def test_what_was_tuned_on_what_it_reports_has_a_board_of_its_own() -> None:
    conventional = {**TUNED, "tuned": "conventional", "study": "c"}
    found = boards(
        *(run("a", seed, 0.5, **TUNED) for seed in range(2)),
        *(run("a", seed, 0.6, **conventional) for seed in range(2)),
        run("b", 0, 0.4),
    )
    assert [b.protocol for b in found] == ["two_phase", "conventional"]
    assert [list(b.table["strategy"]) for b in found] == [["a", "b"], ["a"]]
    assert found[0].differs == {"protocol": ("conventional",)}


def test_searches_of_one_strategy_that_chose_alike_are_rows_of_their_own() -> None:
    (board,) = boards(
        *(run("a", seed, 0.5, **TUNED) for seed in range(2)),
        *(run("a", seed, 0.6, **{**TUNED, "study": "t"}) for seed in range(2)),
    )
    assert list(board.table["strategy"]) == ["a (study t)", "a (study s)"]


def test_what_a_search_cost_is_joined_by_its_name() -> None:
    made = table(*(run("a", seed, 0.5, **TUNED) for seed in range(2)), run("b", 0, 0.4))
    (board,) = build(made, {"s": {"tuning_seconds": 12.5, "tuning_trials": 8}}).boards
    assert board.table["tuning_seconds"].tolist() == [
        12.5,
        pytest.approx(float("nan"), nan_ok=True),
    ]
    assert board.table["tuning_trials"][0] == 8
    (board,) = build(made).boards
    assert board.table["tuning_seconds"].isna().all()


# What a strategy needs.


def test_what_keeps_no_sample_in_any_run_is_exemplar_free() -> None:
    (board,) = boards(
        run("a", 0, 0.3, memory_samples=0),
        run("a", 1, 0.3, memory_samples=0),
        run("b", 0, 0.2, memory_samples=200),
        run("c", 0, 0.1),
    )
    assert board.table["exemplar_free"].fillna("?").tolist() == [True, False, "?"]


def test_models_that_began_trained_are_told_apart() -> None:
    (board,) = boards(
        run("a", 0, 0.3, pretrained=True), run("b", 0, 0.2, pretrained=False), run("c", 0, 0.1)
    )
    assert board.table["pretrained"].fillna("?").tolist() == [True, False, "?"]


# Whole tables.


def test_the_order_of_the_rows_does_not_matter() -> None:
    made = [run(s, i, 0.1 * i + 0.05 * len(s)) for s in ("a", "bb", "ccc") for i in range(3)]
    made += [run("a", 0, 0.3, **{"scenario.epochs": e}) for e in (5, 3)]
    expected = build(table(*made))
    random.Random(0).shuffle(made)
    found = build(table(*made))
    for one, other in zip(found.boards, expected.boards, strict=True):
        pd.testing.assert_frame_equal(one.table, other.table)
        assert one.options == other.options
        assert one.differs == other.differs


def test_the_table_stays_as_it_was() -> None:
    given = table(run("a", 0, 0.2), run("b", 0), run("b", 0))
    before = given.copy()
    build(given)
    pd.testing.assert_frame_equal(given, before)


def test_no_runs_no_boards() -> None:
    assert build(pd.DataFrame()).boards == []
    nothing = [
        {"run_id": "x", "status": status, "reason": "why", "path": status}
        for status in ("unfinished", "unreadable")
    ]
    found = build(table(*nothing))
    assert found.boards == []
    assert found.left_out["kind"].tolist() == ["unreadable", "unfinished"]
    (board,) = boards(run("a", 0, 0.2), *nothing)
    assert rows(board) == [("a", 1, 0, 0, 0)]
