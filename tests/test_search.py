"""Search spaces, and proposals that a killed search makes again."""

from __future__ import annotations

from typing import Any

import pytest

from clbench.errors import UserError
from clbench.search import Outcome, Space, hopeless, propose, with_values

NODE: dict[str, Any] = {
    "_target_": "strategies.refresh.Refresh",
    "gamma": 0.1,
    "steps": 1,
    "base": {
        "lr": 0.1,
        "alpha": 0.5,
        "search": {"lr": "tag(log, interval(0.001, 0.3))", "alpha": "interval(0.0, 1.0)"},
    },
    "search": {"steps": "choice(1, 2, 3)", "base.alpha": "choice(0.25, 0.75)"},
}


def outcomes(values: list[dict[str, Any]], *scores: tuple[float, ...]) -> list[Outcome]:
    return [Outcome(v, s, "complete") for v, s in zip(values, scores, strict=False)]


def test_the_space_of_the_base_counts_and_the_wrapper_has_the_last_word() -> None:
    assert Space(NODE).texts == {
        "base.lr": "tag(log, interval(0.001, 0.3))",
        "base.alpha": "choice(0.25, 0.75)",
        "steps": "choice(1, 2, 3)",
    }


def test_values_go_where_they_belong() -> None:
    changed = with_values(NODE, {"steps": 3, "base.lr": 0.2})
    assert changed["steps"] == 3
    assert changed["base"]["lr"] == 0.2
    assert changed["base"]["alpha"] == 0.5
    assert NODE["steps"] == 1
    assert NODE["base"]["lr"] == 0.1


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe"])
def test_proposals_lie_in_the_space(sampler: Any) -> None:
    for values in propose(Space(NODE), sampler, 20, 20, 0, ()):
        assert 0.001 <= values["base.lr"] <= 0.3
        assert values["base.alpha"] in (0.25, 0.75)
        assert values["steps"] in (1, 2, 3)


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_what_does_not_look_at_outcomes_is_the_same_wherever_it_goes_on(sampler: Any) -> None:
    space = Space(NODE)
    whole = propose(space, sampler, 10, 3, 0, ())
    assert len(whole) == 10
    for done in (1, 4, 9):
        so_far = outcomes(whole, *[(0.1 * i,) for i in range(done)])
        assert propose(space, sampler, 10, 3, 0, so_far) == whole[done:]
    assert propose(space, sampler, 10, 3, 1, ()) != whole


def test_tpe_proposes_a_batch_that_follows_from_the_outcomes() -> None:
    space = Space(NODE)
    first = propose(space, "tpe", 20, 5, 0, ())
    assert len(first) == 5
    good = outcomes(first, *[(0.1 * i,) for i in range(5)])
    second = propose(space, "tpe", 20, 5, 0, good)
    assert second == propose(space, "tpe", 20, 5, 0, good)
    other = outcomes(first, *[(-0.1 * i,) for i in range(5)])
    assert second != propose(space, "tpe", 20, 5, 0, other)


def test_a_failed_trial_counts_and_does_not_stop_the_search() -> None:
    space = Space(NODE)
    first = propose(space, "tpe", 6, 5, 0, ())
    so_far = [Outcome(first[0], (), "failed"), *outcomes(first[1:], *[(0.5,)] * 4)]
    assert len(propose(space, "tpe", 6, 5, 0, so_far)) == 1


def test_a_grid_has_every_combination_once() -> None:
    node = {"a": 1, "b": 1, "search": {"a": "choice(1, 2)", "b": "range(0, 3)"}}
    found = propose(Space(node), "grid", 100, 1, 0, ())
    assert [(v["a"], v["b"]) for v in found] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert len(propose(Space(node), "grid", 4, 1, 0, ())) == 4


def test_a_grid_refuses_an_interval() -> None:
    with pytest.raises(UserError, match=r"base\.lr is tag\(log, interval"):
        propose(Space(NODE), "grid", 4, 1, 0, ())


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"lr": "0.1"}, "is no search space"),
        ({"lr": "interval(0.1"}, "is no search space"),
        ({"lrr": "choice(1, 2)"}, "search.lrr names no option"),
        ({"lr": "tag(log, interval(0, 1))"}, "reaches zero"),
        ({"lr": "interval(1.0, 0.5)"}, "is empty"),
    ],
)
def test_a_space_that_cannot_be_is_refused(entry: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        propose(Space({"lr": 0.1, "search": entry}), "random", 2, 1, 0, ())


def test_seeds_that_all_lose_to_the_best_trial_are_hopeless() -> None:
    space = Space(NODE)
    values = propose(space, "random", 2, 1, 0, ())
    best = [Outcome(values[0], tuple(0.8 + 0.01 * i for i in range(8)), "complete")]
    worse = [0.5 + 0.01 * i for i in range(6)]
    better = [0.9 + 0.01 * i for i in range(6)]
    assert hopeless(space, best, worse)
    assert not hopeless(space, best, better)
    assert not hopeless(space, best, worse[:2])  # two seeds prove nothing
    assert not hopeless(space, (), worse)
