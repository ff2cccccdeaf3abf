"""The folder that a report leaves: Markdown, CSV and figures of made-up runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pandas as pd
import pytest

from clbench import markdown, report
from clbench.errors import UserError
from clbench.findings import gather
from clbench.results import Result

#: What must not reach a reader's browser, table or figure as anything but text.
NASTY = "<script>alert(1)</script> | a\n`b` $\\frac$ _c_ [d](http://e) \x00\ud800 é"


def scored(strategy: str, seed: int, score: float, **changes: Any) -> Result:
    result = made_up.run(strategy, seed, **changes)
    return replace(result, metrics={"average_accuracy": score})


def text(root: Path) -> str:
    report.write(root)
    return (root / "leaderboard" / "leaderboard.md").read_text()


def cells(markdown: str, strategy: str) -> dict[str, str]:
    """The row of a strategy in the first table that has it."""
    lines = markdown.splitlines()
    (row,) = [i for i, line in enumerate(lines) if f"| {strategy} |" in line]
    head = max(i for i, line in enumerate(lines[:row]) if line.startswith("| rank |"))
    split = [re.split(r"(?<!\\)\|", lines[i])[1:-1] for i in (head, row)]
    return {k.strip(): v.strip() for k, v in zip(*split, strict=True)}


def test_a_row_says_how_good_how_sure_and_at_what_price(tmp_path: Path) -> None:
    made_up.stored(tmp_path, scored("a", 0, 0.25), scored("a", 1, 0.75))
    row = cells(text(tmp_path), "a")
    # Deviation √((0.25² + 0.25²) / 1) = 0.354, its mean's √(0.125 / 2) = 0.25; Student's t for
    # one degree of freedom is tan(0.475 π) = 12.706, and 12.706 · 0.25 = 317.7 %.
    assert row["average accuracy, %"] == "50.0 ± 317.7"
    assert (row["rank"], row["seeds"], row["tuned"]) == ("1", "2", "no")
    assert (row["samples kept"], row["exemplar-free"]) == ("200", "no")
    assert (row["parameters"], row["pre-trained"]) == ("190,410", "no")
    assert row["peak memory, MB"] == "873"


def test_what_did_not_complete_shows_and_is_no_number(tmp_path: Path) -> None:
    made_up.stored(
        tmp_path,
        scored("a", 0, 0.25),
        made_up.failed(made_up.run("a", 1), "diverged", "the loss is nan"),
        made_up.failed(made_up.run("b", 0)),
        scored("c", 0, 0.5),
    )
    found = text(tmp_path)
    assert cells(found, "a")["seeds"] == "1 (1 diverged)"
    assert cells(found, "a")["average accuracy, %"] == "-"
    assert cells(found, "b")["seeds"] == "0 (1 failed)"
    assert cells(found, "c")["rank"] == "1"
    assert "the loss is nan" in found
    assert "nan" not in found.replace("the loss is nan", "").lower()


def test_what_a_search_cost_and_its_protocol_stand_in_the_row(tmp_path: Path) -> None:
    study = made_up.study("a")
    made_up.kept(tmp_path, study)
    tuned = made_up.tuned_by(study)
    made_up.stored(tmp_path, *(scored("a", seed, 0.5, tuned=tuned) for seed in range(3)))
    row = cells(text(tmp_path), "a")
    assert (row["tuned"], row["tuning, s"], row["trials"]) == ("two phases", "100", "8")


def test_everything_that_is_in_no_table_is_named(tmp_path: Path) -> None:
    made_up.stored(tmp_path, scored("a", 0, 0.5))
    bad = {
        "broken": "{",
        "other-schema": json.dumps({**made_up.plain(scored("a", 1, 0.5)), "schema": 99}),
        "no-number": json.dumps({**made_up.plain(scored("a", 1, 0.5)), "metrics": {"x": "y"}}),
        "copy": made_up.run("a", 0).to_json(),
    }
    for name, content in bad.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "result.json").write_text(content)
    (tmp_path / "runs" / "half" / "checkpoint").mkdir(parents=True)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "torn.json").write_text('{"schema": 1, "trials": [{"sc')
    trial = made_up.run("a", 10**6, tuned={"protocol": "trial"})
    made_up.stored(tmp_path, trial)
    found = text(tmp_path)
    for name in (*bad, "half", "torn.json"):
        assert name in found
    assert "schema 99" in found
    assert "1 run of searches" in found
    assert cells(found, "a")["seeds"] == "1"
    left = pd.read_csv(tmp_path / "leaderboard" / "left_out.csv")
    assert sorted(left["kind"]) == ["duplicate", *["unfinished"], *["unreadable"] * 4]


def test_boards_of_other_options_say_why_they_are_apart(tmp_path: Path) -> None:
    made_up.stored(
        tmp_path, scored("a", 0, 0.25), scored("a", 0, 0.5, options={"epochs": 3, "flip": True})
    )
    found = text(tmp_path)
    assert "## digits: epochs = 20, flip = False" in found
    assert "## digits: epochs = 3, flip = True" in found
    assert "epochs is 3 here, 20 elsewhere; flip is True here, False elsewhere." in found


def test_the_report_is_the_same_when_made_again(tmp_path: Path) -> None:
    made_up.stored(tmp_path, *(made_up.run(s, i) for s in ("a", "b") for i in range(2)))
    made_up.kept(tmp_path, made_up.study("a", trials=12))
    first = {path: path.read_bytes() for path in report.write(tmp_path)}
    assert {path: path.read_bytes() for path in report.write(tmp_path)} == first
    assert all(path.is_relative_to(tmp_path / "leaderboard") for path in first)


def test_the_csv_says_the_same_as_the_boards(tmp_path: Path) -> None:
    made_up.stored(tmp_path, scored("a", 0, 0.25), scored("a", 1, 0.75))
    report.write(tmp_path)
    (row,) = pd.read_csv(tmp_path / "leaderboard" / "leaderboard.csv").to_dict("records")
    assert (row["strategy"], row["seeds"], row["average_accuracy"]) == ("a", 2, 0.5)
    assert (row["scenario"], row["protocol"], row["scenario.epochs"]) == ("digits", "untuned", 20)


@pytest.mark.parametrize("held_out", [True, False])
def test_adaptation_has_its_matrix_where_images_were_held_out(
    held_out: bool, tmp_path: Path
) -> None:
    runs = [made_up.adapted("tent"), made_up.adapted("bn_adapt")]
    if held_out:
        runs = [replace(run, accuracy_matrix=[[0.5] * 6] * 6) for run in runs]
    made_up.stored(tmp_path, *runs)
    kinds = {path.name.partition("-")[0] for path in report.write(tmp_path)}
    assert {"domains", "source"} <= kinds
    assert ("matrices" in kinds) == held_out
    assert "curves" not in kinds


def test_names_from_files_are_text_everywhere(tmp_path: Path) -> None:
    long = "x" * 300
    made_up.stored(
        tmp_path,
        *(made_up.run(NASTY, seed, scenario=NASTY, values={NASTY: NASTY}) for seed in range(2)),
        *(made_up.run(long, seed, scenario=NASTY) for seed in range(2)),
        made_up.failed(made_up.run("c", 0, scenario=NASTY), reason=NASTY),
        made_up.adapted(NASTY, domains=[NASTY] * 6),
    )
    made_up.kept(tmp_path, replace(made_up.study(trials=12), name="a$b", strategy=NASTY))
    written = report.write(tmp_path)
    found = (tmp_path / "leaderboard" / "leaderboard.md").read_text()
    assert "<script" not in found
    assert "\\[d\\](http://e)" in found
    assert long in found
    table = [line for line in found.splitlines() if line.startswith("| ")]
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in table[:4]}) == 1
    figures = [path for path in written if path.suffix == ".svg"]
    assert len(figures) > 6
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,90}", path.name) for path in written)
    assert not any(b"<script" in path.read_bytes() for path in figures)


@pytest.mark.parametrize("words", ["`", "``a`", "a ` b", "plain", "<b>|$x$"])
def test_a_span_of_code_can_t_be_left(words: str) -> None:
    made = markdown.code(words)
    fence = re.match("`+", made)
    assert fence
    inside = made[len(fence[0]) : -len(fence[0])]
    assert made.endswith(fence[0])
    assert fence[0] not in re.findall("`+", inside)
    assert inside.strip() == words


def test_figures_that_are_not_made_again_go(tmp_path: Path) -> None:
    made_up.stored(tmp_path, made_up.run("a", 0), made_up.run("b", 0))
    report.write(tmp_path)
    folder = tmp_path / "leaderboard" / "figures"
    before = {path.name for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    made_up.stored(tmp_path, made_up.run("a", 0, options={"epochs": 3}))
    report.write(tmp_path)
    after = {path.name for path in folder.iterdir()}
    assert "notes.txt" in after
    assert len(after) > len(before)
    for path in (tmp_path / "runs").glob("*/result.json"):
        if '"epochs": 3' in path.read_text():
            path.unlink()
            (path.parent).rmdir()
    report.write(tmp_path)
    assert {path.name for path in folder.iterdir()} == before | {"notes.txt"}


def measured(*modules: tuple[str, float, float]) -> dict[str, Any]:
    keys = {"kind": "linear", "size": 1, "score": None, "finetuned": 0}
    return {
        "sensitivity": [{"name": n, "within": [w], "across": [a], **keys} for n, w, a in modules]
    }


def test_a_report_draws_the_sensitivity_that_runs_have_measured(tmp_path: Path) -> None:
    """One figure for the seeds of a configuration; none of tuning, nor of what is incomplete."""
    tuning = made_up.run("c", 0, strategy_facts=measured(("x", 1.0, 2.0)))
    made_up.stored(
        tmp_path,
        *(made_up.run("a", s, strategy_facts=measured(("head", 1.0, 2.0))) for s in (0, 1)),
        replace(tuning, run={**tuning.run, "split": "tune", "run_id": "tuning-s0"}),
        made_up.failed(made_up.run("b", 0, strategy_facts=measured(("x", 1.0, 2.0)))),
        made_up.run("d", 0),
    )
    written = report.write(tmp_path)
    (figure,) = [p for p in written if p.name.startswith("sensitivity") and p.suffix == ".png"]
    assert figure.name.startswith("sensitivity-digits-a-")
    assert figure.read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "leaderboard" / "leaderboard.md").read_text()
    assert f"(figures/{figure.stem}.svg)" in markdown


def test_protocols_are_compared_where_a_scenario_has_both(tmp_path: Path) -> None:
    skills = {"a": (0.9, 0.7), "b": (0.8, 0.8), "c": (0.5, 0.5), "d": (0.3, 0.3)}
    for name, both in skills.items():
        for protocol, score in zip(("two_phase", "conventional"), both, strict=True):
            study = made_up.study(name, protocol, digest=protocol)
            made_up.kept(tmp_path, study)
            tuned = made_up.tuned_by(study)
            runs = (scored(name, s, score + 0.001 * s, tuned=tuned) for s in range(3))
            made_up.stored(tmp_path, *runs)
    found = text(tmp_path)
    assert "## Two phases against tuning on what is reported" in found
    # One of six pairs swaps: tau = (5 - 1) / 6.
    assert "tau is 0.67 over 4 strategies: 1 of 6 pairs swap. " in found
    assert "| a | 1 | 2 | +1 | 90.1 | 70.1 | -20.0 |" in found
    assert "figures/protocols-digits-" in found


def test_a_report_of_unreadable_runs_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "runs" / "broken" / "result.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    assert "runs/broken" in text(tmp_path)


def test_a_report_of_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No runs below"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="No results folder"):
        gather(tmp_path / "nowhere")
