"""`from clbench import run`: the same as the command line, from names or from objects."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from suite import Command, write_all

from clbench import Result, UserError, read, run
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy

SMALL = {"scenario.epochs": 1, "backbone.hidden": [8]}
TOY = ToyScenario(per_class=10, epochs=1)


class Learner(GradientStrategy):
    """Plain fine-tuning."""


def numbers(result: Result) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(result.to_json())
    for name in ("train_seconds", "evaluate_seconds", "peak_memory_bytes"):
        del content["costs"][name]
    return content


def test_names_give_the_run_of_the_command_line(work: Path, command: Command) -> None:
    found = run("digits", "refresh", 3, SMALL, threads=1, results_dir=work / "results")
    assert found.status == "complete"
    assert found.run["base"] == "derpp"
    arguments = ("strategy=refresh", "seed=3", "scenario.epochs=1", "backbone.hidden=[8]")
    done = command(*arguments, "threads=1")
    assert "there already" in done.stderr
    assert found.run["run_id"] in done.stdout
    assert list(read(work / "results").run_id) == [found.run["run_id"]]


@pytest.mark.usefixtures("work")
def test_overrides_may_be_lines_or_a_mapping_of_plain_values() -> None:
    lines = ["scenario.epochs=1", "backbone.hidden=[8]", "strategy@strategy.base=er_ace"]
    texts = run("digits", "refresh", 0, lines, threads=1)
    mapped = {**SMALL, "strategy@strategy.base": "er_ace"}
    assert numbers(run("digits", "refresh", 0, mapped, threads=1)) == numbers(texts)
    assert texts.run["base"] == "er_ace"
    one = run("digits", "finetune", 0, {**SMALL, "strategy.optimizer": "adam"}, threads=1)
    assert one.run["options"]["strategy"]["optimizer"] == "adam"


@pytest.mark.usefixtures("work")
def test_a_mapping_of_values_is_one_value() -> None:
    asked = {"strategy.name": "EWC", "strategy.arguments": {"ewc_lambda": 2.5, "mode": "separate"}}
    found = run(TOY, "avalanche", 0, asked, threads=1)
    assert found.run["options"]["strategy"]["arguments"] == asked["strategy.arguments"]
    with pytest.raises(UserError, match=r"strategy\.arguments\.lamda is no argument of EWC"):
        run(TOY, "avalanche", 0, {"strategy.name": "EWC", "strategy.arguments": {"lamda": 1}})
    with pytest.raises(UserError, match=r"strategy\.argument is no option of Avalanche"):
        run(TOY, "avalanche", 0, {"strategy.argument": {"lamda": 1}})


TEXTS = [
    "a 'b', c",
    "a\\b",
    "a\\\\b",
    "end\\",
    "x\\'y",
    "${seed}",
    "${oc.env:HOME}",
    "a=b",
    "{x:[1]}",
]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("text", TEXTS)
def test_text_in_a_mapping_is_a_value_and_nothing_else(text: str) -> None:
    with pytest.raises(UserError) as caught:
        run("image_folder", "finetune", 0, {"scenario.root": text})
    assert f"{os.sep}{text}. Set scenario.root" in str(caught.value)


def test_objects_are_taken_as_they_are(work: Path) -> None:
    found = run(TOY, Learner(lr=0.05), 1, threads=1)
    assert found.run["options"]["strategy"]["lr"] == 0.05
    assert found.run["seed"] == 1
    assert list(work.iterdir()) == []
    kept = run(TOY, Learner(lr=0.05), 1, threads=1, results_dir=work / "results")
    assert numbers(kept) == numbers(found)
    (folder,) = (work / "results" / "runs").iterdir()
    assert folder.name == found.run["run_id"]
    assert "lr: 0.05" in (folder / "config.yaml").read_text()


def test_a_run_that_is_there_is_read_unless_forced(work: Path) -> None:
    first = run(TOY, Learner(), threads=1, results_dir=work)
    assert run(TOY, Learner(), threads=1, results_dir=work) == first
    forced = run(TOY, Learner(), threads=1, results_dir=work, force=True)
    assert forced.costs["train_seconds"] != first.costs["train_seconds"]


def test_a_result_is_a_table_too() -> None:
    """One row an entry of the matrix; tables of several runs are joined and pivoted."""
    results = [run(TOY, Learner(), seed, threads=1) for seed in (0, 1)]
    frame = pd.concat([result.frame() for result in results])
    assert len(frame) == 2 * 6
    for result in results:
        mine = frame[frame.seed == result.run["seed"]].pivot(index="learned", columns="tested")
        for name in ("accuracy", "task_aware_accuracy"):
            expected = pd.DataFrame(vars(result)[f"{name}_matrix"], dtype=float)
            assert np.array_equal(mine[name].to_numpy(), expected.to_numpy(), equal_nan=True)
    assert set(frame.experience) == {name for r in results for name in r.experiences}
    assert set(frame.strategy) == {"learner"}


@pytest.mark.usefixtures("work")
def test_a_name_and_an_object_go_together() -> None:
    mixed = run(TOY, "finetune", 0, "strategy.lr=0.3", threads=1)
    assert mixed.run["options"]["strategy"]["lr"] == 0.3
    assert mixed.run["scenario"] == "toyscenario"
    assert mixed.run["strategy"] == "finetune"
    assert run("digits", Learner(), 0, SMALL, threads=1).run["scenario"] == "digits"


@pytest.mark.usefixtures("fresh")
def test_the_working_folder_s_own_files_count(work: Path) -> None:
    files = {
        "strategies/mine.py": (
            "from dataclasses import dataclass\n"
            "from clbench.training import GradientStrategy\n\n"
            "@dataclass(kw_only=True)\nclass Mine(GradientStrategy):\n    strength: float = 1.0\n"
        ),
        "conf/strategy/mine.yaml": "_target_: strategies.mine.Mine\nstrength: 2.0\nlr: 0.1\n",
    }
    write_all(work, files)
    found = run("digits", "mine", 0, SMALL, threads=1)
    assert found.run["options"]["strategy"]["strength"] == 2.0


@pytest.mark.usefixtures("work")
def test_conditions_reach_the_run() -> None:
    often = run(TOY, Learner(), split="tune", threads=1, evaluate_every=3, evaluate_samples=2)
    assert often.evaluations
    assert often.run["split"] == "tune"
    assert run(TOY, Learner(), threads=1, precision="bf16").run["precision"] == "bf16"


def test_progress_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    run(TOY, Learner(), threads=1)
    assert capfd.readouterr().err == ""
    run(TOY, Learner(), threads=1, progress=True)
    assert "toyscenario learner seed 0 · experience 3/3" in capfd.readouterr().err


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "scenario": ({"scenario": "digit"}, "No scenario 'digit'. Did you mean 'digits'?"),
    "strategy": ({"strategy": "ewcc"}, "No strategy 'ewcc'. Did you mean 'ewc'?"),
    "key": ({"overrides": "strategy.lrr=1"}, "No option 'strategy.lrr'. Did you mean"),
    "type": ({"overrides": {"strategy.lr": "fast"}}, "strategy.lr='fast' has the wrong type"),
    "range": ({"overrides": "strategy.lr=-1"}, "lr=-1.0 is out of range"),
    "no equals sign": ({"overrides": ["strategy.lr"]}, "It is written key=value"),
    "argument": ({"overrides": "seed=3"}, r"say run(..., seed=...)"),
    "object": ({"scenario": TOY, "overrides": "scenario.epochs=2"}, "the scenario is an object"),
    "backbone": ({"scenario": TOY, "overrides": "backbone=mlp"}, "the scenario is an object"),
    "split": ({"split": "test"}, "split='test' has the wrong type or value"),
    "seed": ({"seed": -1}, "seed=-1 is out of range"),
    "pair": ({"scenario": TOY, "strategy": "tent"}, "does not work in the class_incremental"),
}


@pytest.mark.parametrize(("given", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_message_and_nothing_is_written(
    given: dict[str, Any], said: str, work: Path
) -> None:
    arguments = {"scenario": "digits", "strategy": "finetune", "results_dir": work / "results"}
    with pytest.raises(UserError) as caught:
        run(**{**arguments, **given})
    assert said in str(caught.value)
    assert list(work.iterdir()) == []


def test_a_surrounding_hydra_program_is_left_alone(work: Path, fresh: None) -> None:  # noqa: ARG001
    from hydra import compose, initialize_config_dir

    write_all(work, {"theirs/config.yaml": "own: 1\n"})
    with initialize_config_dir(str(work / "theirs"), version_base="1.3"):
        run("digits", "finetune", 0, SMALL, threads=1)
        assert compose("config").own == 1


def test_overriding_an_object_is_done_by_replace() -> None:
    assert run(replace(TOY, epochs=2), Learner(), threads=1).costs["train_samples"] == 120
