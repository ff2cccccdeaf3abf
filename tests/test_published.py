"""Published values: only beside rows of exactly the scenario that they were measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pandas as pd
import pytest
from suite import composed

from clbench import published, userspace
from clbench.config import options
from clbench.errors import UserError
from clbench.leaderboard import SCORES, Board, build
from clbench.published import Published, compare, differences, load
from clbench.results import find, flat, table

REFERENCES = userspace.configuration() / "reference"
TEXT = """
scenario: digits
options: {epochs: 20, backbone: {hidden: [400, 400], weights: null}, flip: any}
source: Doe 2020, table 1
evidence: paper
values:
  - {strategy: replay, value: 0.75}
  - {strategy: refresh, base: derpp, value: 0.5, metric: forgetting, options: {epochs: 3}}
"""


def written(folder: Path, text: str = TEXT) -> list[Published]:
    (folder / "digits.yaml").write_text(text)
    return load([folder])


def board(root: Path, *names: str, **changes: Any) -> Board:
    """Three runs of each, 0.8, 0.9 and 1.0 accurate."""
    for name in names or ("replay",):
        for seed in range(3):
            run = made_up.run(name, seed, **changes)
            scores = {"average_accuracy": 0.8 + 0.1 * seed, "forgetting": 0.25}
            made_up.stored(root, replace(run, metrics=scores))
    (made,) = build(table(find(root))).boards
    return made


def value(**changes: Any) -> Published:
    """One that fits the made-up runs."""
    content: dict[str, Any] = {
        "scenario": "digits",
        "strategy": "replay",
        "value": 0.75,
        "source": "Doe 2020",
        "evidence": "log",
        "options": made_up.OPTIONS,
    }
    return Published(**{**content, **changes})


# The files.


def test_a_file_is_read_with_what_its_values_share(tmp_path: Path) -> None:
    first, second = written(tmp_path)
    assert (first.strategy, first.base, first.value) == ("replay", None, 0.75)
    assert first.source == second.source == "Doe 2020, table 1"
    assert (first.metric, second.metric) == ("average_accuracy", "forgetting")
    assert first.options["epochs"] == 20
    assert second.options["epochs"] == 3
    assert second.options["backbone"] == {"hidden": [400, 400], "weights": None}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("values:", "value:", "no list 'values'"),
        ("values:", "colour: red\nvalues:", "colour means nothing"),
        ("value: 0.75", "value: 75", "as a fraction in"),
        ("metric: forgetting", "metric: forgotten", "a published value is one of"),
        ("evidence: paper", "evidence: memory", "evidence"),
        ("evidence: paper", "", "lacks evidence"),
        ("source: Doe 2020, table 1", "", "lacks source"),
        (
            "{strategy: replay, value: 0.75}",
            "{strategy: replay, score: 0.75}",
            "score is no option",
        ),
        ("{strategy: replay, value: 0.75}", "replay", "is no group of keys"),
        ("scenario: digits", "scenario: [", "can't be read"),
    ],
)
def test_a_file_that_is_wrong_says_where(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in TEXT
    with pytest.raises(UserError, match=message) as caught:
        written(tmp_path, TEXT.replace(old, new))
    assert "digits.yaml" in str(caught.value) or "fraction" in message or "one of" in message


def test_every_value_of_the_suite_names_a_strategy_and_all_options_of_its_scenario() -> None:
    """Or it could never be shown: an option that is not stated differs."""
    from clbench.config import build as built
    from clbench.types import Scenario

    values = load([REFERENCES])
    assert len(values) > 10
    assert {v.metric for v in values} <= set(SCORES)
    choices = {v.scenario: v for v in values}
    for name, one in choices.items():
        backbone = one.options["backbone"]["_target_"].rpartition(".")[2].lower()
        tree = composed(f"scenario={name}", f"backbone={backbone}")
        known = flat(options(built(tree["scenario"], Scenario, "scenario")))
        for v in (v for v in values if v.scenario == name):
            assert set(known) == set(flat(v.options)), (name, v.strategy)
            composed(f"strategy={v.strategy}")


# Beside a board.


def test_a_value_stands_beside_its_row_with_the_difference(tmp_path: Path) -> None:
    made = compare(board(tmp_path, "replay", "derpp"), [value()])
    rows = made.table.set_index("strategy")
    assert rows.loc["replay", "published"] == 0.75
    assert rows.loc["replay", "difference"] == pytest.approx(0.9 - 0.75)
    assert rows.loc["replay", "published_source"] == "Doe 2020 (log)"
    assert pd.isna(rows.loc["derpp", "published"])
    assert made.notes == ()


def test_what_ranks_is_shown_rather_than_another_metric(tmp_path: Path) -> None:
    made = board(tmp_path)
    other = value(metric="forgetting", value=0.2)
    for order in ([value(), other], [other, value()]):
        assert compare(made, order).table["published_metric"][0] == "average_accuracy"
    found = compare(made, [other]).table
    assert found["difference"][0] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": 50}, "epochs is 20, there 50"),
        ({"backbone": {**made_up.OPTIONS["backbone"], "hidden": [100]}}, "there [100]"),
        ({"classes": 10}, "classes is None, there 10"),
    ],
)
def test_a_value_of_other_options_is_not_applied_and_says_which(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    made = compare(board(tmp_path), [value(options={**made_up.OPTIONS, **changes})])
    assert made.table["published"].isna().all()
    (note,) = made.notes
    assert note.startswith("Published values of replay (Doe 2020) are not compared: ")
    assert reason in note


def test_an_option_that_is_not_stated_differs_unless_it_does_not_matter(tmp_path: Path) -> None:
    made = board(tmp_path)
    silent = {k: v for k, v in made_up.OPTIONS.items() if k != "flip"}
    assert differences(value(options=silent), made.options) == ["flip is False, there not stated"]
    assert differences(value(options={**silent, "flip": published.ANY}), made.options) == []


def test_data_count_as_far_as_they_are_stated(tmp_path: Path) -> None:
    run = made_up.run("replay", 0)
    made_up.stored(tmp_path, replace(run, run={**run.run, "data": {"files": "5f", "kind": "made"}}))
    (made,) = build(table(find(tmp_path))).boards
    assert differences(value(), made.options) == []
    assert differences(value(data={"files": "5f"}), made.options) == []
    wrong = differences(value(data={"kind": "published"}), made.options)
    assert wrong == ["data.kind is made, there published"]


def test_nothing_is_compared_on_the_tuning_split(tmp_path: Path) -> None:
    run = made_up.run("replay", 0)
    made_up.stored(tmp_path, replace(run, run={**run.run, "split": "tune"}))
    (made,) = build(table(find(tmp_path))).boards
    assert differences(value(), made.options) == ["split is tune"]


def test_a_value_of_a_wrapper_belongs_to_what_it_wraps(tmp_path: Path) -> None:
    made = board(tmp_path, "refresh", base="derpp")
    assert compare(made, [value(strategy="refresh")]).table["published"].isna().all()
    found = compare(made, [value(strategy="refresh", base="derpp")])
    assert found.table["published"].tolist() == [0.75]


def test_a_value_for_another_memory_is_no_news_where_one_fits(tmp_path: Path) -> None:
    other = value(options={**made_up.OPTIONS, "memory_size": 500})
    assert compare(board(tmp_path), [value(), other]).notes == ()
    assert compare(board(tmp_path), [value(scenario="glyphs")]).notes == ()
