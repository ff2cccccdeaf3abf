"""One run is one folder, written once; many folders are one table."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import made_up
import pandas as pd
import pytest

from clbench.errors import UserError
from clbench.results import (
    BENCHMARK_VERSION,
    SCHEMA,
    Result,
    RunFolder,
    find,
    read,
    run_id,
)


def example(**changes: Any) -> Result:
    content: dict[str, Any] = {
        "run": {
            "run_id": "digits-replay-0123abcd-s1",
            "scenario": "digits",
            "strategy": "replay",
            "base": None,
            "setting": "class_incremental",
            "split": "evaluate",
            "seed": 1,
            "options": {
                "scenario": {"epochs": 2, "backbone": {"hidden": [4, 3]}},
                "strategy": {"lr": 0.1},
            },
            "tuned": None,
        },
        "experiences": ["0, 1", "2, 3"],
        "test_sizes": [10, 20],
        "accuracy_matrix": [[1.0, None], [0.5, 1e-05]],
        "task_aware_accuracy_matrix": [[1.0, None], [0.75, 0.5]],
        "metrics": {"average_accuracy": 0.25, "forgetting": None},
        "task_aware_metrics": {"average_accuracy": 0.625},
        "costs": {"train_seconds": 1.5, "memory_samples": 20},
        "environment": {"device": "cpu", "threads": 1, "code": "abc", "torch": "2"},
    }
    return Result(**{**content, **changes})


def stored(root: Path, result: Result, folder: str | None = None) -> Path:
    where = RunFolder(root, folder or str(result.run["run_id"]))
    where.write_result(result)
    return where.path


# The file.


def test_comes_back_from_its_text() -> None:
    result = example()
    assert Result.from_json(result.to_json()) == result
    assert Result.from_json(result.to_json()).to_json() == result.to_json()


def test_has_every_field_and_begins_with_what_matters() -> None:
    content = json.loads(example().to_json())
    assert list(content)[:3] == ["schema", "status", "run"]
    assert set(content) == {f.name for f in fields(Result)}
    assert content["schema"] == SCHEMA


def test_a_row_of_a_matrix_is_a_line() -> None:
    lines = [line.strip() for line in example().to_json().splitlines()]
    assert "[1.0, null]," in lines
    assert "[0.5, 1e-05]" in lines
    assert '"test_sizes": [10, 20],' in lines


def test_texts_that_look_like_rows_stay_as_they_are() -> None:
    names = ["[\n 1,\n 2\n]", "1", "é | <b>"]
    assert Result.from_json(example(experiences=names).to_json()).experiences == names


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        example(metrics={"average_accuracy": value}).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"schema": 2, "run": {}}',
        '{"schema": 1}',
        '{"schema": 1, "run": {}, "surprise": 1}',
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json, schema and fields each say it their way
        Result.from_json(text)


def test_a_result_from_before_a_field_was_there_can_be_read() -> None:
    content = json.loads(example(strategy_facts={"a": [1]}).to_json())
    del content["strategy_facts"]
    assert Result.from_json(json.dumps(content)) == example()


# The name.


def test_the_same_run_has_the_same_name_everywhere() -> None:
    """A literal, made with sha256sum: were it to change, all runs would be repeated.

    The text is {"a": {"x": "\\u00e9", "y": [1, null]}, "b": 1, "benchmark": 1}.
    """
    identity = {"b": 1, "a": {"y": [1, None], "x": "é"}}
    assert run_id("digits", "ewc", 3, identity) == "digits-ewc-5aeb4896-s3"
    again = {"a": {"x": "é", "y": [1, None]}, "b": 1}
    assert run_id("digits", "ewc", 3, again) == run_id("digits", "ewc", 3, identity)


def test_another_run_has_another_name() -> None:
    one = run_id("digits", "ewc", 3, {"lr": 0.1})
    assert run_id("digits", "ewc", 3, {"lr": 0.2}) != one
    assert run_id("digits", "ewc", 4, {"lr": 0.1}) != one
    assert run_id("digits", "lwf", 3, {"lr": 0.1}) != one


@pytest.mark.parametrize(
    "name", ["../../etc", "a/b", "a b", "..", "é", "-rf", "a\n", "x" * 500, "", "NUL:", "$(x)"]
)
def test_names_are_harmless_folder_names(name: str, tmp_path: Path) -> None:
    found = run_id(name, name, 0, {})
    assert RunFolder(tmp_path, found).path.parent == tmp_path / "runs"
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
    assert len(found) < 200
    RunFolder(tmp_path, found).write_config("")


def test_identities_with_no_number_in_them_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_id("digits", "ewc", 0, {"lr": float("nan")})


# The folder.


def test_a_folder_has_no_result_until_the_run_has_ended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    assert folder.result() is None
    folder.write_config("seed: 1\n")
    folder.log("experience 1")
    assert folder.result() is None
    folder.write_result(example())
    assert folder.result() == example()
    assert sorted(os.listdir(folder.path)) == ["config.yaml", "log.txt", "result.json"]


@pytest.mark.parametrize("text", ["", "{", '{"schema": 0}'])
def test_a_damaged_result_is_none(text: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    folder.write_config("")
    folder.result_file.write_text(text)
    assert folder.result() is None


def test_the_log_grows(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    folder.log("one")
    folder.log("two")
    lines = (folder.path / "log.txt").read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["one", "two"]


def test_a_log_that_can_t_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        RunFolder(tmp_path, "run").log("one")


def test_a_claim_keeps_others_out_and_ends(tmp_path: Path) -> None:
    one, two = RunFolder(tmp_path, "run"), RunFolder(tmp_path, "run")
    with one.claim():
        with pytest.raises(UserError, match="Another process is running run now"), two.claim():
            pass
        with RunFolder(tmp_path, "other").claim():
            pass
    with two.claim():
        pass


def test_a_claim_ends_with_a_crash(tmp_path: Path) -> None:
    def crash() -> None:
        with RunFolder(tmp_path, "run").claim():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    with RunFolder(tmp_path, "run").claim():
        pass


def test_clear_forgets_everything_but_the_claim(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    with folder.claim():
        folder.write_result(example())
        folder.log("one")
        (folder.checkpoint / "deep").mkdir(parents=True)
        folder.clear()
        assert os.listdir(folder.path) == [".lock"]
        with pytest.raises(UserError, match="Another"), RunFolder(tmp_path, "run").claim():
            pass
    RunFolder(tmp_path, "nothing there").clear()


def test_an_unused_folder_is_forgotten_and_a_used_one_is_not(tmp_path: Path) -> None:
    unused, begun, ended = (RunFolder(tmp_path, name) for name in ("unused", "begun", "ended"))
    for folder in (unused, begun, ended):
        folder.write_config("")
    begun.checkpoint.mkdir()
    ended.write_result(example())
    for folder in (unused, begun, ended):
        folder.forget_if_unused()
    assert sorted(os.listdir(tmp_path / "runs")) == ["begun", "ended"]


# The table.


def test_a_run_is_a_row(tmp_path: Path) -> None:
    path = stored(tmp_path, example())
    (row,) = read(tmp_path).to_dict("records")
    assert row == {
        "run_id": "digits-replay-0123abcd-s1",
        "status": "complete",
        "scenario": "digits",
        "strategy": "replay",
        "base": None,
        "setting": "class_incremental",
        "split": "evaluate",
        "seed": 1,
        "tuned": None,
        "study": None,
        "pretrained": None,
        "benchmark": BENCHMARK_VERSION,
        "average_accuracy": 0.25,
        "forgetting": None,
        "task_aware_average_accuracy": 0.625,
        "train_seconds": 1.5,
        "memory_samples": 20,
        "scenario.epochs": 2,
        "scenario.backbone.hidden": "[4, 3]",
        "strategy.lr": 0.1,
        "device": "cpu",
        "threads": 1,
        "code": "abc",
        "reason": None,
        "path": str(path),
    }


def test_a_run_that_failed_keeps_its_row_without_numbers(tmp_path: Path) -> None:
    stored(tmp_path, example())
    broken = example(status="diverged", reason="the loss is nan", metrics={}, costs={})
    stored(tmp_path, broken, "z")
    good, bad = read(tmp_path).to_dict("records")
    assert good["status"] == "complete"
    assert bad["status"] == "diverged"
    assert bad["reason"] == "the loss is nan"
    assert bad["strategy.lr"] == 0.1
    assert pd.isna(bad["average_accuracy"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        '{"schema": 99}',
        '{"schema": 1, "run": []}',
        '{"schema": 1, "run": {}, "metrics": [1]}',
        '{"schema": 1, "run": {}, "costs": null}',
        '{"schema": 1, "run": {"options": 3}}',
        '{"schema": 1, "run": {}, "environment": 1}',
        '{"schema": 2, "run": {"scenario": "a", "strategy": "b", "seed": 0}}',
        '{"schema": 1, "run": {"scenario": ["a"], "strategy": "b", "seed": 0}}',
        '{"schema": 1, "run": {"scenario": "a", "strategy": "b", "seed": "0"}}',
        '{"schema": 1, "run": {"scenario": "a", "strategy": "b", "seed": 0},'
        ' "metrics": {"m": NaN}}',
        '{"schema": 1, "run": {"scenario": "a", "strategy": "b", "seed": 0},'
        ' "costs": {"c": 1e999}}',
        '{"schema": 1, "run": {"scenario": "a", "strategy": "b", "seed": 0}, "costs": {"c": "1"}}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_what_is_no_result_is_an_unreadable_row(text: str, tmp_path: Path) -> None:
    stored(tmp_path, example())
    other = tmp_path / "runs" / "a" / "result.json"
    other.parent.mkdir()
    other.write_bytes(text.encode(errors="surrogatepass"))
    bad, good = read(tmp_path).to_dict("records")
    assert good["status"] == "complete"
    assert bad["status"] == "unreadable"
    assert bad["run_id"] == "a"
    assert bad["path"] == str(other.parent)
    assert isinstance(bad["reason"], str)


def test_a_file_can_t_pass_itself_off_as_something_else(tmp_path: Path) -> None:
    """Keys of a file that have the names of our columns change none of them."""
    run = {**example().run, "status": "complete", "path": "elsewhere", "base": ["a"]}
    stored(tmp_path, example(run=run, status="failed", metrics={"seed": 7, "status": 1}))
    (row,) = read(tmp_path).to_dict("records")
    assert (row["status"], row["seed"], row["base"]) == ("failed", 1, '["a"]')
    assert row["path"] == str(tmp_path / "runs" / "digits-replay-0123abcd-s1")


def test_the_version_of_the_numbers_is_known_also_of_files_from_before(tmp_path: Path) -> None:
    path = stored(tmp_path, example(benchmark=7))
    assert read(tmp_path)["benchmark"].tolist() == [7]
    content = json.loads((path / "result.json").read_text())
    del content["benchmark"]
    (path / "result.json").write_text(json.dumps(content))
    assert read(tmp_path)["benchmark"].tolist() == [1]


@pytest.mark.parametrize(
    ("facts", "trained"),
    [
        ({}, None),
        ({"backbone": {"weights": None}}, False),
        ({"backbone": {"weights": {"file": "a"}}}, True),
        ({"backbone": {"weights": None}, "source_model_sha256": "a"}, True),
    ],
)
def test_whether_a_model_began_trained(facts: Any, trained: bool | None, tmp_path: Path) -> None:
    stored(tmp_path, example(scenario_facts=facts))
    assert read(tmp_path)["pretrained"].tolist() == [trained]


def test_budgets_of_searches_are_columns(tmp_path: Path) -> None:
    tuned = {"protocol": "two_phase", "study": "digits-replay-1", "trials": 30, "seeds": 5}
    stored(tmp_path, example(run={**example().run, "tuned": tuned}))
    (row,) = read(tmp_path).to_dict("records")
    assert (row["tuned"], row["study"]) == ("two_phase", "digits-replay-1")
    assert (row["budget.trials"], row["budget.seeds"]) == (30, 5)


def test_folders_of_runs_that_have_not_ended_are_found_but_no_rows(tmp_path: Path) -> None:
    stored(tmp_path, example())
    (tmp_path / "runs" / "begun" / "checkpoint").mkdir(parents=True)
    RunFolder(tmp_path, "planned").write_config("a: 1")
    (tmp_path / "tuned").mkdir()
    found = {each.path.name: each.row for each in find(tmp_path)}
    assert found["begun"]["status"] == found["planned"]["status"] == "unfinished"
    assert found["begun"]["reason"] != found["planned"]["reason"]
    assert len(found) == 3
    assert len(read(tmp_path)) == 1


def test_runs_are_found_from_any_folder_above_or_below(tmp_path: Path) -> None:
    path = stored(tmp_path / "mine", example())
    stored(tmp_path / "theirs", example())
    assert len(read(tmp_path)) == 2
    assert len(read(tmp_path / "mine")) == 1
    assert len(read(path)) == 1
    assert len(read(str(path))) == 1


def test_a_folder_without_runs_is_an_empty_table(tmp_path: Path) -> None:
    assert read(tmp_path).empty


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No results folder"):
        read(tmp_path / "nowhere")


def test_halves_of_characters_are_no_text() -> None:
    """JSON can hold them; a table that another program keeps cannot."""
    written = made_up.run("replay", values={"name": "\ud83d\ude00 \ud800"}).to_json()
    assert "\\ud800" in written
    found = Result.from_json(written)
    assert found.run["options"]["strategy"]["name"] == "\U0001f600 ?"
    assert found.to_json().encode().decode() == found.to_json()
