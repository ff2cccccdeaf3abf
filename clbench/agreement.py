"""Do two protocols rank the same strategies alike? Tuning on what is reported, or elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clbench.leaderboard import Board, label
from clbench.statistics import rank_agreement

Floats = NDArray[np.float64]

#: Up to so many seeds all ways to halve them are looked at, beyond that so many ways.
MOST, SPLITS = 12, 500


@dataclass(frozen=True)
class Agreement:
    """How the rankings of two protocols compare, for one scenario and one budget.

    Attributes:
        two_phase: The board whose hyper-parameters were chosen on other data.
        conventional: The board whose hyper-parameters were chosen on what it reports.
        table: One row for each strategy that both rank, by `rank_two_phase`: strategy, both
            ranks among these strategies, `change` (conventional minus two-phase rank: above 0,
            the honest protocol ranks it higher), both means, `difference` (conventional minus
            two-phase mean).
        tau: Kendall's tau-b of the means; None if one protocol gives no order.
        halves: How far one protocol agrees with itself: tau between the rankings of the two-phase
            runs by one half of their seeds and by the other, median over ways to halve them. A
            half is noisier than the whole, so this is less than two repetitions would agree.
            None for fewer than two shared seeds.
        lowest: Of these ways. A tau of the protocols below it is more than seeds explain.
        swapped: Pairs of strategies that the protocols order differently.
        pairs: Pairs of strategies.
        alone: Strategies that only one of the protocols ranks.
    """

    two_phase: Board
    conventional: Board
    table: pd.DataFrame
    tau: float | None
    halves: float | None
    lowest: float | None
    swapped: int
    pairs: int
    alone: tuple[str, ...]


def agreements(boards: Sequence[Board]) -> list[Agreement]:
    """Compares the protocols wherever a scenario has a board of both with the same budget.

    Args:
        boards: Of `clbench.leaderboard.build`.
    """
    return [_agreement(*pair) for pair in _pairs(boards)]


def verdict(one: Agreement) -> str:
    """What the comparison of the protocols says, in sentences."""
    if one.tau is None:
        return f"{len(one.table)} strategies in both: too few, or too equal, to have an order."
    words = f"Kendall's tau is {one.tau:.2f} over {len(one.table)} strategies: "
    words += f"{one.swapped} of {one.pairs} pairs swap."
    if one.swapped and one.halves is not None and one.lowest is not None:
        more = one.tau < one.lowest
        words += (
            " Half of the seeds rank the two-phase runs as the other half does to "
            f"{one.halves:.2f} (median over ways to halve them; lowest {one.lowest:.2f}): seeds "
            f"alone {'do not' if more else 'may'} explain the difference."
        )
    if one.alone:
        words += f" Ranked by one protocol only: {', '.join(one.alone)}."
    return words


def _pairs(boards: Sequence[Board]) -> Iterator[tuple[Board, Board]]:
    for one in boards:
        for other in boards:
            protocols = one.protocol, other.protocol
            same = one.scenario == other.scenario and dict(one.options) == dict(other.options)
            if same and protocols == ("two_phase", "conventional"):
                yield one, other


def _agreement(two_phase: Board, conventional: Board) -> Agreement:
    ours, theirs = _ranked(two_phase), _ranked(conventional)
    shared = [name for name in ours.index if name in theirs.index]
    alone = tuple(sorted(set(ours.index) ^ set(theirs.index)))
    column, sign = two_phase.headline, 1 if two_phase.higher else -1
    first, second = ours.loc[shared, column], theirs.loc[shared, column]
    table = pd.DataFrame(
        {
            "strategy": shared,
            "rank_two_phase": (-sign * first).rank(method="min").astype(int).to_numpy(),
            "rank_conventional": (-sign * second).rank(method="min").astype(int).to_numpy(),
            "two_phase": first.to_numpy(),
            "conventional": second.to_numpy(),
        }
    )
    table.insert(3, "change", table["rank_conventional"] - table["rank_two_phase"])
    table["difference"] = table["conventional"] - table["two_phase"]
    table = table.sort_values(["rank_two_phase", "strategy"]).reset_index(drop=True)
    tau = rank_agreement(first, second)
    own = _halves(_by_seed(two_phase, list(ours.loc[shared, "_place"])))
    swapped, pairs = _swapped(first.to_numpy(float), second.to_numpy(float))
    return Agreement(two_phase, conventional, table, tau, *own, swapped, pairs, alone)


def _ranked(board: Board) -> pd.DataFrame:
    """Tuned rows with a score, by strategy; one that stands there twice is ambiguous, and out."""
    table = board.table.assign(_place=board.table.index)
    table = table[table["tuned"].notna() & table[board.headline].notna()]
    pairs = zip(table["name"], table["base"], strict=True)
    names = [label({"strategy": name, "base": base}) for name, base in pairs]
    table = table.set_axis(pd.Index(names, name="strategy"), axis=0)
    return table.drop(columns="strategy")[~table.index.duplicated(keep=False)]


def _by_seed(board: Board, places: Sequence[int]) -> Floats:
    """[strategies, seeds]: scores for the seeds that all of them have."""
    complete = board.runs[(board.runs["status"] == "complete") & board.runs["row"].isin(places)]
    scores = complete.pivot(index="row", columns="seed", values=board.headline).loc[list(places)]
    known: Floats = scores.dropna(axis=1).to_numpy(np.float64)
    return known


def _halves(scores: Floats) -> tuple[float | None, float | None]:
    """Median and smallest tau between means over one half of the seeds and over the other."""
    count = scores.shape[1]
    if len(scores) < 2 or count < 2:
        return None, None
    taus = []
    for half in _splits(count):
        one = scores[:, half].mean(1)
        other = np.delete(scores, half, axis=1).mean(1)
        taus.append(rank_agreement(one, other))
    known = [tau for tau in taus if tau is not None]
    return (float(np.median(known)), min(known)) if known else (None, None)


def _splits(count: int) -> Iterator[list[int]]:
    """One half of each way to halve so many seeds; of many seeds, drawn ways."""
    if count > MOST:
        generator = np.random.default_rng(0)
        yield from (list(generator.permutation(count)[: count // 2]) for _ in range(SPLITS))
        return
    for half in itertools.combinations(range(count), count // 2):
        if count % 2 or half[0] == 0:  # else it is the other half of one that was there
            yield list(half)


def _swapped(first: Floats, second: Floats) -> tuple[int, int]:
    upper = np.triu_indices(len(first), 1)
    one, other = (np.sign(x[upper[0]] - x[upper[1]]) for x in (first, second))
    return int((one * other < 0).sum()), len(upper[0])
