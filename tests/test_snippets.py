"""What the documentation shows, run as it stands: code, files and commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from suite import Command, write_all

from clbench import composing, config, userspace
from clbench.types import Scenario, Strategy

ROOT = userspace.suite()
PAGES = [
    "README.md",
    *(f"docs/{p.relative_to(ROOT / 'docs')}" for p in (ROOT / "docs").rglob("*.md")),
]
_FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```$", re.M | re.S)
_FILE = re.compile(r"`((?:strategies|scenarios|conf)/[\w/]+\.(?:py|yaml))`:\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: After the fence; "" where there is none.
        file: What it is the content of; "" if of none.
        text: Its lines.
    """

    language: str
    file: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text()
    for found in _FENCE.finditer(text):
        titled = re.search(r'title="([^"]+)"', found[2])
        named = _FILE.search(text[: found.start()])  # "...in `strategies/mine.py`:"
        file = titled[1] if titled else named[1] if named else ""
        yield Block(found[1] or "", file, found[3])


def commands(page: str) -> Iterator[list[str]]:
    """The arguments of every command of the suite on a page, in blocks of either form."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / page).read_text())
    shown = [b[3] for b in _FENCE.finditer(text) if b[1] not in ("python", "yaml", "text")]
    shown += re.findall(r"^(?: {4}.*\n)+", text, re.M)
    for line in "\n".join(shown).splitlines():
        found = re.match(r"\s*(?:\$ )?(?:python -m )?clbench\s+(.*)", f"{line} ")
        if found and not found[1].startswith("-sc"):
            # What the shell does with the command is no argument of it.
            yield shlex.split(re.split(r" [&|;>]", found[1])[0], comments=True)


def photos(folder: Path) -> None:
    """Two pictures of each of four things."""
    from PIL import Image

    for thing in range(4):
        (folder / str(thing)).mkdir(parents=True)
        for shade in (0, 20):
            Image.new("RGB", (8, 8), (60 * thing + shade,) * 3).save(
                folder / str(thing) / f"{shade}.png"
            )


def holding(kind: str) -> list[str]:
    """Pages with blocks of a language."""
    return sorted(page for page in PAGES if any(b.language == kind for b in blocks(page)))


@pytest.mark.filterwarnings("ignore")  # of other libraries, which a reader sees too
@pytest.mark.parametrize("page", holding("python"))
def test_code_runs_as_it_stands(
    page: str, work: Path, fresh: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are written, everything else runs, one block after another as a reader would."""
    del fresh
    found = list(blocks(page))
    write_all(work, {block.file: block.text for block in found if block.file})
    if "Image" not in str(found):  # the reader has photos; a page that makes some needs none
        photos(work / "photos" / "train")
    sys.path.insert(0, str(work))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        if block.language == "python" and not block.file:
            exec(compile(block.text, page, "exec"), names)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("page", sorted(page for page in PAGES if any(commands(page))))
def test_commands_can_be_given(page: str, work: Path, fresh: None) -> None:
    """Every option exists and every part can be built from it; nothing is loaded."""
    del fresh
    write_all(work, {b.file: b.text for b in blocks(page) if b.file})
    own = userspace.join(Path.cwd())
    path = [f"hydra.searchpath=[{own.as_uri()}]"] if own else []
    for arguments in commands(page):
        given = [a for a in arguments if "=" in a and not a.startswith("-")]
        known = (
            "--help",
            "--cfg",
            "--info",
            "--hydra-help",
            "-m",
            "job",
            "config",
            "defaults-tree",
        )
        rest = set(arguments) - set(given) - set(known)
        assert not rest, f"{arguments}: {rest}"
        if "ewcc" in str(given):  # how a mistake looks
            continue
        one = [re.sub(r"^([\w@.]+=[\w.]+),[^\[{']*$", r"\1", a) for a in given]
        one = [re.sub(r"=\$.*", "=0" if "seed" in a else "=derpp", a) for a in one]
        tree, _ = composing.composed([*path, *one])
        config.build(tree["scenario"], Scenario, "scenario")
        config.build(tree["strategy"], Strategy, "strategy")


def test_there_are_snippets() -> None:
    assert {"README.md", "docs/own-data.md", "docs/add-strategy.md"} <= set(holding("python"))
    assert sum(1 for page in PAGES for _ in commands(page)) > 40


def test_the_strategy_and_the_scenario_of_the_pages_run(command: Command, work: Path) -> None:
    for page in ("docs/add-strategy.md", "docs/add-scenario.md"):
        write_all(work, {b.file: b.text for b in blocks(page) if b.file})
    done = command("scenario=stripes", "strategy=mine", "scenario.epochs=1", "progress=false")
    assert done.returncode == 0, done.stderr
    assert list(work.glob("results/runs/stripes-mine-*/result.json"))
