"""Statistics against scipy and against hand-worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from clbench import statistics as st


def test_the_t_interval_is_scipys() -> None:
    scores = [0.5, 0.7, 0.6, 0.65]
    found = st.interval(scores)
    low, high = stats.t.interval(0.95, 3, np.mean(scores), stats.sem(scores))
    assert (found.mean, found.low, found.high) == pytest.approx((0.6125, low, high))
    assert found.half_width == pytest.approx((high - low) / 2)


def test_the_t_interval_covers_what_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = [
        (i.low or 0) <= 0.3 <= (i.high or 0)
        for i in (st.interval(generator.normal(0.3, 0.1, 4)) for _ in range(2000))
    ]
    # Four standard errors of a share of 0.95 in 2,000 draws.
    assert abs(np.mean(covered) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_the_bootstrap_agrees_with_scipys() -> None:
    scores = np.random.default_rng(1).normal(size=40)
    found = st.interval(scores, method="bootstrap")
    expected = stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=20_000, rng=2
    ).confidence_interval
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)
    assert st.interval(scores, method="bootstrap") == found


@pytest.mark.parametrize("scores", [[], [0.5]])
def test_too_few_scores_have_no_interval(scores: list[float]) -> None:
    found = st.interval(scores)
    assert found.mean == (0.5 if scores else None)
    assert found.low is None
    assert found.high is None
    assert found.half_width is None
    assert st.deviation(scores) is None


def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side() -> None:
    assert st.interquartile_mean([100, 1, 2, 3, 4, 5, 6, -50]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    scores = np.random.default_rng(0).normal(size=37)
    assert st.interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25))
    assert st.interquartile_mean([]) is None


def test_the_stratified_interval_keeps_scenarios_apart() -> None:
    # Within a scenario nothing varies, so neither does the aggregate, however far they lie apart.
    found = st.stratified_interval([[0.1, 0.1, 0.1], [0.9, 0.9, 0.9]])
    assert (found.low, found.mean, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_all_differences_of_one_sign_by_hand() -> None:
    first = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    found = st.paired(first, [0.0] * 6)
    assert found.p_value == pytest.approx(2 / 64)
    assert found.difference == pytest.approx(3.5)


@pytest.mark.parametrize("n", [6, 9, 12])
def test_the_permutation_test_is_scipys(n: int) -> None:
    generator = np.random.default_rng(n)
    a, b = generator.normal(0.3, 1, n), generator.normal(size=n)
    expected = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert st.paired(a, b).p_value == pytest.approx(expected.pvalue)


def test_random_permutations_are_near_the_exact_test() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(0.4, 1, 16), generator.normal(size=16)
    exact = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert st.paired(a, b).p_value == pytest.approx(exact.pvalue, abs=0.02)


def test_wilcoxon_is_scipys() -> None:
    a, b = np.random.default_rng(4).normal(size=(2, 10))
    assert st.paired(a, b, "wilcoxon").p_value == pytest.approx(stats.wilcoxon(a, b).pvalue)


def test_a_test_that_cannot_reject_says_so() -> None:
    found = st.paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert found.p_value is None
    assert found.reason == "3 pairs can't give a p value below 0.25; it takes 6"
    assert found.difference == pytest.approx(2.0)


def test_no_difference_at_all() -> None:
    assert st.paired([0.5] * 8, [0.5] * 8).p_value == 1.0


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        st.paired([0.1, 0.2], [0.1])


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        st.interval([0.1, float("nan")])


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03: times 3, 2, 1, then never falling.
    assert st.holm([0.03, 0.01, None, 0.02]) == pytest.approx([0.04, 0.03, None, 0.04])
    assert st.holm([0.6, 0.9]) == [1.0, 1.0]


def test_one_against_many_is_corrected_for_all() -> None:
    reference = [0.0] * 8
    others = {"better": [1.0] * 8, "same": [0.0] * 8}
    found = st.against(reference, others)
    assert found["better"].p_value == pytest.approx(2 * 2 / 2**8)
    assert found["same"].p_value == 1.0
    few = st.against([0.0] * 6, {str(i): [1.0] * 6 for i in range(4)})
    assert all(c.p_value is None and c.reason for c in few.values())


def test_probability_of_improvement_by_hand_and_by_mann_whitney() -> None:
    assert st.probability_of_improvement([1, 2], [0, 2]) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    a, b = np.random.default_rng(5).normal(size=(2, 7))
    expected = stats.mannwhitneyu(a, b).statistic / 49
    assert st.probability_of_improvement(a, b) == pytest.approx(expected)
    assert st.probability_of_improvement([], [1]) is None


def test_mean_ranks_share_ties() -> None:
    table = [[0.9, 0.8, 0.8], [0.5, 0.7, 0.6]]
    assert st.mean_ranks(table).tolist() == [2.0, 1.75, 2.25]
    assert st.mean_ranks(table, higher_is_better=False).tolist() == [2.0, 2.25, 1.75]
    with pytest.raises(ValueError, match="whole table"):
        st.mean_ranks([[0.1, float("nan")]])


def test_the_critical_difference_is_demsars() -> None:
    # Table 5 of the paper: q_0.05 = 2.569 for four methods.
    better = np.arange(4)[None] + np.random.default_rng(0).normal(0, 0.1, (14, 4))
    found = st.critical_difference(better)
    assert found.value == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    assert found.friedman_p == pytest.approx(0, abs=1e-6)


def test_without_a_difference_there_is_no_critical_one() -> None:
    random = np.random.default_rng(0).normal(size=(6, 4))
    assert "do not differ" in str(st.critical_difference(random).reason)
    assert "it takes 3" in str(st.critical_difference(random[:, :2]).reason)


def test_rank_agreement_by_hand() -> None:
    # Of six pairs one is turned round: (5 - 1) / 6.
    assert st.rank_agreement([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert st.rank_agreement([1, 1], [1, 2]) is None
