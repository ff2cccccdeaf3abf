"""Accuracies in, numbers out: every metric of the suite, as a pure function.

Most metrics read an accuracy matrix R, T rows of T cells: `matrix[i][j]` is the accuracy on
experience j after learning experience i, a fraction in [0, 1], and None or NaN where it was not
measured. Formulas count from 1, code from 0. Rules that hold for all of them:

- A metric is None, never 0 and never NaN, where it is undefined: a cell of its formula was not
  measured, there are too few experiences, or the run is unfinished (fewer rows than columns; for
  the first k experiences of such a run pass `[row[:k] for row in matrix[:k]]`).
- Experiences count alike whatever their size, except where `sizes` is an argument.
- A value outside [0, 1] or a ragged matrix is a bug of the caller: ValueError names the cell.

In a class-incremental run R[i][j] must be predicted among all classes seen by then. The label
space grows, so forgetting mixes lost knowledge with a harder question; `cumulative_forgetting`
takes the second part out.

Peers print other numbers under the same names. `FORGETTING_CONVENTIONS` and
`BACKWARD_TRANSFER_CONVENTIONS` hold their arithmetic, read from their code, by name.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Vector: TypeAlias = Sequence[float | None] | NDArray[Any]
Matrix: TypeAlias = Sequence[Vector] | NDArray[Any]
Sizes: TypeAlias = Sequence[float] | NDArray[Any] | None


class Evaluation(TypedDict):
    """One evaluation while a run is under way.

    Attributes:
        step: Updates made since the start of the run, from 0.
        experience: Index of the experience being learned.
        accuracies: Accuracy on experience 0, 1, ..., at least up to `experience`; None where it
            was not measured. Entries of experiences not yet met are checked but never used.
    """

    step: int
    experience: int
    accuracies: Vector


class Convention(Protocol):
    """Somebody's forgetting or backward transfer: R and, where they matter, sizes."""

    def __call__(self, matrix: Matrix, sizes: Sizes = None, /) -> float | None: ...


class _Timeline(NamedTuple):
    """n evaluations in order; `accuracy` is (n, T), NaN where not measured or not yet met."""

    step: NDArray[np.int64]
    learning: NDArray[np.int64]
    accuracy: Floats


def average_accuracy(matrix: Matrix) -> float | None:
    """Mean final accuracy: ACC = (1/T) Σ_j R_{T,j}.

    Range [0, 1], higher is better. A mean over experiences; it equals the accuracy on the union
    of the test sets only where these are equally large.
    Source: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840).
    """
    return _mean(_final(_accuracies(matrix)))


def average_incremental_accuracy(matrix: Matrix, sizes: Sizes = None) -> float | None:
    """Mean over the run of the accuracy on everything seen: (1/T) Σ_k acc_k.

    acc_k = Σ_{j≤k} n_j R_{k,j} / Σ_{j≤k} n_j: with the test sizes n_j, the accuracy on the union
    test set of the experiences met by then, as iCaRL and PyCIL have it. Without sizes,
    acc_k = (1/k) Σ_{j≤k} R_{k,j}, the plain mean over experiences, as Mammoth has it.
    Range [0, 1], higher is better.
    Source: Rebuffi et al. 2017 (arXiv:1611.07725).

    Args:
        matrix: (T, T) accuracies.
        sizes: (T,) test samples of each experience; None counts experiences alike.
    """
    accuracies = _accuracies(matrix)
    n = len(accuracies)
    weights = np.tril(np.broadcast_to(_weights(sizes, n), (n, n)))
    seen = np.where(weights > 0, accuracies, 0.0)
    return _mean((weights * seen).sum(axis=1) / weights.sum(axis=1))


def forgetting(matrix: Matrix) -> float | None:
    """Mean drop from the best: F = (1/(T−1)) Σ_{j<T} f_j, f_j = max_{j≤l<T} R_{l,j} − R_{T,j}.

    Range [−1, 1], lower is better; negative where the last experiences improved the old ones,
    because the final row stays out of the maximum. Rows l < j, before experience j was learned,
    stay out of it too: zero-shot accuracy is no knowledge that learning gave. The maximum
    includes the diagonal, so F ≥ −BWT, with equality for T = 2. None for T = 1.
    Source: Chaudhry et al. 2018 (arXiv:1801.10112), eq. 3.
    """
    return _mean(_drops_from_best(_accuracies(matrix), with_final=False, with_zero_shot=False))


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean change since an experience was learned: BWT = (1/(T−1)) Σ_{i<T} (R_{T,i} − R_{i,i}).

    Range [−1, 1], higher is better, usually negative. None for T = 1.
    Source: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840); their code divides by T, see
    `BACKWARD_TRANSFER_CONVENTIONS`.
    """
    return _mean(_changes_since_learned(_accuracies(matrix)))


def forward_transfer(matrix: Matrix, baseline: Vector | None) -> float | None:
    """Mean head start on the next experience: FWT = (1/(T−1)) Σ_{i≥2} (R_{i−1,i} − b_i).

    Range [−1, 1], higher is better. None for T = 1, without a baseline, and where the cells of
    future experiences are null, as in a class-incremental run: outputs that are masked or
    untrained have no accuracy worth the name.
    Source: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840).

    Args:
        matrix: (T, T) accuracies.
        baseline: (T,) accuracies b of the randomly initialised model; b_1 is not used.
    """
    accuracies = _accuracies(matrix)
    if baseline is None or not len(accuracies):
        return None
    start = _vector(baseline, "baseline", len(accuracies))
    return _mean(accuracies.diagonal(1) - start[1:])


def learning_accuracy(matrix: Matrix) -> float | None:
    """Mean accuracy on an experience right after learning it: LA = (1/T) Σ_i R_{i,i}.

    Range [0, 1], higher is better.
    Source: Riemer et al. 2019 (arXiv:1810.11910).
    """
    return _mean(_accuracies(matrix).diagonal())


def intransigence(
    matrix: Matrix, reference: Vector | None, experience: int | None = None
) -> float | None:
    """What continual learning could not learn: the mean over k of I_k = a*_k − R_{k,k}.

    Range [−1, 1], lower is better; negative where earlier experiences helped.
    Source: Chaudhry et al. 2018 (arXiv:1801.10112), who define I_k of one k: pass `experience`.

    Args:
        matrix: (T, T) accuracies.
        reference: (T,) accuracies a*_k on experience k of a model trained jointly on the data of
            experiences 1..k; without it the metric is undefined.
        experience: Index k (from 0) whose I_k is wanted; None averages over all.
    """
    accuracies = _accuracies(matrix)
    n = len(accuracies)
    if reference is None or not n:
        return None
    gaps = _vector(reference, "reference", n) - accuracies.diagonal()
    if experience is None:
        return _mean(gaps)
    if not 0 <= experience < n:
        raise ValueError(f"experience is {experience}; the run has 0 to {n - 1}")
    return _mean(gaps[[experience]])


def cumulative_forgetting(cumulative: Matrix) -> float | None:
    """Forgetting with the label space held still: (1/(T−1)) Σ_{k<T} max_{k≤i≤T} (b^i_k − b^T_k).

    Range [0, 1], lower is better; not negative, because the maximum over k ≤ i ≤ T includes
    i = T, where the difference is 0 (our reading of the bounds). None for T = 1. Avalanche's
    metric of this name takes the first b minus the last one instead of the maximum.
    Source: Soutif-Cormerais et al. 2021 (arXiv:2106.11930).

    Args:
        cumulative: (T, T), not an accuracy matrix: cell [i][k] is b^i_k, the accuracy after
            experience i on all the classes of experiences 1..k, predictions restricted to them.
    """
    kept = _accuracies(cumulative, "cumulative")
    return _mean(_drops_from_best(kept, with_final=True, with_zero_shot=False))


def headline(setting: str) -> tuple[str, bool]:
    """What runs are ranked and tuned by.

    Args:
        setting: Value of a `clbench.types.Setting`.

    Returns:
        Name of the metric, and whether higher is better.
    """
    if setting == "test_time_adaptation":
        return "online_error", False
    return "average_accuracy", True


def summary(
    matrix: Matrix,
    sizes: Sizes = None,
    baseline: Vector | None = None,
    reference: Vector | None = None,
) -> dict[str, float | None]:
    """The metrics of a finished run by name.

    Args:
        matrix: (T, T) accuracies.
        sizes: (T,) test samples of each experience, for `average_incremental_accuracy`.
        baseline: (T,) accuracies of the random model, for `forward_transfer`.
        reference: (T,) accuracies of joint training; adds the key `intransigence`.

    Raises:
        ValueError: An argument is ragged, of the wrong length or out of range.
    """
    values = {
        "average_accuracy": average_accuracy(matrix),
        "average_incremental_accuracy": average_incremental_accuracy(matrix, sizes),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forward_transfer": forward_transfer(matrix, baseline),
        "learning_accuracy": learning_accuracy(matrix),
    }
    return (
        values
        if reference is None
        else {**values, "intransigence": intransigence(matrix, reference)}
    )


def zero_shot_accuracy(matrix: Matrix) -> float | None:
    """Mean accuracy on an experience just before it is learned: (1/(T−1)) Σ_{i≥2} R_{i−1,i}.

    Range [0, 1], higher is better. None for T = 1 and where those cells are null.
    Source: CITB (Zhang et al. 2023, arXiv:2310.14510), whose forward transfer this is.
    """
    return _mean(_accuracies(matrix).diagonal(1))


def instruction_summary(
    matrix: Matrix, scores: Mapping[str, Matrix], general: Mapping[str, Any]
) -> dict[str, float | None]:
    """Metrics of a run of continual instruction tuning, beside those of its accuracy matrix.

    - `trace_backward_transfer`: as TRACE (Wang et al. 2023, arXiv:2310.06762) defines it: divided
      by T, not by T−1. TRACE's overall performance is `average_accuracy`.
    - `zero_shot_accuracy`: see there.
    - `answer_accuracy`, `answer_forgetting`: final mean and `forgetting` of content alone,
      whatever the form of an answer: essential forgetting.
    - `format_error_rate`: final share of answers without the form that is asked for, in [0, 1],
      lower is better.
    - `general_accuracy`: on what the model was taught before the stream, after the last
      experience; `general_change`: that minus the same before the stream, in [−1, 1], higher is
      better.

    Args:
        matrix: (T, T) scores of the tasks.
        scores: Matrices "answer" and "format", like it.
        general: See `clbench.retention.Retention.record`.
    """
    content, form = scores.get("answer", []), scores.get("format", [])
    formed = average_accuracy(form)
    before = general.get("before", {}).get("accuracy")
    after = general.get("after", {}).get("accuracy", [])
    last = after[-1] if after else None
    return {
        "trace_backward_transfer": _backward_transfer_gem_code(matrix),
        "zero_shot_accuracy": zero_shot_accuracy(matrix),
        "answer_accuracy": average_accuracy(content),
        "answer_forgetting": forgetting(content),
        "format_error_rate": None if formed is None else 1 - formed,
        "general_accuracy": last,
        "general_change": None if last is None or before is None else last - before,
    }


def min_accuracy(evaluations: Sequence[Evaluation]) -> float | None:
    """How far old experiences fell: (1/(k−1)) Σ_{i<k} min_{end(i)<n≤t} A(E_i, f_n).

    At the last evaluation t, while learning experience k. The minimum of experience i is over
    the measured evaluations after learning it; the current experience is left out. Range [0, 1],
    higher is better. None for k = 1 and where an old experience has no such evaluation.
    Evaluations far apart miss the lowest points and flatter the result.
    Source: De Lange et al. 2023 (arXiv:2205.13452).
    """
    timeline = _timeline(evaluations)
    if not len(timeline.step):
        return None
    lows = []
    for i in range(timeline.learning[-1]):
        # Not by `learning`: the last evaluation of i and the first of i+1 can be of one model.
        after = timeline.step > timeline.step[timeline.learning <= i].max(initial=-1)
        lows.append(np.fmin.reduce(timeline.accuracy[after, i], initial=np.nan))
    return _mean(np.array(lows))


def worst_case_accuracy(evaluations: Sequence[Evaluation]) -> float | None:
    """Stability and plasticity in one: WC-ACC = (1/k) A(E_k, f_t) + (1 − 1/k) min-ACC.

    At the last evaluation t, while learning experience k. Range [0, 1], higher is better.
    A(E_1, f_t) for k = 1; otherwise None where `min_accuracy` is.
    Source: De Lange et al. 2023 (arXiv:2205.13452).
    """
    timeline = _timeline(evaluations)
    if not len(timeline.step):
        return None
    met = int(timeline.learning[-1]) + 1
    current = float(timeline.accuracy[-1, -1])
    lowest = min_accuracy(evaluations) if met > 1 else current
    return None if lowest is None else _mean(np.array([current] + [lowest] * (met - 1)))


def windowed_forgetting(evaluations: Sequence[Evaluation], window: int) -> float | None:
    """Largest sudden drop: mean over experiences i of max_{m<n<m+Δ} (A(E_i,f_m) − A(E_i,f_n)).

    Both points lie in a window of Δ evaluations; 0 for an experience that never drops, as in the
    authors' code. Counts from the first evaluation of an experience, thus also while it is
    learned. Experiences without two measured points in one window are left out; None if there is
    no other. Range [0, 1], lower is better.
    Source: De Lange et al. 2023 (arXiv:2205.13452), who use Δ = 10 and 100.

    Args:
        evaluations: In order.
        window: Δ, in evaluations, at least 2.
    """
    return _mean(_largest_drops(_timeline(evaluations).accuracy, window))


def windowed_plasticity(evaluations: Sequence[Evaluation], window: int) -> float | None:
    """Largest sudden rise: mean over experiences i of max_{m<n<m+Δ} (A(E_i,f_n) − A(E_i,f_m)).

    Range [0, 1], higher is better; otherwise as `windowed_forgetting`.
    Source: De Lange et al. 2023 (arXiv:2205.13452). Their code (Mattdl/ContinualEvaluation
    7ffa368) starts only from record highs of a window, so it can miss rises out of a dip.
    """
    return _mean(_largest_drops(-_timeline(evaluations).accuracy, window))


def average_anytime_accuracy(evaluations: Sequence[Evaluation]) -> float | None:
    """Mean over the run of the accuracy on what was met: AAA = (1/n) Σ_{m≤n} AA_m.

    AA_m is the plain mean over the experiences met by evaluation m. Every evaluation counts
    alike, so uneven intervals bias it. Range [0, 1], higher is better. None where an experience
    that was met was not measured.
    Source: Caccia et al. 2022 (arXiv:2104.05025).
    """
    timeline = _timeline(evaluations)
    met = timeline.learning + 1
    seen = np.arange(timeline.accuracy.shape[1]) < met[:, None]
    return _mean(np.where(seen, timeline.accuracy, 0.0).sum(axis=1) / met)


def learning_curve_area(evaluations: Sequence[Evaluation], beta: int) -> float | None:
    """Speed of learning: LCA_β, the mean over experiences of the first β batch-wise accuracies.

    Batch-wise means one evaluation per update: the first β evaluations of an experience must be
    of consecutive steps that start at the last step before the experience (the model before its
    first update) or one later; None otherwise. Range [0, 1], higher is better.
    Source: Chaudhry et al. 2019 (arXiv:1812.00420), whose LCA_β averages the β+1 points from the
    untrained model on: begin with that model and pass β+1. Their plots use the trapezoidal rule.

    Args:
        evaluations: In order.
        beta: Accuracies per experience, at least 1.
    """
    _check_count("beta", beta, 1)
    timeline = _timeline(evaluations)
    areas = []
    for k in range(timeline.accuracy.shape[1]):
        learning = timeline.learning == k
        start = timeline.step[timeline.learning < k].max(initial=0)
        offsets = timeline.step[learning][:beta] - start
        if len(offsets) < beta or offsets[0] > 1 or offsets[-1] - offsets[0] >= beta:
            return None
        areas.append(timeline.accuracy[learning, k][:beta].mean())
    return _mean(np.array(areas))


def anytime_summary(
    evaluations: Sequence[Evaluation],
    n_experiences: int,
    windows: Sequence[int] = (10, 100),
    beta: int = 10,
) -> dict[str, float | None]:
    """The any-time metrics of a finished run by name; all None unless every experience occurs.

    Args:
        evaluations: In order.
        n_experiences: T of the run.
        windows: Windows of `windowed_forgetting` and `windowed_plasticity`, part of the keys.
        beta: Accuracies of `learning_curve_area`, part of the key.

    Raises:
        ValueError: An evaluation is malformed or of an experience that the run does not have.
    """
    last = int(max(_timeline(evaluations).learning, default=-1))
    if last >= n_experiences:
        raise ValueError(f"experience {last} was evaluated, but the run has only {n_experiences}")
    complete = {evaluation["experience"] for evaluation in evaluations} == set(range(n_experiences))
    run = evaluations if complete else ()
    values = {
        "min_accuracy": min_accuracy(run),
        "worst_case_accuracy": worst_case_accuracy(run),
        "average_anytime_accuracy": average_anytime_accuracy(run),
        f"learning_curve_area_{beta}": learning_curve_area(run, beta),
    }
    for window in windows:
        values[f"windowed_forgetting_{window}"] = windowed_forgetting(run, window)
        values[f"windowed_plasticity_{window}"] = windowed_plasticity(run, window)
    return values


def _accuracies(matrix: Matrix, name: str = "accuracy_matrix") -> Floats:
    """The matrix as (T, T) floats with NaN for None; all NaN while rows are missing."""
    rows = [_vector(row, f"{name}[{i}]") for i, row in enumerate(matrix)]
    width = len(rows[0]) if rows else 0
    for i, row in enumerate(rows):
        if len(row) != width:
            raise ValueError(f"{name}[{i}] has {len(row)} cells, {name}[0] has {width}")
    if len(rows) > width:
        raise ValueError(f"{name} has {len(rows)} rows for {width} experiences")
    if len(rows) < width:
        # NaN makes every metric undefined: a number of half a run would pass for the whole.
        return np.full((width, width), np.nan)
    return np.array(rows).reshape(width, width)


def _vector(values: Vector, name: str, length: int = 0) -> Floats:
    """Accuracies as floats with NaN for None; a length other than `length` > 0 is refused."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or (length and len(vector) != length):
        raise ValueError(f"{name} has shape {vector.shape}, not ({length or 'T'},)")
    wrong = np.flatnonzero(~(np.isnan(vector) | ((vector >= 0) & (vector <= 1))))
    if len(wrong):
        i = wrong[0]
        raise ValueError(f"{name}[{i}] is {vector[i]}; an accuracy lies in [0, 1] or is None")
    return vector


def _weights(sizes: Sizes, length: int) -> Floats:
    if sizes is None:
        return np.ones(length)
    weights = np.asarray(sizes, dtype=np.float64)
    if weights.ndim != 1 or (length and len(weights) != length):
        raise ValueError(f"sizes has shape {weights.shape}, not ({length},)")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
    if len(wrong):
        raise ValueError(f"sizes[{wrong[0]}] is {weights[wrong[0]]}; a test set has samples")
    return weights[:length]


def _timeline(evaluations: Sequence[Evaluation]) -> _Timeline:
    """The evaluations as arrays, checked for order, range and completeness."""
    step = np.array([evaluation["step"] for evaluation in evaluations], dtype=np.int64)
    learning = np.array([evaluation["experience"] for evaluation in evaluations], dtype=np.int64)
    accuracy = np.full((len(evaluations), learning.max(initial=-1) + 1), np.nan)
    for m, evaluation in enumerate(evaluations):
        name = f"evaluations[{m}]['accuracies']"
        values = _vector(evaluation["accuracies"], name)
        met = learning[m] + 1
        if min(step[m], learning[m]) < 0 or len(values) < met:
            raise ValueError(
                f"{name} has {len(values)} values for experience {learning[m]} at step {step[m]}"
            )
        accuracy[m, :met] = values[:met]
    moved = np.diff(learning)
    wrong = np.flatnonzero((moved < 0) | (np.diff(step) < (moved == 0)))
    if len(wrong):
        raise ValueError(f"evaluations[{wrong[0] + 1}] is not later than the one before it")
    return _Timeline(step, learning, accuracy)


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def _mean(values: Floats) -> float | None:
    """The mean; None if there is nothing to average or a value is undefined."""
    return float(values.mean()) if len(values) and not np.isnan(values).any() else None


def _final(accuracies: Floats) -> Floats:
    """R_{T,j} of every j; nothing while no experience is known."""
    return accuracies[-1] if len(accuracies) else np.empty(0)


def _changes_since_learned(accuracies: Floats) -> Floats:
    """R_{T,j} − R_{j,j} of every j < T."""
    return (_final(accuracies) - accuracies.diagonal())[:-1]


def _drops_from_best(accuracies: Floats, *, with_final: bool, with_zero_shot: bool) -> Floats:
    """max_l R_{l,j} − R_{T,j} of every j < T; l from j or from 1, to T−1 or to T."""
    last = len(accuracies) if with_final else len(accuracies) - 1
    best = [
        accuracies[0 if with_zero_shot else j : last, j].max() for j in range(len(accuracies) - 1)
    ]
    return np.array(best) - _final(accuracies)[:-1]


def _largest_drops(accuracy: Floats, window: int) -> Floats:
    """The largest fall within `window` rows of every column that has two values there."""
    _check_count("window", window, 2)
    largest = np.full(accuracy.shape[1], np.nan)
    for gap in range(1, min(window, len(accuracy))):
        falls = accuracy[:-gap] - accuracy[gap:]
        largest = np.fmax(largest, np.fmax.reduce(falls))
    drops: Floats = np.maximum(largest[~np.isnan(largest)], 0.0)
    return drops


def _forgetting_with_final_row(matrix: Matrix) -> float | None:
    """(1/(T−1)) Σ_{j<T} (max_{j≤l≤T} R_{l,j} − R_{T,j}); improvement clips to 0. Range [0, 1].

    Mammoth e75a491 `utils/metrics.py` (it fills the cells before learning with 0, which never is
    the maximum) and LAMDA-PILOT 5240714 `trainer.py`.
    """
    return _mean(_drops_from_best(_accuracies(matrix), with_final=True, with_zero_shot=False))


def _forgetting_with_zero_shot(matrix: Matrix) -> float | None:
    """(1/(T−1)) Σ_{j<T} (max_{l<T} R_{l,j} − R_{T,j}), rows before learning j included.

    A-GEM's code (facebookresearch/agem 4542149 `utils/utils.py`), which evaluates every
    experience every time; SAPT too. Needs the cells of future experiences. Range [−1, 1].
    """
    return _mean(_drops_from_best(_accuracies(matrix), with_final=False, with_zero_shot=True))


def _forgetting_first_minus_last(matrix: Matrix) -> float | None:
    """(1/(T−1)) Σ_{j<T} (R_{j,j} − R_{T,j}) = −BWT: Avalanche 0.6.0 `StreamForgetting`."""
    return _mean(-_changes_since_learned(_accuracies(matrix)))


def _forgetting_libcontinual(matrix: Matrix) -> float | None:
    """(1/(T−1)) Σ_{j<T−1} (R_{j,j} − R_{T,j}): the newest old one is dropped, the divisor kept.

    LibContinual a399ed4 `core/utils/utils.py`, which prints 0 for T < 3; None here.
    """
    changes = _changes_since_learned(_accuracies(matrix))
    dropped = _mean(-changes[:-1])
    return None if dropped is None else dropped * (len(changes) - 1) / len(changes)


def _forgetting_step_to_step(matrix: Matrix) -> float | None:
    """(1/(T−1)) Σ_{i≥2} (1/(i−1)) Σ_{n<i} (R_{i−1,n} − R_{i,n}): drops from one row to the next.

    CODA-Prompt 6417d4f `utils/calc_forgetting.py`.
    """
    accuracies = _accuracies(matrix)
    drops = accuracies[:-1] - accuracies[1:]
    return _mean(np.array([drops[i, : i + 1].mean() for i in range(len(drops))]))


def _forgetting_closer_look(matrix: Matrix, sizes: Sizes = None, /) -> float | None:
    """(1/(T−1)) Σ_{i≥2} Σ_{n<i} (|T_n| / |T_{1:i}|) (R_{n,n} − R_{i,n}), in [−1, 1].

    Smith et al. 2023 (arXiv:2203.17269). `sizes` are the |T_n|; None takes them as equal.
    """
    accuracies = _accuracies(matrix)
    weights = _weights(sizes, len(accuracies))
    drops = accuracies.diagonal() - accuracies
    return _mean(
        np.array(
            [weights[:i] @ drops[i, :i] / weights[: i + 1].sum() for i in range(1, len(drops))]
        )
    )


def _backward_transfer_gem_code(matrix: Matrix) -> float | None:
    """(1/T) Σ_{i≤T} (R_{T,i} − R_{i,i}), the last term being 0.

    GEM's released code (facebookresearch/GradientEpisodicMemory `metrics/metrics.py`) and TRACE.
    """
    changes = _changes_since_learned(_accuracies(matrix))
    mean = _mean(changes)
    return None if mean is None else mean * len(changes) / (len(changes) + 1)


def _backward_transfer_continuum(matrix: Matrix) -> float | None:
    """(2/(T(T−1))) Σ_{i≥2} Σ_{j<i} (R_{i,j} − R_{j,j}): every row below the diagonal.

    Díaz-Rodríguez et al. 2018 (arXiv:1810.13166); Continuum 43ba009 `continuum/metrics/metrics.py`,
    which returns 0 for T = 1; None here.
    """
    accuracies = _accuracies(matrix)
    return _mean((accuracies - accuracies.diagonal())[np.tril_indices(len(accuracies), -1)])


def _backward_transfer_libcontinual(matrix: Matrix) -> float | None:
    """(2/(T(T−1))) Σ_{i≥3} Σ_{j<i−1} (R_{i,j} − R_{j,j}): Continuum's, the newest old one dropped.

    LibContinual a399ed4 `core/utils/utils.py`, which prints 0 for T < 3; None here.
    """
    accuracies = _accuracies(matrix)
    n = len(accuracies)
    mean = _mean((accuracies - accuracies.diagonal())[np.tril_indices(n, -2)])
    return None if mean is None else mean * (n - 2) / n


def _unweighted(metric: Callable[[Matrix], float | None]) -> Convention:
    """A metric that counts experiences alike, as one that may be given sizes."""

    @functools.wraps(metric)
    def convention(matrix: Matrix, _sizes: Sizes = None, /) -> float | None:
        return metric(matrix)

    return convention


FORGETTING_CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "chaudhry": _unweighted(forgetting),
        "mammoth": _unweighted(_forgetting_with_final_row),
        "pilot": _unweighted(_forgetting_with_final_row),
        "agem_code": _unweighted(_forgetting_with_zero_shot),
        "avalanche": _unweighted(_forgetting_first_minus_last),
        "libcontinual": _unweighted(_forgetting_libcontinual),
        "coda_prompt_code": _unweighted(_forgetting_step_to_step),
        "closer_look": _forgetting_closer_look,
    }
)
"""Forgetting as others compute it, `name -> f(matrix, sizes=None)`; lower is better.

"chaudhry" is `forgetting`; Continuum and FACIL have the same arithmetic. Only "closer_look" reads
sizes. None for T = 1, where peers print 0 or NaN.
"""

BACKWARD_TRANSFER_CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "lopez_paz": _unweighted(backward_transfer),
        "gem_code": _unweighted(_backward_transfer_gem_code),
        "continuum": _unweighted(_backward_transfer_continuum),
        "libcontinual": _unweighted(_backward_transfer_libcontinual),
    }
)
"""Backward transfer as others compute it, `name -> f(matrix, sizes=None)`; higher is better.

"lopez_paz" is `backward_transfer`; Mammoth has the same arithmetic. None for T = 1.
"""
