"""Many runs to statements about them: pure functions over scores, one entry a seed or a scenario.

A number that the data can't give is None with the reason, never a guess: one seed has no
interval, and a test that could not reject whatever the scores says so instead of a p value.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: Resamples of a bootstrap.
RESAMPLES = 10_000
#: Up to this many sign patterns a permutation test looks at all of them.
_EXACT = 2**14


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie.

    Attributes:
        mean: Of the scores.
        low: Lower end; None for fewer than two scores.
        high: Upper end.
        count: Scores.
    """

    mean: float | None
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """Two methods over the same seeds or scenarios.

    Attributes:
        difference: Mean of first minus second.
        p_value: Two-sided, of no difference; None if the test can't say.
        reason: Why it can't.
        pairs: Scores compared.
    """

    difference: float | None
    p_value: float | None
    reason: str | None
    pairs: int


def deviation(scores: ArrayLike) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two scores."""
    values = _scores(scores)
    return float(values.std(ddof=1)) if len(values) > 1 else None


def interval(
    scores: ArrayLike,
    confidence: float = 0.95,
    method: Literal["t", "bootstrap"] = "t",
    seed: int = 0,
) -> Interval:
    """The mean with an interval of this confidence.

    Args:
        scores: One a seed.
        confidence: In (0, 1).
        method: "t": mean ± t s/√n of Student's distribution, right for the handful of seeds that
            runs have if scores are about normal. "bootstrap": percentiles of resampled means; no
            assumption, but too short for fewer than about ten scores, whose resamples can't
            reach beyond the best and the worst of them.
        seed: Of the resampling.
    """
    values = _scores(scores)
    n = len(values)
    if n < 2:
        return Interval(float(values[0]) if n else None, None, None, n)
    mean = float(values.mean())
    if method == "bootstrap":
        low, high = _percentiles(values, lambda x: x.mean(-1), confidence, seed)
        return Interval(mean, low, high, n)
    half = half_width(n, confidence) * float(values.std(ddof=1))
    return Interval(mean, mean - half, mean + half, n)


@functools.cache
def half_width(count: int, confidence: float = 0.95) -> float:
    """t/√n of Student's distribution, NaN for fewer than two scores.

    Times the sample standard deviation of so many scores it is half of `interval`'s length.
    """
    from scipy import stats

    if count < 2:
        return math.nan
    return float(stats.t.ppf((1 + confidence) / 2, count - 1) / math.sqrt(count))


def interquartile_mean(scores: ArrayLike) -> float | None:
    """Mean of the middle half of all scores: less moved by a bad run than the mean.

    Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
    Precipice", arXiv 2108.13264; the mean without the floor(n / 4) lowest and highest.
    """
    values = np.sort(_scores(scores))
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean()) if len(values) else None


def stratified_interval(
    scores: Sequence[ArrayLike],
    aggregate: Callable[[ArrayLike], float | None] = interquartile_mean,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """An aggregate over scenarios, with an interval from resampling the seeds of each.

    Source: Agarwal et al. 2021 (see `interquartile_mean`), stratified bootstrap.

    Args:
        scores: For each scenario its scores, one a seed.
        aggregate: Of all scores together.
        confidence: In (0, 1).
        seed: Of the resampling.
        resamples: Draws.
    """
    strata = [_scores(s) for s in scores]
    everything = np.concatenate(strata) if strata else np.empty(0)
    centre = aggregate(everything)
    if centre is None or min(map(len, strata)) < 2:
        return Interval(centre, None, None, len(everything))
    generator = np.random.default_rng(seed)
    found = [
        aggregate(np.concatenate([generator.choice(s, len(s)) for s in strata]))
        for _ in range(resamples)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.array(found, np.float64), [tail, 1 - tail])
    return Interval(centre, float(low), float(high), len(everything))


def paired(
    first: ArrayLike,
    second: ArrayLike,
    test: Literal["permutation", "wilcoxon"] = "permutation",
    alpha: float = 0.05,
    seed: int = 0,
) -> Comparison:
    """Compares two methods on the same seeds (or the same scenarios), in the same order.

    Args:
        first: Scores.
        second: Scores.
        test: "permutation" of the signs of the differences, all of them up to 14 pairs; or
            "wilcoxon", the signed-rank test, exact where there are no ties.
        alpha: Level that the test must be able to reach; else it says so.
        seed: Of random permutations.

    Raises:
        ValueError: If they differ in number.
    """
    a, b = _scores(first), _scores(second)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} scores against {len(b)}: pairs are needed")
    n = len(a)
    difference = float((a - b).mean()) if n else None
    # The smallest two-sided p value: all differences have one sign.
    least = 2 / 2**n
    if least > alpha:
        need = math.ceil(math.log2(2 / alpha))
        reason = f"{n} pairs can't give a p value below {least:.3g}; it takes {need}"
        return Comparison(difference, None, reason, n)
    if not (a - b).any():
        return Comparison(0.0, 1.0, None, n)
    if test == "wilcoxon":
        from scipy import stats

        return Comparison(difference, float(stats.wilcoxon(a, b).pvalue), None, n)
    return Comparison(difference, _sign_permutation(a - b, seed), None, n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for many tests at once; None stays None and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[i] = largest
    return corrected


def against(
    reference: ArrayLike,
    others: Mapping[str, ArrayLike],
    test: Literal["permutation", "wilcoxon"] = "permutation",
    alpha: float = 0.05,
) -> dict[str, Comparison]:
    """Compares one named method with each of the others, Holm-corrected.

    All pairs of many methods need far more scores: with 15 pairs and 8 scenarios the smallest
    corrected p value of a signed-rank test is 15 · 2 / 2⁸ = 0.117.

    Args:
        reference: Its scores.
        others: Scores of the others by name.
        test: See `paired`.
        alpha: The corrected test must be able to reach it.
    """
    raw = {n: paired(s, reference, test, alpha / max(1, len(others))) for n, s in others.items()}
    corrected = holm([c.p_value for c in raw.values()])
    return {
        name: Comparison(c.difference, p, c.reason, c.pairs)
        for (name, c), p in zip(raw.items(), corrected, strict=True)
    }


def probability_of_improvement(first: ArrayLike, second: ArrayLike) -> float | None:
    """How often a run of the first beats one of the second; ties count half.

    Source: Agarwal et al. 2021 (see `interquartile_mean`): the Mann-Whitney U over n·m.
    """
    a, b = _scores(first), _scores(second)
    if not len(a) or not len(b):
        return None
    difference = a[:, None] - b[None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def mean_ranks(scores: ArrayLike, higher_is_better: bool = True) -> Floats:
    """Mean rank of each method over scenarios; 1 is best, ties share their ranks' mean.

    Args:
        scores: [n_scenarios, n_methods], finite.
        higher_is_better: Which way scores go.
    """
    from scipy import stats

    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError("ranks need a whole table: one finite score of each method and scenario")
    ranks: Floats = stats.rankdata(-table if higher_is_better else table, axis=1).mean(0)
    return ranks


@dataclass(frozen=True)
class CriticalDifference:
    """How far apart mean ranks must be to mean anything (Nemenyi).

    Attributes:
        value: The critical difference; None if ranks can't be told apart at all.
        friedman_p: Of the hypothesis that all methods rank alike.
        reason: Why there is no value.
    """

    value: float | None
    friedman_p: float | None
    reason: str | None


def critical_difference(scores: ArrayLike, alpha: float = 0.05) -> CriticalDifference:
    """Friedman's test, then Nemenyi's critical difference q_alpha √(k (k + 1) / (6 N)).

    Source: Demšar 2006, "Statistical Comparisons of Classifiers over Multiple Data Sets".

    Args:
        scores: [N scenarios, k methods].
        alpha: Level.
    """
    from scipy import stats

    table = np.asarray(scores, np.float64)
    n, k = table.shape
    if k < 3 or n < 3:
        return CriticalDifference(None, None, f"{k} methods on {n} scenarios: it takes 3 of each")
    p = float(stats.friedmanchisquare(*table.T).pvalue)
    if not p < alpha:
        return CriticalDifference(None, p, f"ranks do not differ (Friedman, p = {p:.3g})")
    q = float(stats.studentized_range.ppf(1 - alpha, k, np.inf)) / math.sqrt(2)
    return CriticalDifference(q * math.sqrt(k * (k + 1) / (6 * n)), p, None)


def rank_agreement(first: ArrayLike, second: ArrayLike) -> float | None:
    """Kendall's tau-b of two rankings of the same methods, in [-1, 1]; None if one has no order."""
    from scipy import stats

    a, b = _scores(first), _scores(second)
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return None
    return float(stats.kendalltau(a, b).statistic)


def _scores(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite; leave out runs that did not complete")
    return values


def _percentiles(
    values: Floats, aggregate: Callable[[Floats], Any], confidence: float, seed: int
) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    found = aggregate(generator.choice(values, (RESAMPLES, len(values))))
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _sign_permutation(differences: Floats, seed: int) -> float:
    """Share of sign patterns whose mean is at least as far from 0; exact if there are few."""
    n = len(differences)
    if 2**n <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
        extra = 0
    else:
        generator = np.random.default_rng(seed)
        signs = generator.choice((1.0, -1.0), (_EXACT, n))
        extra = 1  # the pattern that was seen
    sums = np.abs(signs @ differences)
    # Sums in another order differ in their last bits.
    reached = sums >= abs(differences.sum()) * (1 - 1e-12)
    return float((reached.sum() + extra) / (len(signs) + extra))
