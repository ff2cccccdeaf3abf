"""Images side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clbench.errors import UserError
from clbench.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def contact_sheet(
    images: npt.NDArray[np.uint8], rows: int, columns: int, titles: Sequence[str] = ()
) -> Figure:
    """The first images side by side, row by row, each enlarged without smoothing.

    Args:
        images: uint8 `[images, channels, height, width]`, RGB or grey; those beyond
            `rows * columns` are left out.
        rows: Rows of the sheet.
        columns: Columns of the sheet.
        titles: A line above each image, or none at all.

    Returns:
        The figure, 0.6 inches an image.

    Raises:
        UserError: No room, no images, or too few titles.
    """
    from matplotlib.figure import Figure

    shown = images[: max(rows, 0) * max(columns, 0)]
    if not len(shown):
        raise UserError(f"A sheet of {rows} x {columns} of {len(images)} images shows nothing.")
    if titles and len(titles) < len(shown):
        raise UserError(f"{len(titles)} titles for {len(shown)} images: give one each, or none.")
    channels, height, width = shown.shape[1:]
    gap = (max(2, height // 3) if titles else 1, 1)
    sheet = np.full((rows * (height + gap[0]), columns * (width + gap[1]), channels), 255, np.uint8)
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows * (height + gap[0]) / (width + gap[1])))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for index, image in enumerate(shown):
        row, column = divmod(index, columns)
        top, left = row * (height + gap[0]) + gap[0], column * (width + gap[1])
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
        if titles:
            text = axes.text(left + width / 2, top - 1, titles[index], parse_math=False, size=7)
            text.set(ha="center", va="bottom", family=style.FONTS)
    axes.imshow(sheet.squeeze(2) if channels == 1 else sheet, cmap="gray", vmin=0, vmax=255)
    axes.set_aspect("auto")
    return figure
