"""Figures: what they hold; how they look is for people."""

import io
from typing import Any

import numpy as np
import pytest

from clbench.errors import UserError
from clbench.plots.modules import sensitivity
from clbench.plots.sheets import contact_sheet


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
