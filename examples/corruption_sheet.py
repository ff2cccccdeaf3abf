"""All 19 corruptions of an image, a row each, at the five severities.

python examples/corruption_sheet.py IMAGE [sheet.png] [pixels]
"""

import sys

import numpy as np
from PIL import Image

from clbench.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from clbench.plots.sheets import contact_sheet

SEVERITIES = range(1, 6)


def main(image: str, sheet: str = "sheet.png", pixels: str = "224") -> None:
    side = int(pixels)
    with Image.open(image) as opened:
        square = opened.convert("RGB").resize((side, side), box=_middle(*opened.size))
    clean = np.asarray(square).transpose(2, 0, 1)[None]
    names = (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
    rows = [
        [corrupt(clean, name, severity, seed=0)[0] for severity in SEVERITIES] for name in names
    ]
    figure = contact_sheet(np.concatenate(rows), len(names), len(SEVERITIES))
    for row, name in enumerate(names):
        place = -0.1 * side, (row + 0.5) * (side + 1)
        figure.axes[0].text(*place, name, ha="right", va="center", size=7)
    figure.savefig(sheet, dpi=100, bbox_inches="tight")
    print(sheet)


def _middle(width: int, height: int) -> tuple[float, float, float, float]:
    """The largest square in the middle: left, top, right, bottom."""
    half = min(width, height) / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


if __name__ == "__main__":
    main(*sys.argv[1:])
