"""Figures: what they hold; how they look is for people."""

import io

import numpy as np
import pytest

from clbench.errors import UserError
from clbench.plots import contact_sheet


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
