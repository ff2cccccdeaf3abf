"""Figures: what they hold; how they look is for people."""

import io
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import made_up
import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from clbench.errors import UserError
from clbench.leaderboard import Board
from clbench.plots import accuracy, costs, domains, ranks, searches, style
from clbench.plots.modules import sensitivity
from clbench.plots.sheets import contact_sheet
from clbench.results import Result
from clbench.search import Outcome, Space, importances
from clbench.study import Trial


@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_shows_every_pixel(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, channels, 8, 6), dtype=np.uint8)
    figure = contact_sheet(images, 2, 3, ["a$", "é", "_^", "{", "\\", "Ж", "unused"])
    (axes,) = figure.axes
    sheet = np.asarray(axes.images[0].get_array())
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 3
    for index in range(6):
        row, column = divmod(index, 3)
        cell = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
        expected = images[index].transpose(1, 2, 0).squeeze()
        np.testing.assert_array_equal(cell[height - 8 :, :6].squeeze(), expected)
    assert [text.get_text() for text in axes.texts] == ["a$", "é", "_^", "{", "\\", "Ж"]
    figure.savefig(io.BytesIO(), format="png")


def test_a_contact_sheet_without_titles_may_have_room_left() -> None:
    figure = contact_sheet(np.zeros((2, 3, 8, 8), np.uint8), 2, 2)
    assert not figure.axes[0].texts


def test_empty_sheets_and_missing_titles_are_refused() -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    with pytest.raises(UserError, match="shows nothing"):
        contact_sheet(images, 0, 5)
    with pytest.raises(UserError, match="1 titles for 2 images"):
        contact_sheet(images, 1, 2, ["a"])


def module(
    name: str, kind: str, within: list[Any], across: list[Any], times: int
) -> dict[str, Any]:
    return {"name": name, "kind": kind, "within": within, "across": across, "finetuned": times}


def test_sensitivity_shows_means_over_experiences_and_runs() -> None:
    one = [
        module("conv1", "convolution", [1e-3, 3e-3], [1e-2], 0),
        module("bn1.statistics", "statistics", [0.0, 0.0], [0.0], 0),
        module("head", "linear", [None, 1e-2], [0.2, 0.6], 2),
    ]
    two = [
        module("conv1", "convolution", [1e-3, 1e-3], [3e-2], 0),
        module("bn1.statistics", "statistics", [None, None], [], 0),
        module("head", "linear", [1e-2, 3e-2], [0.4, 0.4], 0),
    ]
    figure = sensitivity([one, two], "a$ title")
    (axes,) = figure.axes
    # A line, a hollow and a full point for each module, then the legend's.
    points = [np.asarray(line.get_xdata(), np.float64) for line in axes.lines[:9]]
    assert points[0].tolist() == pytest.approx([1.5e-3, 2e-2])
    assert np.isnan(points[3]).all()
    assert points[6].tolist() == pytest.approx([1.5e-2, 0.4])
    assert [t.get_text() for t in axes.texts] == ["13.3", "26.7", "score"]
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["conv1", "bn1.statistics", "head"]
    assert [label.get_fontweight() for label in labels] == ["normal", "normal", "bold"]
    assert axes.get_xscale() == "log"
    figure.savefig(io.BytesIO(), format="png")


def test_there_is_no_sensitivity_of_nothing_or_of_different_models() -> None:
    one = [module("conv1", "convolution", [1.0], [1.0], 0)]
    for runs in range(2):
        with pytest.raises(UserError, match="No run has measured"):
            sensitivity([[]] * runs)
    with pytest.raises(UserError, match="different modules"):
        sensitivity([one, [module("conv2", "convolution", [1.0], [1.0], 0)]])


# Runs.


def shown(figure: Any) -> list[str]:
    """Every text of a figure, and that it can be drawn."""
    style.rendered(figure, "svg")
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def lines(figure: Any) -> list[tuple[list[float], list[float]]]:
    (axes,) = figure.axes
    points = [(line.get_xdata(), line.get_ydata()) for line in axes.lines]
    return [([float(v) for v in x], [float(v) for v in y]) for x, y in points]


def matrix_run(*rows: list[float | None]) -> Result:
    return Result(run={}, accuracy_matrix=list(rows))


NASTY = ["_hidden", "a$\\frac$b", "<script>", "x" * 300, "", "\x00\ud800\n", "字"]


def test_curves_are_means_over_what_was_met_with_student_s_bands() -> None:
    one = matrix_run([1.0, None], [0.5, 0.9])
    two = matrix_run([0.8, None], [0.3, 0.7])
    three = matrix_run([0.9, None], [0.4, 0.8])
    figure = accuracy.curves({"a": [one, two, three], "b": [one], "c": [one, two]}, "t")
    found = lines(figure)
    assert found[0] == ([1, 2], pytest.approx([90, 60]))
    assert found[1] == ([1, 2], pytest.approx([100, 70]))
    (band,) = figure.axes[0].collections
    # Both deviations are 10, /√3 = 5.774, times 4.303 = 24.84; nothing is above 100.
    heights = band.get_paths()[0].vertices[:, 1]
    assert sorted(set(heights.round(1))) == [35.2, 65.2, 84.8, 100]
    assert {"a", "b", "t"} <= set(shown(figure))


def test_cells_after_the_experience_do_not_count_in_a_curve() -> None:
    everything = matrix_run([1.0, 0.0], [0.5, 0.9])
    assert lines(accuracy.curves({"a": [everything]}))[0][1] == pytest.approx([100, 70])


def test_runs_that_do_not_fit_together_are_refused() -> None:
    short, long = matrix_run([1.0]), matrix_run([1.0, None], [0.5, 0.9])
    for series in ({"a": [short], "b": [long]}, {"a": [short, long]}, {"a": []}, {}):
        with pytest.raises(UserError):
            accuracy.curves(series)
    with pytest.raises(UserError, match="No complete run"):
        accuracy.matrices({"a": []})


def test_a_heat_map_is_the_mean_with_holes_where_nothing_was_measured() -> None:
    runs = [matrix_run([1.0, None], [0.5, 0.9]), matrix_run([0.5, None], [0.0, 0.8])]
    figure = accuracy.matrices({"a": runs, "b": runs[:1]}, "t")
    image = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(image[1], [25, 85])
    assert np.ma.getmaskarray(figure.axes[0].images[0].get_array())[0, 1] or np.isnan(image[0, 1])
    assert {"75", "25", "85", "100", "50", "90"} <= set(shown(figure))


def board(**columns: list[float]) -> Board:
    count = len(next(iter(columns.values())))
    names = [f"s{i}" for i in range(count)]
    content: dict[str, Any] = {"strategy": names, **columns}
    content |= {f"{name}_half_width": [1e-3] * count for name in columns}
    return Board(
        scenario="digits",
        setting="class_incremental",
        protocol="untuned",
        options={},
        differs={},
        headline="average_accuracy",
        higher=True,
        table=pd.DataFrame(content),
        runs=pd.DataFrame(),
    )


def test_a_front_is_what_nothing_beats_for_less() -> None:
    x, y = np.array([1.0, 2, 2, 3, 1]), np.array([0.5, 0.9, 0.8, 0.9, 0.5])
    assert costs.on_front(x, y, higher=True).tolist() == [True, True, False, False, True]
    assert costs.on_front(x, y, higher=False).tolist() == [True, False, False, False, True]


def test_scatters_place_every_row_that_has_both_numbers() -> None:
    made = board(average_accuracy=[0.9, 0.5, np.nan], train_seconds=[100.0, 1.0, 5.0])
    figure = costs.cost(made, "t")
    assert figure.axes[0].get_xscale() == "log"
    points = [xy for xy in lines(figure) if len(xy[0]) == 1]
    assert points == [([100], [90]), ([1], [50])]
    made = board(average_accuracy=[0.9, 0.5], memory_samples=[500.0, 0.0])
    figure = costs.memory(made)
    assert [xy for xy in lines(figure) if len(xy[0]) == 1] == [([500], [90]), ([0], [50])]
    assert "filled: none is better for less" in shown(figure)
    made = board(average_accuracy=[0.9], forgetting=[0.1], learning_accuracy=[0.95])
    assert lines(costs.plasticity(made))[0] == (pytest.approx([10]), pytest.approx([95]))
    with pytest.raises(UserError, match="No row"):
        costs.cost(board(average_accuracy=[np.nan], train_seconds=[1.0]))


def test_ranks_are_joined_where_they_are_less_than_the_difference_apart() -> None:
    assert ranks.joined(np.array([1.0, 1.5, 3.0, 3.2]), 1.0) == [(0, 1), (2, 3)]
    assert ranks.joined(np.array([1.0, 1.6, 2.2]), 1.0) == [(0, 1), (1, 2)]
    assert ranks.joined(np.array([1.0, 1.5, 1.9]), 1.0) == [(0, 2)]
    assert ranks.joined(np.array([1.0, 2.0]), 0.5) == []


def test_a_diagram_of_ranks_names_all_methods_and_the_difference() -> None:
    generator = np.random.default_rng(0)
    scores = pd.DataFrame(generator.normal(0, 0.1, (12, 4)) + np.arange(4), columns=list("abcd"))
    texts = shown(ranks.critical_differences(scores, title="t"))
    assert {"d  1.00", "c  2.00", "3.00  b", "4.00  a"} <= set(texts)
    # Demšar's table: q = 2.569 for four methods; 2.569 √(4 · 5 / (6 · 12)) = 1.354.
    assert any("critical difference 1.35" in text for text in texts)
    texts = shown(ranks.critical_differences(-scores, higher=False))
    assert "d  1.00" in texts
    few = shown(ranks.critical_differences(scores.head(2)))
    assert "(no name)" not in few
    assert any("it takes 3 of each" in text for text in few)
    with pytest.raises(UserError, match="1 methods"):
        ranks.critical_differences(scores[["a"]])


def test_errors_of_domains_stand_side_by_side_with_their_mean() -> None:
    runs = {name: [made_up.adapted(name, s, 0.3) for s in range(3)] for name in ("tent", "sar")}
    figure = domains.errors(runs, "t")
    means = [xy for xy in lines(figure) if len(xy[0]) == 7]
    errors = np.array([run.online["by_domain"]["error"] for run in runs["tent"]])
    assert means[0][1][:6] == pytest.approx(100 * errors.mean(0))
    assert means[0][1][6] == pytest.approx(100 * errors.mean())
    assert set(made_up.DOMAINS) | {"mean", "tent", "sar"} <= set(shown(figure))
    with pytest.raises(UserError, match="2 different streams"):
        domains.errors({"a": [made_up.adapted(), made_up.adapted(domains=["x"] * 6)]})


def test_the_source_s_accuracy_begins_before_the_stream() -> None:
    run = made_up.adapted("tent", 0)
    ((x, y),) = lines(domains.source({"none": [matrix_run([1.0])], "tent": [run]}))
    assert x == list(range(7))
    assert y == pytest.approx([100 * v for v in run.online["source_accuracy"]])
    with pytest.raises(UserError, match="no source accuracy"):
        domains.source({"a": [matrix_run([1.0])]})


# Searches.


def test_trials_are_lines_the_chosen_one_thick_and_the_failed_one_dotted() -> None:
    study = made_up.study(trials=8)
    figure = searches.trials(study)
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert len(drawn) == 8
    widths = [line.get_linewidth() for line in drawn]
    best = max((t for t in study.trials if t.mean is not None), key=lambda t: t.mean or 0)
    assert widths.index(max(widths)) == study.trials.index(best)
    assert [line.get_linestyle() for line in drawn].count(":") == 1
    thick = drawn[widths.index(max(widths))].get_ydata()
    assert float(np.asarray(thick, float)[-1]) == 1
    texts = shown(figure)
    assert {"lr (log)", "alpha", "optimizer", "sgd", "adam"} <= set(texts)
    assert any("8 trials, 1 failed, 0 pruned" in text for text in texts)


def test_what_decides_the_score_is_found_important() -> None:
    study = made_up.study(trials=40)
    texts = shown(searches.importance(study))
    names = [text for text in texts if text in study.space]
    assert names[0] == "lr"
    found = importances(
        Space({"lr": 0, "search": {"lr": study.space["lr"]}}),
        [Outcome({"lr": t.values["lr"]}, t.scores, t.state) for t in study.trials if t.scores],
    )
    assert found == {"lr": pytest.approx(1.0)}
    with pytest.raises(UserError, match="do not tell what mattered"):
        searches.importance(made_up.study(trials=8))


def test_scores_that_are_all_alike_have_no_important_cause() -> None:
    study = made_up.study(trials=12)
    same = [replace(t, scores=(0.5, 0.5)) for t in study.trials if t.scores]
    with pytest.raises(UserError, match="No hyper-parameter has an importance"):
        searches.importance(replace(study, trials=tuple(same)))


def test_searches_of_wrapped_methods_and_of_whole_numbers_are_drawn() -> None:
    trials = [
        Trial({"base.steps": i, "on": i % 2 == 0}, (0.1 * i,), "complete", None, (str(i),), 0, 0, 0)
        for i in range(1, 13)
    ]
    space = {"base.steps": "range(1, 13)", "on": "choice(true, false)"}
    study = replace(made_up.study(), space=space, trials=tuple(trials))
    assert {"base.steps", "on", "True", "False"} <= set(shown(searches.trials(study)))
    assert "base.steps" in shown(searches.importance(study))
    with pytest.raises(UserError, match="no trials"):
        searches.trials(replace(study, trials=()))


# Any label.


def test_no_label_from_a_file_breaks_or_leaves_a_figure() -> None:
    run = matrix_run([1.0, None], [0.5, 0.9])
    for title in NASTY:
        named = {name: [run] for name in NASTY}
        texts = shown(accuracy.curves(named, title))
        assert {"_hidden", "a$\\frac$b", "<script>"} <= set(texts)
        assert all(len(text) < 80 for text in texts)
        shown(accuracy.matrices(named, title))
    adapted = {name: [made_up.adapted("a", domains=NASTY[:6])] for name in NASTY}
    assert "_hidden" in shown(domains.errors(adapted, NASTY[1]))
    made = board(
        average_accuracy=[0.1 * i for i in range(7)], train_seconds=[1.0 + i for i in range(7)]
    )
    made.table["strategy"] = pd.Series(NASTY, dtype=object)
    assert "_hidden" in shown(costs.cost(made, NASTY[2]))
    scores = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 7)))
    scores.columns = pd.Index(NASTY, dtype=object)
    shown(ranks.critical_differences(scores, title=NASTY[1]))
    svg = style.rendered(accuracy.curves({"<script>": [run]}, "<script>"), "svg")
    assert b"<script" not in svg
    ElementTree.fromstring(svg)


def test_matplotlib_s_settings_stay_as_they_were() -> None:
    before = dict(matplotlib.rcParams)
    style.rendered(accuracy.curves({"a": [matrix_run([1.0])]}), "png")
    assert dict(matplotlib.rcParams) == before


def test_series_are_told_apart_by_more_than_colour() -> None:
    marks = [style.mark(i) for i in range(24)]
    assert len({(m.colour, m.marker) for m in marks}) == 24
    assert len({(m.marker, m.line) for m in marks[:8]}) == 8
    assert len({m.colour for m in marks[:8]}) == 8


@pytest.mark.parametrize(
    ("words", "found"),
    [("a b", "a b"), (" a\n\tb ", "a b"), ("", "(no name)"), ("x" * 40, f"{'x' * 16}…{'x' * 15}")],
)
def test_labels_are_one_line(words: str, found: str) -> None:
    assert style.plain(words) == found
