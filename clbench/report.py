"""Run folders to a leaderboard on disk: Markdown and a page for people, CSV for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from clbench import columns, figures, markdown, page, userspace
from clbench.files import write_atomically
from clbench.findings import gather
from clbench.leaderboard import Board


def write(root: Path) -> list[Path]:
    """Writes the folder `leaderboard` from what lies below a results folder.

    `index.html`, one page for everything; `leaderboard.md` and `.csv`; `left_out.csv`, where
    something is in no table; and the folder `figures`, each as SVG and PNG: pictures there that
    it does not write again are removed.

    Args:
        root: The results folder.

    Returns:
        The files written.

    Raises:
        UserError: If there are no runs, or a file of published values is wrong.
    """
    findings = gather(root, references())
    drawings = figures.drawn(findings)
    shown: dict[str, list[tuple[str, str]]] = {}
    for drawing in drawings:
        shown.setdefault(drawing.section, []).append(
            (f"figures/{drawing.name}.svg", drawing.caption)
        )
    files = {
        "leaderboard.md": _bytes(markdown.text(findings, shown)),
        "leaderboard.csv": _bytes(csv(findings.boards)),
        "index.html": _bytes(page.html(findings, drawings)),
    }
    if len(findings.left_out):
        files["left_out.csv"] = _bytes(findings.left_out.to_csv(index=False))
    for drawing in drawings:
        files[f"figures/{drawing.name}.svg"] = drawing.svg
        files[f"figures/{drawing.name}.png"] = drawing.png
    folder = root / "leaderboard"
    for name, content in files.items():
        write_atomically(folder / name, content)
    _sweep(folder, set(files))
    return [folder / name for name in files]


def references() -> list[Path]:
    """Folders with published values: the suite's, and one in the user's working folder."""
    folders = [userspace.configuration() / "reference", Path.cwd() / "conf" / "reference"]
    return list(dict.fromkeys(f.resolve() for f in folders if f.is_dir()))


def csv(boards: Sequence[Board]) -> str:
    """All boards, one row a strategy, their options as columns."""
    rows = [
        board.table.assign(
            scenario=board.scenario,
            protocol=board.protocol,
            **{k: columns.option(v) for k, v in board.options.items()},
        )
        for board in boards
    ]
    return pd.concat(rows).to_csv(index=False) if rows else ""


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")  # JSON can hold lone surrogates, which are no text


def _sweep(folder: Path, written: set[str]) -> None:
    """Removes what an earlier report left and this one does not have."""
    old = [*folder.glob("figures/*.svg"), *folder.glob("figures/*.png"), folder / "left_out.csv"]
    for path in old:
        if path.relative_to(folder).as_posix() not in written:
            path.unlink(missing_ok=True)
