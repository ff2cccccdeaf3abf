"""Two protocols, one set of strategies: what their rankings have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from clbench.agreement import Agreement, _splits, agreements, verdict
from clbench.leaderboard import build
from clbench.plots import protocols

Scores = dict[str, list[float]]


def compared(two_phase: Scores, conventional: Scores, **changes: Any) -> list[Agreement]:
    """Boards of made-up rows, one score a seed."""
    rows = []
    for protocol, scores in (("two_phase", two_phase), ("conventional", conventional)):
        for name, values in scores.items():
            for seed, score in enumerate(values):
                rows.append(
                    {
                        "path": f"{protocol}/{name}/{seed}",
                        "status": "complete",
                        "reason": None,
                        "scenario": "digits",
                        "setting": "class_incremental",
                        "split": "evaluate",
                        "strategy": name,
                        "base": None,
                        "seed": seed,
                        "tuned": protocol,
                        "study": f"{protocol}-{name}",
                        "budget.seeds": len(values),
                        "average_accuracy": score,
                        **(changes if protocol == "conventional" else {}),
                    }
                )
    return agreements(build(pd.DataFrame(rows)).boards)


def steady(**means: float) -> Scores:
    return {name: [mean - 0.001, mean, mean + 0.001] for name, mean in means.items()}


def test_ranks_changes_and_tau_by_hand() -> None:
    (one,) = compared(steady(a=0.9, b=0.8, c=0.7, d=0.6), steady(a=0.7, b=0.9, c=0.8, d=0.6))
    table = one.table.set_index("strategy")
    assert table["rank_two_phase"].to_dict() == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert table["rank_conventional"].to_dict() == {"a": 3, "b": 1, "c": 2, "d": 4}
    assert table["change"].to_dict() == {"a": 2, "b": -1, "c": -1, "d": 0}
    assert table["difference"].to_dict() == pytest.approx({"a": -0.2, "b": 0.1, "c": 0.1, "d": 0})
    # Of six pairs a-b and a-c swap: (4 - 2) / 6.
    assert (one.swapped, one.pairs) == (2, 6)
    assert one.tau == pytest.approx(1 / 3)
    assert one.alone == ()


def test_tau_is_scipy_s_also_with_ties() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 4, (2, 9)) / 4 + 0.001
    names = "abcdefghi"
    (one,) = compared(
        {n: [float(v)] * 2 for n, v in zip(names, first, strict=True)},
        {n: [float(v)] * 2 for n, v in zip(names, second, strict=True)},
    )
    assert one.tau == pytest.approx(stats.kendalltau(first, second).statistic)


def test_halves_of_the_seeds_say_what_chance_may_do() -> None:
    (one,) = compared(steady(a=0.9, b=0.8, c=0.7), steady(a=0.7, b=0.8, c=0.9))
    assert (one.tau, one.halves, one.lowest) == (-1, 1, 1)
    assert "seeds alone do not explain the difference." in verdict(one)
    # Seeds 0 and 1 rank the other way round than 2 and 3; mixed halves have no order or a weak one.
    wild = {"a": [0.9, 0.9, 0.1, 0.1], "b": [0.5, 0.5, 0.5, 0.5], "c": [0.1, 0.1, 0.9, 0.8]}
    (other,) = compared(wild, {"a": [0.1] * 4, "b": [0.5] * 4, "c": [0.9] * 4})
    assert other.lowest == -1
    assert "seeds alone may explain the difference." in verdict(other)


def test_every_way_to_halve_the_seeds_counts_once() -> None:
    assert [list(_splits(n)) for n in (2, 3)] == [[[0]], [[0], [1], [2]]]
    four = {frozenset((frozenset(h), frozenset({0, 1, 2, 3} - set(h)))) for h in _splits(4)}
    assert len(four) == len(list(_splits(4))) == 3
    assert len(list(_splits(5))) == 10
    assert [len(half) for half in _splits(14)] == [7] * 500


def test_one_seed_has_no_halves() -> None:
    (one,) = compared({"a": [0.9], "b": [0.8]}, {"a": [0.9], "b": [0.8]})
    assert (one.tau, one.halves, one.lowest) == (1, None, None)
    assert "explain" not in verdict(one)


def test_strategies_that_one_protocol_lacks_or_has_twice_are_named() -> None:
    two = steady(a=0.9, b=0.8, c=0.7)
    (one,) = compared(two, steady(a=0.9, b=0.8, d=0.1))
    assert one.table["strategy"].tolist() == ["a", "b"]
    assert one.alone == ("c", "d")
    assert "Ranked by one protocol only: c, d." in verdict(one)


def test_one_strategy_has_no_order() -> None:
    (one,) = compared(steady(a=0.9), steady(a=0.8))
    assert one.tau is None
    assert "too few" in verdict(one)


@pytest.mark.parametrize(
    "change", [{"scenario": "glyphs"}, {"scenario.epochs": 3}, {"budget.trials": 30}]
)
def test_other_scenarios_options_and_budgets_are_not_compared(change: dict[str, Any]) -> None:
    assert compared(steady(a=0.9, b=0.8), steady(a=0.9, b=0.8), **change) == []


def test_errors_rank_the_other_way_round() -> None:
    way = {"setting": "test_time_adaptation"}
    scores = {"a": [0.1, 0.1], "b": [0.5, 0.5]}
    rows = [
        {
            **{"path": f"{p}{n}{s}", "status": "complete", "reason": None, "scenario": "x"},
            **{"strategy": n, "base": None, "seed": s, "tuned": p, "study": p + n, **way},
            "online_error": v,
        }
        for p in ("two_phase", "conventional")
        for n, values in scores.items()
        for s, v in enumerate(values)
    ]
    (one,) = agreements(build(pd.DataFrame(rows)).boards)
    assert one.table["strategy"].tolist() == ["a", "b"]
    assert one.tau == 1


def test_the_figure_has_a_line_for_each_strategy() -> None:
    (one,) = compared(steady(a=0.9, b=0.8, c=0.7), steady(a=0.7, b=0.8, c=0.9))
    figure = protocols.slopes(one, "digits")
    (axes,) = figure.axes
    ends = [[float(y) for y in line.get_ydata()] for line in axes.lines]
    assert ends == [[3, 1], [2, 2], [1, 3]]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--"]
    assert "a  70.0" in [text.get_text() for text in axes.texts]
