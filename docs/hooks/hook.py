"""What MkDocs calls: pages of the catalogue, pictures, and lists that the code fills in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import catalogue
import measured
import metric_list
import pictures
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from clbench import userspace

_ROOT = userspace.suite()
#: Files of the repository that are pages too.
_INCLUDED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_MARKER = re.compile(r"<!-- generated: ([\w ]+) -->")
_LISTS: dict[str, Callable[[], str]] = {
    "strategies": lambda: catalogue.overview("strategy"),
    "scenarios": lambda: catalogue.overview("scenario"),
    "models": lambda: catalogue.overview("backbone"),
    "costs": catalogue.costs_overview,
    "metrics": metric_list.markdown,
    "conventions": metric_list.conventions,
    "leaderboard": lambda: _leaderboard(),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the catalogue into the navigation."""
    for group, folder in catalogue.FOLDERS.items():
        entry = next(e for e in config.nav if f"{folder}/index.md" in map(str, e.values()))
        ((title, index),) = entry.items()
        sections = catalogue.sections(group)
        lists = [{name: [_entry(p) for p in found]} for name, found in sections.items()]
        flat = [_entry(p) for found in sections.values() for p in found]
        entry[title] = [index, *(lists if len(lists) > 1 else flat)]
    named = re.findall(r"[\w/-]+\.md", str(config.nav))
    rest = sorted(p.name for p in Path(config.docs_dir).glob("*.md") if p.name not in named)
    if rest:
        config.nav.append({"More": rest})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds what is made here: pages, pictures, and the page of the committed leaderboard."""
    for group in catalogue.FOLDERS:
        for page in catalogue.pages(group):
            files.append(File.generated(config, page.path, content=catalogue.markdown(page)))
    for path, draw in pictures.files().items():
        files.append(File.generated(config, path, content=draw()))
    for path, source in _INCLUDED.items():
        text = (_ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, path, content=text))
    for path in _report():
        content = path.read_bytes()
        name = f"results/{path.relative_to(_results()).as_posix()}"
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in the lists, and leads links to code to its page."""
    del page, config, files
    markdown = _MARKER.sub(lambda found: _LISTS[found[1]](), markdown)
    return re.sub(r"\]\(\.\./(strategies|scenarios)/(\w+)\.py\)", r"](\1/\2.md)", markdown)


def _entry(page: catalogue.Page) -> dict[str, Any]:
    return {", ".join(page.names): page.path}


def _results() -> Path:
    return _ROOT / "results" / "leaderboard"


def _report() -> Iterator[Path]:
    """The committed page of a report and what it needs, if there is one."""
    if (_results() / "index.html").is_file():
        yield _results() / "index.html"
        yield from sorted(_results().glob("figures/*"))


def _leaderboard() -> str:
    link = ""
    if (_results() / "index.html").is_file():
        link = "The whole report: [one page, sortable](results/index.html).\n\n"
    table = measured.leaderboard()
    names = list(dict.fromkeys(table["scenario"])) if len(table) else []
    rows = measured.rows("scenario", names)
    if not rows:
        return "There is no committed leaderboard yet."
    return link + "\n".join(catalogue.table(measured.shown(), rows)) + "\n"
