"""Do two protocols rank the same strategies alike? Tuning on what is reported, or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clbench.leaderboard import Board, label
from clbench.statistics import rank_agreement

Floats = NDArray[np.float64]

#: Draws of seeds that tell how far chance alone moves tau.
RESAMPLES = 2000


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
        by_chance: What tau is (median) between two rankings of the two-phase protocol alone, each
            with its seeds drawn again: seeds make even one protocol disagree with itself.
        by_chance_low: 2.5 % of these are below. A tau below it is more than seeds explain.
        swapped: Pairs of strategies that the protocols order differently.
        pairs: Pairs of strategies.
        alone: Strategies that only one of the protocols ranks.
    """

    two_phase: Board
    conventional: Board
    table: pd.DataFrame
    tau: float | None
    by_chance: float | None
    by_chance_low: float | None
    swapped: int
    pairs: int
    alone: tuple[str, ...]


def agreements(boards: Sequence[Board], seed: int = 0) -> list[Agreement]:
    """Compares the protocols wherever a scenario has a board of both with the same budget.

    Args:
        boards: Of `clbench.leaderboard.build`.
        seed: Of the resampling.
    """
    return [_agreement(*pair, seed) for pair in _pairs(boards)]


def verdict(one: Agreement) -> str:
    """What the comparison of the protocols says, in sentences."""
    if one.tau is None:
        return f"{len(one.table)} strategies in both: too few, or too equal, to have an order."
    words = f"Kendall's tau is {one.tau:.2f} over {len(one.table)} strategies: "
    words += f"{one.swapped} of {one.pairs} pairs swap."
    if one.by_chance is not None and one.by_chance_low is not None:
        words += (
            f" Drawing the seeds of the two-phase runs again makes their own ranking agree with "
            f"itself to {one.by_chance:.2f} (2.5 % of draws: below {one.by_chance_low:.2f}), so "
        )
        more = one.tau < one.by_chance_low
        words += "seeds alone do not explain this." if more else "seeds alone may explain this."
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


def _agreement(two_phase: Board, conventional: Board, seed: int) -> Agreement:
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
    chance = _by_chance(_seeds(two_phase, ours.loc[shared, "_place"]), seed)
    swapped, pairs = _swapped(first.to_numpy(float), second.to_numpy(float))
    return Agreement(two_phase, conventional, table, tau, *chance, swapped, pairs, alone)


def _ranked(board: Board) -> pd.DataFrame:
    """Tuned rows with a score, by strategy; one that stands there twice is ambiguous, and out."""
    table = board.table.assign(_place=board.table.index)
    table = table[table["tuned"].notna() & table[board.headline].notna()]
    pairs = zip(table["name"], table["base"], strict=True)
    names = [label({"strategy": name, "base": base}) for name, base in pairs]
    table = table.set_axis(pd.Index(names, name="strategy"), axis=0)
    return table.drop(columns="strategy")[~table.index.duplicated(keep=False)]


def _seeds(board: Board, places: pd.Series) -> list[Floats]:
    """The scores of each strategy, one a seed."""
    complete = board.runs[board.runs["status"] == "complete"]
    by_row = complete.groupby("row")[board.headline]
    return [by_row.get_group(place).to_numpy(np.float64) for place in places]


def _by_chance(scores: Sequence[Floats], seed: int) -> tuple[float | None, float | None]:
    """Median and 2.5 % quantile of tau between means over seeds that are drawn twice."""
    if len(scores) < 2 or min(map(len, scores)) < 2:
        return None, None
    generator = np.random.default_rng(seed)
    means = [
        np.stack([generator.choice(s, (RESAMPLES, len(s))).mean(1) for s in scores])
        for _ in range(2)
    ]
    upper = np.triu_indices(len(scores), 1)
    first, second = (np.sign(m[upper[0]] - m[upper[1]]) for m in means)
    size = np.sqrt((first**2).sum(0) * (second**2).sum(0))
    taus = (first * second).sum(0)[size > 0] / size[size > 0]
    if not len(taus):
        return None, None
    median, low = np.quantile(taus, [0.5, 0.025])
    return float(median), float(low)


def _swapped(first: Floats, second: Floats) -> tuple[int, int]:
    upper = np.triu_indices(len(first), 1)
    one, other = (np.sign(x[upper[0]] - x[upper[1]]) for x in (first, second))
    return int((one * other < 0).sum()), len(upper[0])
