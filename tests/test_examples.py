"""The examples run as they are written, and say what they should."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import made_up
import numpy as np
import pytest
from PIL import Image

from clbench import metrics, userspace
from clbench.results import Result

EXAMPLES = userspace.suite() / "examples"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Six seeds of two strategies, a trial of a search, and a run that failed."""
    for seed in range(6):
        for name, score in (("finetune", 0.2), ("replay", 0.8)):
            run = made_up.run(name, seed)
            scores = {"average_accuracy": score + 0.01 * seed}
            made_up.stored(tmp_path, replace(run, metrics=scores))
    made_up.stored(
        tmp_path,
        made_up.run("replay", 10**6, tuned={"protocol": "trial"}),
        made_up.failed(made_up.run("replay", 7)),
    )
    return tmp_path


def said(name: str, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    runpy.run_path(str(EXAMPLES / name))["main"](str(folder), *arguments)
    return capsys.readouterr().out


def test_there_is_a_test_for_each() -> None:
    runs = {"means_and_intervals.py", "paired_comparison.py", "forgetting_elsewhere.py"}
    names = {*runs, "errors_by_domain.py", "corruption_sheet.py"}
    assert {file.name for file in EXAMPLES.glob("*.py")} == names


def test_means_and_intervals(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = said("means_and_intervals.py", results, capsys).splitlines()
    # Deviation of 0..5 is √3.5 = 1.871, t of five degrees 2.571, √6 = 2.449: 1.96 points.
    assert first.split() == ["digits", "finetune", "22.5", "±", "2.0", "(6)"]
    assert second.split() == ["digits", "replay", "82.5", "±", "2.0", "(6)"]


def test_paired_comparison(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said("paired_comparison.py", results, capsys, "digits", "finetune").splitlines()
    # All six differences have one sign: 2 / 2⁶ = 0.031.
    assert line.split() == ["replay", "+60.0", "points,", "p", "=", "0.031"]


def test_forgetting_elsewhere(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said("forgetting_elsewhere.py", results, capsys)
    assert set(metrics.FORGETTING_CONVENTIONS) <= set(text.split())
    runs = [
        Result.from_json(path.read_text())
        for path in sorted(results.glob("runs/digits-finetune-*/result.json"))
    ]
    mean = sum(metrics.forgetting(run.accuracy_matrix) or 0 for run in runs) / len(runs)
    assert f"{100 * mean:.1f}" in text


def test_errors_by_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [made_up.adapted(name, seed) for name in ("tent", "source") for seed in range(2)]
    made_up.stored(tmp_path, *(replace(r, costs={"adaptation_time_ratio": 3.0}) for r in runs))
    said("errors_by_domain.py", tmp_path, capsys)
    made_up.stored(tmp_path, made_up.run("replay", 0))  # no test-time adaptation: no table
    header, rule, *rows = said("errors_by_domain.py", tmp_path, capsys).splitlines()[3:]
    first, *names = [cell.strip() for cell in header.strip("|").split("|")]
    assert (first, names[:6]) == ("strategy (seeds)", list(made_up.DOMAINS))
    assert names[6:] == ["online_error", "source_accuracy", "source_forgetting", "time"]
    assert rule.count("-|") == len(names) + 1
    found = {cells[1].strip(): cells[2:-1] for cells in (row.split("|") for row in rows)}
    assert found.keys() == {"tent (2)", "source (2)"}
    both = [run.online["by_domain"]["error"] for run in runs[:2]]
    means = [f"{50 * (a + b):.1f}" for a, b in zip(*both, strict=True)]
    assert [cell.strip() for cell in found["tent (2)"]][:6] == means
    assert float(found["tent (2)"][-1]) == 3.0


def test_corruption_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As wide as an image is high: what is beside its middle is cut off."""
    photo = np.full((48, 64, 3), 200, np.uint8)
    photo[:, :8] = photo[:, -8:] = 0
    Image.fromarray(photo).save(tmp_path / "photo.png")
    sheet = str(tmp_path / "sheet.png")
    said = runpy.run_path(str(EXAMPLES / "corruption_sheet.py"))["main"]
    said(str(tmp_path / "photo.png"), sheet, "32")
    assert capsys.readouterr().out.split() == [sheet]
    with Image.open(sheet) as opened:
        drawn = np.asarray(opened.convert("L"))
    assert drawn.shape[0] > 2 * drawn.shape[1], "19 rows of five"
    # Blurs, JPEG and pixelation leave a plain grey as it is: 8 rows of 19, where no edge is seen.
    assert (np.abs(drawn.astype(int) - 200) <= 2).mean() > 0.3
