"""The metrics against arithmetic done by hand, their edge cases, and what peers print."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.metrics import (
    BACKWARD_TRANSFER_CONVENTIONS,
    FORGETTING_CONVENTIONS,
    Convention,
    Evaluation,
    anytime_summary,
    average_accuracy,
    average_anytime_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    cumulative_forgetting,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
    learning_curve_area,
    min_accuracy,
    summary,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

Rows = list[list[float | None]]

NULL = None
CLASS_INCREMENTAL: Rows = [[0.9, NULL, NULL], [0.7, 0.8, NULL], [0.6, 0.5, 1.0]]
DOMAIN_INCREMENTAL: Rows = [[0.9, 0.4, 0.3], [0.7, 0.8, 0.6], [0.6, 0.5, 1.0]]
# Experience 0 peaks in the middle, experience 1 improves in the last row, experience 2 drops.
DISPUTED: Rows = [
    [0.90, NULL, NULL, NULL],
    [0.50, 0.80, NULL, NULL],
    [0.95, 0.50, 0.90, NULL],
    [0.70, 0.85, 0.70, 0.90],
]
SUMMARY_KEYS = {
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
}
CONVENTIONS = [*FORGETTING_CONVENTIONS.values(), *BACKWARD_TRANSFER_CONVENTIONS.values()]

Entry = tuple[int, int, Sequence[float | None]]


def matrices(least: int = 1, most: int = 6) -> st.SearchStrategy[Rows]:
    """Full square accuracy matrices, their cells any float of [0, 1]."""
    cells = st.floats(0, 1)
    return st.integers(least, most).flatmap(
        lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=n, max_size=n)
    )


def masked(matrix: Rows) -> Rows:
    """The matrix of a class-incremental run: no cell of an experience to come."""
    return [[v if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(matrix)]


def timeline(*entries: Entry) -> list[Evaluation]:
    """Evaluations from (step, experience, accuracies)."""
    return [Evaluation(step=s, experience=e, accuracies=a) for s, e, a in entries]


# -- the accuracy matrix ---------------------------------------------------------------------


def test_average_accuracy_is_the_mean_of_the_final_row() -> None:
    assert average_accuracy(CLASS_INCREMENTAL) == pytest.approx((0.6 + 0.5 + 1.0) / 3)


def test_average_incremental_accuracy_without_sizes_averages_experiences() -> None:
    rows = [0.9, (0.7 + 0.8) / 2, (0.6 + 0.5 + 1.0) / 3]
    assert average_incremental_accuracy(CLASS_INCREMENTAL) == pytest.approx(sum(rows) / 3)


def test_average_incremental_accuracy_with_sizes_is_the_accuracy_on_the_union() -> None:
    # Test sets of 10, 20 and 70 samples: count the right answers and divide.
    rows = [9 / 10, (7 + 16) / 30, (6 + 10 + 70) / 100]
    assert average_incremental_accuracy(CLASS_INCREMENTAL, [10, 20, 70]) == pytest.approx(
        sum(rows) / 3
    )


def test_forgetting_is_the_drop_from_the_best_earlier_row() -> None:
    # Experience 0: max(0.9, 0.7) - 0.6; experience 1: 0.8 - 0.5.
    assert forgetting(CLASS_INCREMENTAL) == pytest.approx((0.3 + 0.3) / 2)


def test_forgetting_is_negative_when_the_last_experience_helped() -> None:
    assert forgetting([[0.5, None], [0.8, 0.9]]) == pytest.approx(0.5 - 0.8)


def test_forgetting_ignores_accuracy_from_before_an_experience_was_learned() -> None:
    # Row 0 knew experience 1 best, by luck; its drop counts from the diagonal, 0.6 - 0.5.
    matrix: Rows = [[0.5, 0.9, 0.1], [0.5, 0.6, 0.1], [0.5, 0.5, 0.8]]
    assert forgetting(matrix) == pytest.approx((0.0 + 0.1) / 2)
    assert FORGETTING_CONVENTIONS["agem_code"](matrix) == pytest.approx((0.0 + 0.4) / 2)


def test_backward_transfer_is_the_change_since_learned() -> None:
    assert backward_transfer(CLASS_INCREMENTAL) == pytest.approx(((0.6 - 0.9) + (0.5 - 0.8)) / 2)


def test_forward_transfer_is_the_head_start_over_the_random_model() -> None:
    expected = ((0.4 - 0.1) + (0.6 - 0.2)) / 2
    assert forward_transfer(DOMAIN_INCREMENTAL, [0.5, 0.1, 0.2]) == pytest.approx(expected)
    assert forward_transfer(DOMAIN_INCREMENTAL, [None, 0.1, 0.2]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("matrix", "baseline"),
    [
        (CLASS_INCREMENTAL, [0.5, 0.1, 0.2]),
        (DOMAIN_INCREMENTAL, None),
        (DOMAIN_INCREMENTAL, [0.5, None, 0.2]),
        ([[0.5]], [0.1]),
    ],
)
def test_forward_transfer_is_undefined_without_future_cells_or_baseline(
    matrix: Rows, baseline: list[float | None] | None
) -> None:
    assert forward_transfer(matrix, baseline) is None


def test_learning_accuracy_is_the_mean_of_the_diagonal() -> None:
    assert learning_accuracy(CLASS_INCREMENTAL) == pytest.approx((0.9 + 0.8 + 1.0) / 3)


def test_intransigence_is_the_gap_to_joint_training() -> None:
    reference = [0.9, 1.0, 0.9]
    gaps = [0.9 - 0.9, 1.0 - 0.8, 0.9 - 1.0]
    assert intransigence(CLASS_INCREMENTAL, reference) == pytest.approx(sum(gaps) / 3)
    for k, gap in enumerate(gaps):
        assert intransigence(CLASS_INCREMENTAL, reference, k) == pytest.approx(gap)
    assert intransigence(CLASS_INCREMENTAL, None) is None
    assert intransigence(CLASS_INCREMENTAL, [0.9, None, 0.9]) is None
    assert intransigence(CLASS_INCREMENTAL, [0.9, None, 0.9], 2) == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="experience is 3; the run has 0 to 2"):
        intransigence(CLASS_INCREMENTAL, reference, 3)


def test_cumulative_forgetting_takes_the_final_row_into_the_maximum() -> None:
    # k=0: max(0.8, 0.9, 0.7) - 0.7; k=1: max(0.6, 0.75) - 0.75, no negative part.
    kept: Rows = [[0.8, None, None], [0.9, 0.6, None], [0.7, 0.75, 0.5]]
    assert cumulative_forgetting(kept) == pytest.approx((0.2 + 0.0) / 2)
    assert cumulative_forgetting([[0.8]]) is None


def test_cumulative_forgetting_names_its_own_cells() -> None:
    with pytest.raises(ValueError, match=r"cumulative\[0\]\[1\] is 2.0"):
        cumulative_forgetting([[0.8, 2.0], [0.9, 0.6]])


# -- undefined -------------------------------------------------------------------------------


def test_one_experience_leaves_what_compares_experiences_undefined() -> None:
    assert summary([[0.7]], [100], [0.1], [0.9]) == {
        "average_accuracy": 0.7,
        "average_incremental_accuracy": 0.7,
        "forgetting": None,
        "backward_transfer": None,
        "forward_transfer": None,
        "learning_accuracy": 0.7,
        "intransigence": pytest.approx(0.2),
    }
    assert [convention([[0.7]]) for convention in CONVENTIONS] == [None] * len(CONVENTIONS)


def test_two_experiences_make_forgetting_minus_backward_transfer() -> None:
    matrix: Rows = [[0.9, None], [0.4, 0.8]]
    assert forgetting(matrix) == 0.5
    assert backward_transfer(matrix) == -0.5


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_an_unfinished_run_has_no_metrics(rows: int) -> None:
    values = summary(DOMAIN_INCREMENTAL[:rows], [10, 20, 70], [0.1] * 3, [0.9] * 3)
    assert values == dict.fromkeys([*SUMMARY_KEYS, "intransigence"])
    assert [f(DOMAIN_INCREMENTAL[:rows]) for f in CONVENTIONS] == [None] * len(CONVENTIONS)


def test_the_square_part_of_an_unfinished_run_is_a_run() -> None:
    prefix = [row[:2] for row in CLASS_INCREMENTAL[:2]]
    assert average_accuracy(prefix) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("cell", "undefined"),
    [
        # The middle of the first column: in the maximum and in the seen accuracy of row 1.
        ((1, 0), {"average_incremental_accuracy", "forgetting"}),
        ((1, 1), SUMMARY_KEYS - {"average_accuracy", "forward_transfer"}),
        ((2, 0), SUMMARY_KEYS - {"learning_accuracy", "forward_transfer"}),
        ((2, 2), {"average_accuracy", "average_incremental_accuracy", "learning_accuracy"}),
        ((0, 1), {"forward_transfer"}),
        ((0, 2), set()),
    ],
)
@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_missing_cell_makes_undefined_exactly_what_needs_it(
    cell: tuple[int, int], undefined: set[str], missing: float | None
) -> None:
    matrix = [list(row) for row in DOMAIN_INCREMENTAL]
    matrix[cell[0]][cell[1]] = missing
    values = summary(matrix, [10, 20, 70], [0.1, 0.1, 0.1])
    assert {name for name, value in values.items() if value is None} == undefined


def test_summary_is_complete_and_can_be_written() -> None:
    assert set(summary(DOMAIN_INCREMENTAL)) == SUMMARY_KEYS
    values = summary(DOMAIN_INCREMENTAL, [10, 20, 70], [0.5, 0.1, 0.2])
    assert set(values) == SUMMARY_KEYS
    assert {type(value) for value in values.values()} == {float}
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["average_incremental_accuracy"] == average_incremental_accuracy(
        DOMAIN_INCREMENTAL, [10, 20, 70]
    )


def test_arrays_and_lists_are_the_same() -> None:
    array = np.array(CLASS_INCREMENTAL, dtype=np.float64)
    sizes, baseline = np.array([10, 20, 70]), np.array([0.1, 0.1, 0.1])
    assert summary(array, sizes, baseline) == summary(CLASS_INCREMENTAL, [10, 20, 70], [0.1] * 3)


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.01, 1.01, 97.0, math.inf, -math.inf])
def test_a_value_that_is_no_accuracy_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=rf"accuracy_matrix\[1\]\[0\] is {value}"):
        average_accuracy([[0.5, None], [value, 0.5]])
    with pytest.raises(ValueError, match=rf"baseline\[1\] is {value}"):
        forward_transfer([[0.5, 0.5], [0.5, 0.5]], [0.1, value])
    with pytest.raises(ValueError, match=rf"reference\[1\] is {value}"):
        intransigence([[0.5, 0.5], [0.5, 0.5]], [0.1, value])
    with pytest.raises(ValueError, match=rf"evaluations\[0\]\['accuracies'\]\[1\] is {value}"):
        min_accuracy(timeline((1, 1, [0.5, value])))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.5], [0.5, 0.5]], r"accuracy_matrix\[1\] has 2 cells, accuracy_matrix\[0\] has 1"),
        ([[0.5, 0.5], [0.5]], r"accuracy_matrix\[1\] has 1 cells, accuracy_matrix\[0\] has 2"),
        ([[0.5], [0.5]], "has 2 rows for 1 experiences"),
        ([[[0.5]]], r"accuracy_matrix\[0\] has shape \(1, 1\)"),
    ],
)
def test_a_matrix_of_another_shape_is_refused(matrix: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        summary(matrix)


@pytest.mark.parametrize("bad", [[0.5], [0.5] * 3])
def test_a_vector_of_another_length_is_refused(bad: list[float]) -> None:
    matrix: Rows = [[0.5, 0.5], [0.5, 0.5]]
    for arguments in ({"sizes": bad}, {"baseline": bad}, {"reference": bad}):
        with pytest.raises(ValueError, match=r"has shape \(\d,\), not \(2,\)"):
            summary(matrix, **arguments)


@pytest.mark.parametrize("size", [0, -1, math.inf, math.nan])
def test_a_size_that_is_no_number_of_samples_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match=rf"sizes\[1\] is {float(size)}"):
        average_incremental_accuracy([[0.5, 0.5], [0.5, 0.5]], [1, size])


# -- what peers print ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected", "printed"),
    [
        # Drops from the best of rows j..2 to row 3: 0.95-0.70, 0.80-0.85, 0.90-0.70.
        ("chaudhry", (0.25 - 0.05 + 0.20) / 3, 0.1333),
        # The final row in the maximum turns -0.05 into 0.
        ("mammoth", (0.25 + 0.00 + 0.20) / 3, 0.15),
        ("pilot", (0.25 + 0.00 + 0.20) / 3, 0.15),
        # First minus last: 0.90-0.70, 0.80-0.85, 0.90-0.70.
        ("avalanche", (0.20 - 0.05 + 0.20) / 3, 0.1167),
        # The same without experience 2, still divided by 3.
        ("libcontinual", (0.20 - 0.05) / 3, 0.05),
    ],
)
def test_peers_disagree_on_the_forgetting_of_one_matrix(
    name: str, expected: float, printed: float
) -> None:
    value = FORGETTING_CONVENTIONS[name](DISPUTED)
    assert value == pytest.approx(expected)
    assert value == pytest.approx(printed, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "expected", "printed"),
    [
        ("lopez_paz", (-0.20 + 0.05 - 0.20) / 3, -0.1167),
        # Rows 1, 2, 3 minus the diagonal: -0.40; +0.05 -0.30; -0.20 +0.05 -0.20; 6 cells.
        ("continuum", (-0.40 + (0.05 - 0.30) + (-0.20 + 0.05 - 0.20)) / 6, -0.1667),
        # Without the cells next to the diagonal: +0.05; -0.20 +0.05; still divided by 6.
        ("libcontinual", (0.05 + (-0.20 + 0.05)) / 6, -0.0167),
    ],
)
def test_peers_disagree_on_the_backward_transfer_of_one_matrix(
    name: str, expected: float, printed: float
) -> None:
    value = BACKWARD_TRANSFER_CONVENTIONS[name](DISPUTED)
    assert value == pytest.approx(expected)
    assert value == pytest.approx(printed, abs=5e-5)


def test_gem_code_divides_by_all_experiences() -> None:
    value = BACKWARD_TRANSFER_CONVENTIONS["gem_code"](DISPUTED)
    assert value == pytest.approx((-0.20 + 0.05 - 0.20 + 0.00) / 4)


def test_coda_prompt_averages_drops_from_row_to_row() -> None:
    # Row 0 to 1: 0.40. Row 1 to 2: -0.45, 0.30. Row 2 to 3: 0.25, -0.35, 0.20.
    rows = [0.40, (-0.45 + 0.30) / 2, (0.25 - 0.35 + 0.20) / 3]
    assert FORGETTING_CONVENTIONS["coda_prompt_code"](DISPUTED) == pytest.approx(sum(rows) / 3)


def test_closer_look_weights_by_size() -> None:
    # R_nn - R_in: row 1: 0.2; row 2: 0.3, 0.3. Shares of the seen: 10/30; 10/100, 20/100.
    convention = FORGETTING_CONVENTIONS["closer_look"]
    expected = (0.2 * 10 / 30 + 0.3 * 10 / 100 + 0.3 * 20 / 100) / 2
    assert convention(CLASS_INCREMENTAL, [10, 20, 70]) == pytest.approx(expected)
    equal = (0.2 / 2 + 0.3 / 3 + 0.3 / 3) / 2
    assert convention(CLASS_INCREMENTAL) == pytest.approx(equal)
    assert convention(CLASS_INCREMENTAL, [7, 7, 7]) == pytest.approx(equal)


def test_libcontinual_needs_three_experiences() -> None:
    matrix: Rows = [[0.9, None], [0.4, 0.8]]
    assert FORGETTING_CONVENTIONS["libcontinual"](matrix) is None
    assert BACKWARD_TRANSFER_CONVENTIONS["libcontinual"](matrix) is None


def test_agem_code_needs_the_cells_of_future_experiences() -> None:
    assert FORGETTING_CONVENTIONS["agem_code"](CLASS_INCREMENTAL) is None
    assert FORGETTING_CONVENTIONS["agem_code"](DOMAIN_INCREMENTAL) == pytest.approx(0.3)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_explain_themselves_and_only_one_reads_sizes(
    convention: Convention,
) -> None:
    sized = convention is FORGETTING_CONVENTIONS["closer_look"]
    assert convention.__doc__
    assert "Σ" in convention.__doc__
    changed = convention(DOMAIN_INCREMENTAL, [10, 20, 70]) != convention(DOMAIN_INCREMENTAL)
    assert changed is sized


# -- properties ------------------------------------------------------------------------------


def defined(value: float | None) -> float:
    assert value is not None
    return value


@given(matrices(least=2))
def test_forgetting_is_never_below_minus_backward_transfer(matrix: Rows) -> None:
    assert defined(forgetting(matrix)) >= -defined(backward_transfer(matrix))


@given(matrices(least=2, most=2))
def test_both_are_equal_for_two_experiences(matrix: Rows) -> None:
    assert defined(forgetting(matrix)) == -defined(backward_transfer(matrix))


@given(matrices(least=2))
def test_order_of_the_conventions(matrix: Rows) -> None:
    values = {
        name: defined(FORGETTING_CONVENTIONS[name](matrix)) for name in ("mammoth", "avalanche")
    }
    assert values["avalanche"] <= defined(forgetting(matrix)) <= values["mammoth"]
    assert defined(forgetting(matrix)) <= defined(FORGETTING_CONVENTIONS["agem_code"](matrix))
    assert values["mammoth"] >= 0
    assert values["avalanche"] == -defined(backward_transfer(matrix))


@given(matrices(least=3), st.data())
def test_values_stay_in_their_ranges(matrix: Rows, data: st.DataObject) -> None:
    n = len(matrix)
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=n, max_size=n))
    row = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    values = summary(matrix, sizes, row, row)
    signed = {"forgetting", "backward_transfer", "forward_transfer", "intransigence"}
    for name, value in values.items():
        assert (-1 if name in signed else 0) - 1e-12 <= defined(value) <= 1 + 1e-12
    for convention in CONVENTIONS:
        assert -1 <= defined(convention(matrix, sizes)) <= 1
    assert 0 <= defined(cumulative_forgetting(matrix)) <= 1


@given(matrices())
def test_cells_of_future_experiences_change_nothing_but_forward_transfer(matrix: Rows) -> None:
    baseline = [0.5] * len(matrix)
    full, seen = summary(matrix, None, baseline), summary(masked(matrix), None, baseline)
    assert seen.pop("forward_transfer") is None
    full.pop("forward_transfer")
    assert full == seen


@given(matrices(), st.integers(1, 10**6))
def test_equal_sizes_are_no_sizes(matrix: Rows, size: int) -> None:
    with_sizes = average_incremental_accuracy(matrix, [size] * len(matrix))
    assert with_sizes == pytest.approx(defined(average_incremental_accuracy(matrix)))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.data())
def test_average_accuracy_does_not_depend_on_the_order(
    final: list[float], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(final))
    rows: Rows = [[0.5] * len(final) for _ in final[1:]]
    assert average_accuracy([*rows, list(final)]) == pytest.approx(
        defined(average_accuracy([*rows, list(shuffled)]))
    )


@given(matrices(least=2), st.data())
def test_sizes_of_one_row_follow_the_permutation(matrix: Rows, data: st.DataObject) -> None:
    """The union accuracy at the end only knows which experience has which size."""
    n = len(matrix)
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n))
    order = data.draw(st.permutations(range(n)))

    def at_the_end(columns: list[int]) -> float:
        rows: Rows = [[0.0] * n for _ in range(n - 1)]
        rows.append([matrix[-1][j] for j in columns])
        return n * defined(average_incremental_accuracy(rows, [sizes[j] for j in columns]))

    assert at_the_end(list(order)) == pytest.approx(at_the_end(list(range(n))))


# -- while the run is under way --------------------------------------------------------------

RUN = timeline(
    (1, 0, [0.4]),
    (2, 0, [0.8]),
    (3, 1, [0.3, 0.5]),
    (4, 1, [0.6, 0.9]),
    (5, 2, [0.5, 0.2, 0.6]),
    (6, 2, [0.4, 0.7, 0.7]),
)


def test_min_accuracy_is_the_lowest_point_after_learning() -> None:
    # Experience 0 over steps 3 to 6: 0.3; experience 1 over steps 5 and 6: 0.2.
    assert min_accuracy(RUN) == pytest.approx((0.3 + 0.2) / 2)
    # While experience 1 is learned, experience 0 alone is old.
    assert min_accuracy(RUN[:4]) == pytest.approx(0.3)


def test_min_accuracy_leaves_out_the_model_at_the_end_of_learning() -> None:
    # Step 2 is evaluated twice, once under each experience, and is the end of experience 0.
    run = timeline((2, 0, [0.1]), (2, 1, [0.1, 0.0]), (3, 1, [0.6, 0.5]))
    assert min_accuracy(run) == pytest.approx(0.6)
    assert min_accuracy(run[:2]) is None


def test_min_accuracy_takes_the_measured_points_only() -> None:
    run = timeline((2, 0, [0.9]), (3, 1, [None, 0.2]), (4, 1, [0.6, None]))
    assert min_accuracy(run) == pytest.approx(0.6)
    assert min_accuracy(run[:2]) is None


def test_worst_case_accuracy_weighs_the_current_experience_as_one_of_all() -> None:
    assert worst_case_accuracy(RUN) == pytest.approx(0.7 / 3 + (1 - 1 / 3) * 0.25)
    assert worst_case_accuracy(RUN[:4]) == pytest.approx(0.9 / 2 + (1 - 1 / 2) * 0.3)


def test_worst_case_accuracy_of_one_experience_is_its_accuracy() -> None:
    assert min_accuracy(RUN[:2]) is None
    assert worst_case_accuracy(RUN[:2]) == 0.8
    assert worst_case_accuracy(timeline((1, 0, [None]))) is None


def test_worst_case_accuracy_needs_both_parts() -> None:
    assert worst_case_accuracy(timeline((1, 0, [0.9]), (2, 1, [0.5, None]))) is None
    assert worst_case_accuracy(timeline((1, 0, [0.9]), (2, 1, [None, 0.5]))) is None


@pytest.mark.parametrize(
    ("window", "drops", "rises"),
    [
        # Neighbours only. 0: 0.8->0.3, 0.4->0.8; 1: 0.9->0.2, 0.2->0.7; 2: none, 0.6->0.7.
        (2, [0.5, 0.7, 0.0], [0.4, 0.5, 0.1]),
        # Over the whole run nothing is larger.
        (100, [0.5, 0.7, 0.0], [0.4, 0.5, 0.1]),
    ],
)
def test_windowed_metrics_are_the_largest_moves(
    window: int, drops: list[float], rises: list[float]
) -> None:
    assert windowed_forgetting(RUN, window) == pytest.approx(sum(drops) / 3)
    assert windowed_plasticity(RUN, window) == pytest.approx(sum(rises) / 3)


def test_a_wider_window_sees_slower_moves() -> None:
    run = timeline(*((s, 0, [a]) for s, a in enumerate([0.9, 0.8, 0.6, 0.7, 0.1])))
    # A window of Δ evaluations holds moves over at most Δ-1 of them.
    assert windowed_forgetting(run, 2) == pytest.approx(0.7 - 0.1)
    assert windowed_forgetting(run, 4) == pytest.approx(0.8 - 0.1)
    assert windowed_forgetting(run, 5) == pytest.approx(0.9 - 0.1)
    assert windowed_plasticity(run, 2) == windowed_plasticity(run, 5) == pytest.approx(0.7 - 0.6)


def test_a_hole_does_not_widen_the_window() -> None:
    run = timeline((0, 0, [0.9]), (1, 0, [None]), (2, 0, [0.1]))
    assert windowed_forgetting(run, 2) is None
    assert windowed_forgetting(run, 3) == pytest.approx(0.8)


def test_windowed_metrics_leave_out_experiences_with_one_point() -> None:
    run = timeline((1, 0, [0.8]), (2, 1, [0.5, 0.7]))
    assert windowed_forgetting(run, 10) == pytest.approx(0.3)
    assert windowed_plasticity(run, 10) == 0.0
    assert windowed_forgetting(run[:1], 10) is None


def test_average_anytime_accuracy_averages_evaluations() -> None:
    rows = [0.4, 0.8, 0.8 / 2, 1.5 / 2, 1.3 / 3, 1.8 / 3]
    assert average_anytime_accuracy(RUN) == pytest.approx(sum(rows) / 6)
    assert average_anytime_accuracy(timeline((1, 1, [0.5, None]))) is None


def test_entries_of_experiences_to_come_are_not_used() -> None:
    future = timeline(*((e["step"], e["experience"], [*e["accuracies"], 0.0]) for e in RUN))
    assert anytime_summary(future, 3) == anytime_summary(RUN, 3)


def test_learning_curve_area_is_the_mean_of_the_first_batches() -> None:
    areas = [(0.4 + 0.8) / 2, (0.5 + 0.9) / 2, (0.6 + 0.7) / 2]
    assert learning_curve_area(RUN, 2) == pytest.approx(sum(areas) / 3)
    assert learning_curve_area(RUN, 1) == pytest.approx((0.4 + 0.5 + 0.6) / 3)
    assert learning_curve_area(RUN, 3) is None


def test_learning_curve_area_can_begin_with_the_untrained_model() -> None:
    run = timeline((0, 0, [0.1]), (1, 0, [0.5]), (1, 1, [0.5, 0.2]), (2, 1, [0.5, 0.8]))
    assert learning_curve_area(run, 2) == pytest.approx((0.3 + 0.5) / 2)


@pytest.mark.parametrize(
    "run",
    [
        timeline((1, 0, [0.5]), (3, 0, [0.5])),
        timeline((2, 0, [0.5]), (3, 0, [0.5])),
        timeline((1, 0, [0.5]), (2, 0, [0.5]), (4, 1, [0.5, 0.5]), (5, 1, [0.5, 0.5])),
        timeline((1, 0, [0.5]), (2, 0, [None])),
        timeline((1, 1, [0.5, 0.5]), (2, 1, [0.5, 0.5])),
    ],
    ids=["gap", "late", "late later", "unmeasured", "missing experience"],
)
def test_learning_curve_area_needs_every_batch(run: list[Evaluation]) -> None:
    assert learning_curve_area(run, 2) is None


@pytest.mark.parametrize(
    "metric",
    [
        min_accuracy,
        worst_case_accuracy,
        average_anytime_accuracy,
        lambda run: windowed_forgetting(run, 10),
        lambda run: windowed_plasticity(run, 10),
        lambda run: learning_curve_area(run, 10),
    ],
)
def test_nothing_measured_is_undefined(metric: Callable[[list[Evaluation]], float | None]) -> None:
    assert metric([]) is None


def test_anytime_summary_names_windows_and_beta() -> None:
    values = anytime_summary(RUN, 3, windows=(2, 5), beta=2)
    assert values == {
        "min_accuracy": min_accuracy(RUN),
        "worst_case_accuracy": worst_case_accuracy(RUN),
        "average_anytime_accuracy": average_anytime_accuracy(RUN),
        "learning_curve_area_2": learning_curve_area(RUN, 2),
        "windowed_forgetting_2": windowed_forgetting(RUN, 2),
        "windowed_plasticity_2": windowed_plasticity(RUN, 2),
        "windowed_forgetting_5": windowed_forgetting(RUN, 5),
        "windowed_plasticity_5": windowed_plasticity(RUN, 5),
    }
    assert {type(value) for value in values.values()} == {float}
    assert json.loads(json.dumps(values, allow_nan=False)) == values


@pytest.mark.parametrize("run", [[], RUN[:4], RUN[2:]], ids=["empty", "unfinished", "beheaded"])
def test_anytime_summary_of_part_of_a_run_is_undefined(run: list[Evaluation]) -> None:
    values = anytime_summary(run, 3)
    assert values == dict.fromkeys(anytime_summary(RUN, 3))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (timeline((2, 0, [0.5]), (1, 0, [0.5])), r"evaluations\[1\] is not later"),
        (timeline((2, 0, [0.5]), (2, 0, [0.5])), r"evaluations\[1\] is not later"),
        (timeline((1, 1, [0.5, 0.5]), (2, 0, [0.5])), r"evaluations\[1\] is not later"),
        (timeline((3, 0, [0.5]), (2, 1, [0.5, 0.5])), r"evaluations\[1\] is not later"),
        (timeline((1, 1, [0.5])), r"\[0\]\['accuracies'\] has 1 values for experience 1"),
        (timeline((-1, 0, [0.5])), r"\[0\].* at step -1"),
        (timeline((1, 3, [0.5] * 4)), "experience 3 was evaluated, but the run has only 3"),
    ],
)
def test_malformed_evaluations_are_named(run: list[Evaluation], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anytime_summary(run, 3)


def test_windows_and_beta_have_a_least() -> None:
    with pytest.raises(ValueError, match="window is 1; it must be at least 2"):
        windowed_forgetting(RUN, 1)
    with pytest.raises(ValueError, match="beta is 0; it must be at least 1"):
        learning_curve_area(RUN, 0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.integers(2, 14))
def test_windowed_forgetting_is_the_largest_of_all_pairs(curve: list[float], window: int) -> None:
    run = timeline(*((s, 0, [a]) for s, a in enumerate(curve)))
    falls = [
        curve[m] - curve[n]
        for m in range(len(curve))
        for n in range(m + 1, min(m + window, len(curve)))
    ]
    assert windowed_forgetting(run, window) == max(0.0, *falls)
    backwards = timeline(*((s, 0, [a]) for s, a in enumerate(curve[::-1])))
    assert windowed_plasticity(backwards, window) == windowed_forgetting(run, window)


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_anytime_metrics_stay_in_range_and_in_order(
    experiences: int, evaluations: int, data: st.DataObject
) -> None:
    cells = st.floats(0, 1)
    run = timeline(
        *(
            (
                k * evaluations + m + 1,
                k,
                data.draw(st.lists(cells, min_size=k + 1, max_size=k + 1)),
            )
            for k in range(experiences)
            for m in range(evaluations)
        )
    )
    values = anytime_summary(run, experiences, windows=(2, 5), beta=1)
    for value in values.values():
        assert value is None or 0 <= value <= 1 + 1e-12
    final = np.mean([defined(a) for a in run[-1]["accuracies"]])
    assert defined(values["worst_case_accuracy"]) <= final + 1e-12
    for name in ("windowed_forgetting", "windowed_plasticity"):
        if values[f"{name}_2"] is not None:
            assert defined(values[f"{name}_2"]) <= defined(values[f"{name}_5"])
