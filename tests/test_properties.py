"""Whatever comes in: properties of metrics, results, configurations and texts, by hypothesis."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import made_up
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from clbench import config, metrics
from clbench.discretion import discreet
from clbench.errors import UserError
from clbench.results import Result, find, flat, run_id
from clbench.state import data
from clbench.testing import ToyScenario
from clbench.text.instruction_files import read_items, read_labels
from clbench.types import Scenario, Split

settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")

SHARES = some.floats(0, 1, allow_nan=False)
PLAIN = some.recursive(
    some.none() | some.booleans() | some.integers(-(10**9), 10**9) | some.text() | SHARES,
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(), inner, max_size=4),
    max_leaves=12,
)


@some.composite
def matrices(draw: Any, most: int = 6) -> list[list[float | None]]:
    """Lower triangles of accuracies."""
    n = draw(some.integers(1, most))
    return [[draw(SHARES) for _ in range(i + 1)] + [None] * (n - i - 1) for i in range(n)]


# Metrics.


@given(matrices())
def test_metrics_stay_in_their_ranges(matrix: list[list[float | None]]) -> None:
    found = metrics.summary(matrix, [10] * len(matrix))
    ranges = {"average_accuracy": (0, 1), "average_incremental_accuracy": (0, 1)}
    ranges |= {"learning_accuracy": (0, 1), "forgetting": (-1, 1), "backward_transfer": (-1, 1)}
    for name, (low, high) in ranges.items():
        value = found[name]
        if value is not None:
            assert low - 1e-12 <= value <= high + 1e-12, name
    assert all(v is None or math.isfinite(v) for v in found.values())
    if len(matrix) == 1:
        assert found["forgetting"] is None


@given(matrices(), SHARES)
def test_better_answers_at_the_end_are_no_worse_metrics(
    matrix: list[list[float | None]], gain: float
) -> None:
    better = [list(row) for row in matrix]
    better[-1] = [None if v is None else min(1.0, v + gain) for v in better[-1]]
    sizes = [10] * len(matrix)
    one, other = metrics.summary(matrix, sizes), metrics.summary(better, sizes)
    for name in ("average_accuracy", "average_incremental_accuracy"):
        assert (other[name] or 0) >= (one[name] or 0) - 1e-12


@given(matrices())
def test_where_nothing_changes_nothing_is_forgotten(matrix: list[list[float | None]]) -> None:
    still = [
        [matrix[j][j] if j <= i else None for j in range(len(matrix))] for i in range(len(matrix))
    ]
    found = metrics.summary(still, [10] * len(still))
    assert found["forgetting"] in (None, 0)
    assert found["backward_transfer"] in (None, 0)


# Results.


@given(matrices(), some.dictionaries(some.text(), PLAIN, max_size=3), some.text())
def test_a_result_comes_back_from_its_text(
    matrix: list[list[float | None]], facts: dict[str, Any], reason: str
) -> None:
    result = made_up.run(accuracy_matrix=matrix, strategy_facts=facts, reason=reason)
    assert Result.from_json(result.to_json()) == result


@given(PLAIN)
def test_any_json_is_a_result_or_a_value_error(content: Any) -> None:
    whole = {**made_up.plain(made_up.run()), "run": content}
    for tree in (content, {"schema": 1, "run": content}, whole):
        with contextlib.suppress(ValueError):
            Result.from_json(json.dumps(tree))


@given(some.binary(max_size=200))
@settings(max_examples=30)
def test_any_file_is_a_row(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("runs") / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "result.json").write_bytes(content)
    (found,) = find(folder.parent)
    assert found.row["status"] == "unreadable"
    assert found.result is None


@given(some.text(), some.text(), some.integers(0, 10**6), some.dictionaries(some.text(), PLAIN))
def test_run_ids_are_names_of_folders(
    scenario: str, strategy: str, seed: int, identity: dict[str, Any]
) -> None:
    found = run_id(scenario, strategy, seed, identity)
    assert found == run_id(scenario, strategy, seed, identity)
    assert Path(found).name == found
    assert len(found) < 200
    assert found.isascii()
    assert found not in (".", "..")


@given(some.dictionaries(some.text(), PLAIN, max_size=4))
def test_flat_options_have_no_groups_left(tree: dict[str, Any]) -> None:
    assert not any(isinstance(value, dict | list) for value in flat(tree).values())


# Configurations.


@given(some.dictionaries(some.sampled_from(["epochs", "noise", "seed", "x", "_target_"]), PLAIN))
def test_any_node_is_built_or_refused_by_a_message(node: dict[str, Any]) -> None:
    for tree in (node, {**node, "_target_": "clbench.testing.ToyScenario"}):
        try:
            built = config.build(tree, Scenario, "scenario")
        except UserError:
            continue
        again = config.build(config.options(built), Scenario, "scenario")
        assert config.options(again) == config.options(built)


@given(some.integers(1, 5), some.floats(0, 100), some.integers(0, 3))
def test_options_of_a_scenario_build_it_again(epochs: int, noise: float, seed: int) -> None:
    toy = ToyScenario(epochs=epochs, noise=noise)
    assert config.build(config.options(toy), Scenario, "scenario") == toy
    assert toy.stream(Split.EVALUATE, seed).n_outputs == 6


@given(PLAIN)
def test_plain_state_is_copied_whole(value: Any) -> None:
    assert data(value, "x") == value


# Texts.


@given(some.lists(some.dictionaries(some.text(), PLAIN, max_size=3), max_size=4), some.booleans())
def test_items_come_back_from_their_file(
    tmp_path_factory: pytest.TempPathFactory, items: list[dict[str, Any]], lines: bool
) -> None:
    path = tmp_path_factory.mktemp("text") / ("a.jsonl" if lines else "a.json")
    text = "\n".join(map(json.dumps, items)) if lines else json.dumps(items)
    path.write_text(text)
    assert [item.content for item in read_items(path)] == items


@given(some.binary(max_size=100) | some.text(max_size=100).map(str.encode))
def test_any_bytes_are_items_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("text")
    for name in ("a.json", "a.jsonl"):
        (folder / name).write_bytes(content)
        for read in (read_items, read_labels):
            with contextlib.suppress(UserError):
                read(folder / name)


@given(some.text())
def test_discretion_leaves_what_is_no_secret(text: str) -> None:
    harmless = text.replace("/", "").replace("~", "")
    if not harmless.strip():
        return
    assert len(discreet(harmless)) > 0
    assert discreet(discreet(harmless)) == discreet(harmless)
