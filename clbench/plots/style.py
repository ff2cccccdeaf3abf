"""One style for all figures: apart in colour, in print and for colour-blind readers.

Labels may come from files. They are plain text here: no mathematics between dollar signs, no
name that a legend hides because it begins with an underscore, nothing that leaves the figure.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

P = ParamSpec("P")
T = TypeVar("T")

#: Okabe and Ito's colours, which colour-blind people can tell apart; without the yellow, which
#: nobody can on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
LINES = ("-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 0.7)), (0, (8, 2, 1, 2)))
#: For scripts that the first one lacks.
FONTS = ["DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono", "STIXGeneral"]
#: Even in lightness, so that it survives a photocopier; made for colour-blind readers.
MAP = "cividis"
WIDTH, HEIGHT = 6.4, 3.8
DPI = 144
_RC: Mapping[str, Any] = MappingProxyType(
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9,
        "figure.facecolor": "white",
        "font.family": FONTS,
        "font.size": 8,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.5,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "legend.handlelength": 3.2,
        "lines.linewidth": 1.5,
        "lines.markersize": 5,
        "svg.hashsalt": "clbench",
        "text.parse_math": False,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }
)


@dataclass(frozen=True)
class Mark:
    """What tells a series apart, three times over."""

    colour: str
    marker: str
    line: Any


def mark(place: int) -> Mark:
    """Of the series with this number, the same in every figure."""
    markers = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
    return Mark(COLOURS[place % len(COLOURS)], markers, LINES[place % len(LINES)])


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draws in this style, and leaves matplotlib's own settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        settings: Any = dict(_RC)
        with matplotlib.rc_context(settings):
            return draw(*args, **kwargs)

    return drawn


def new(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@styled
def rendered(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """The bytes of its file: the same ones for the same figure."""
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[kind]
    with warnings.catch_warnings():
        # A character that no font has is drawn as a box; the text is in the tables too.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def plain(words: str, limit: int = 32) -> str:
    """A label on one line, its middle left out where it is too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    if len(line) <= limit:
        return line or "(no name)"
    return f"{line[: limit // 2]}…{line[len(line) - limit // 2 + 1 :]}"


def legend(
    parent: Axes | Figure, handles: Sequence[Artist], labels: Sequence[str], **placement: Any
) -> Legend:
    """A legend of these labels as they are.

    Args:
        parent: What it belongs to.
        handles: One a label.
        labels: Plain text.
        placement: As matplotlib's.
    """
    # A label that begins with an underscore would be left out: texts are set afterwards.
    made = parent.legend(handles, [str(i) for i in range(len(labels))], **placement)
    for text, words in zip(made.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(plain(words))
    return made


def titled(axes: Axes, title: str) -> None:
    """A title of any length and any characters, cut to the width of the figure."""
    width = axes.figure.bbox.width / axes.figure.dpi
    if title:
        axes.set_title(plain(title, int(10 * width)), loc="left", parse_math=False)
