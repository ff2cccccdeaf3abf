"""One ranking beside another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from clbench.agreement import Agreement
from clbench.errors import UserError
from clbench.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@style.styled
def slopes(one: Agreement, title: str = "") -> Figure:
    """Ranks under both protocols, joined by lines: dashed where the honest one ranks lower.

    Raises:
        UserError: Fewer than two strategies.
    """
    rows = one.table
    if len(rows) < 2:
        raise UserError(f"{len(rows)} strategies of {one.two_phase.scenario} have no order.")
    figure = style.new(5.6, 1.0 + 0.26 * len(rows))
    axes = figure.add_subplot()
    left = _spread(rows["rank_conventional"])
    right = _spread(rows["rank_two_phase"])
    for place, row in enumerate(rows.to_dict("records")):
        mark = style.mark(place)
        line = "--" if row["change"] < 0 else "-"
        width = 1.0 if row["change"] == 0 else 2.0
        ends = [left[place], right[place]]
        axes.plot([0, 1], ends, line, color=mark.colour, marker=mark.marker, lw=width)
        name = style.plain(row["strategy"], 24)
        texts = {
            -0.04: f"{name}  {100 * row['conventional']:.1f}",
            1.04: f"{100 * row['two_phase']:.1f}  {name}",
        }
        for (x, words), y, side in zip(texts.items(), ends, ("right", "left"), strict=True):
            axes.text(x, y, words, ha=side, va="center")
    axes.set_xticks([0, 1], ["tuned on what is reported", "two phases"])
    axes.set_xlim(-0.75, 1.75)
    axes.set_ylim(len(rows) + 0.5, 0.5)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    style.titled(axes, title)
    return figure


def _spread(ranks: pd.Series) -> list[float]:
    """Heights from ranks: equal ones side by side, not on top of each other."""
    order = ranks.rank(method="first")
    return [float(height) for height in order]
