"""Pages of strategies, scenarios and models, from their YAML files and docstrings alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import configuration
import docstrings
import measured
from docstrings import cell, code

from clbench.errors import UserError
from clbench.testing import ToyScenario
from clbench.types import Setting

#: Groups that have pages: folder of the pages, and what one is called.
FOLDERS = {"strategy": "strategies", "scenario": "scenarios", "backbone": "models"}
#: Sections of the navigation, in order.
_SECTIONS = {
    "strategy": (
        "Labelled streams",
        "Around another method",
        "With a pre-trained model",
        "Test-time adaptation",
    ),
    "scenario": (
        "Class-incremental",
        "Domain-incremental",
        "Test-time adaptation",
        "Instruction tuning",
    ),
    "backbone": ("Backbones",),
}
_NAMED = {
    Setting.CLASS_INCREMENTAL: "Class-incremental",
    Setting.DOMAIN_INCREMENTAL: "Domain-incremental",
    Setting.TEST_TIME_ADAPTATION: "Test-time adaptation",
    Setting.INSTRUCTION_TUNING: "Instruction tuning",
}
_DOCUMENT = re.compile(r"`?docs/([\w-]+)\.md`?")


@dataclass(frozen=True)
class Page:
    """One class and the files that configure it.

    Attributes:
        group: Folder of conf/.
        names: The files, the class's own first.
        section: Of the navigation.
    """

    group: str
    names: tuple[str, ...]
    section: str

    @property
    def kind(self) -> type[Any]:
        """The class."""
        return configuration.kind(self.group, self.names[0])

    @property
    def path(self) -> str:
        """Of the page, in the documentation."""
        return f"{FOLDERS[self.group]}/{self.names[0]}.md"


@cache
def pages(group: str) -> list[Page]:
    """A page for each class of a group, by section and name."""
    by_class: dict[str, list[str]] = {}
    for name in configuration.names(group):
        by_class.setdefault(configuration.raw(group, name)["_target_"], []).append(name)
    found = []
    for target, names in by_class.items():
        module, _, own = target.rpartition(".")
        like = {module.rpartition(".")[2], own.lower()}
        ordered = sorted(names, key=lambda name: (name not in like, name))
        found.append(Page(group, tuple(ordered), _section(group, ordered[0])))
    order = _SECTIONS[group].index
    return sorted(found, key=lambda page: (order(page.section), page.names[0]))


def sections(group: str) -> dict[str, list[Page]]:
    """The pages of a group by section, in order."""
    found: dict[str, list[Page]] = {}
    for page in pages(group):
        found.setdefault(page.section, []).append(page)
    return found


def page_of(group: str, name: str) -> Page:
    """The page on which a choice of a group stands."""
    return next(page for page in pages(group) if name in page.names)


def markdown(page: Page) -> str:
    """The text of a page."""
    said = docstrings.read(page.kind)
    parts = [
        f"# {page.kind.__name__}",
        f"{docstrings.escaped(said.first)}",
        "\n".join(_commands(page)),
        said.body,
        "## Options",
        "\n".join(_options(page, said)),
    ]
    if page.group == "strategy":
        parts += ["## Search space", *_search(page), *_costs(page)]
    parts += _measured(page)
    parts += ["## Configuration files"]
    for name in page.names:
        text = configuration.text(page.group, name)
        parts.append(f'```yaml title="conf/{page.group}/{name}.yaml"\n{text}\n```')
    module = page.kind.__module__.replace(".", "/")
    parts.append(f"The code: `{module}.py`, class `{page.kind.__name__}`.")
    return _DOCUMENT.sub(r"[\1](../\1.md)", "\n\n".join(parts)) + "\n"


def overview(group: str) -> str:
    """A table of each section: every choice with what it is."""
    parts = []
    for section, found in sections(group).items():
        parts.append(f"### {section}" if len(_SECTIONS[group]) > 1 else "")
        lines = ["| name | what it is | paper |", "|---|---|---|"]
        if group != "strategy":
            lines = ["| name | what it is |", "|---|---|"]
        for page in found:
            lines += [_row(page, name) for name in page.names]
        parts.append("\n".join(lines))
    return "\n\n".join(filter(None, parts)) + "\n"


def costs_overview() -> str:
    """What a run of each strategy takes on a toy, in one table."""
    lines = [
        "| strategy | forward | backward | weights trained | samples kept | toy |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for page in pages("strategy"):
        for name in page.names:
            found = measured.costs(name)
            if found is not None:
                link = f"[`{name}`]({page.names[0]}.md)"
                lines.append(f"| {link} | {' | '.join(_numbers(found[1]))} | `{found[0]}` |")
    return "\n".join(lines) + "\n"


def _row(page: Page, name: str) -> str:
    first = configuration.title(page.group, name) or docstrings.read(page.kind).first
    row = f"| [`{name}`]({page.names[0]}.md) | {cell(first)} |"
    if page.group != "strategy":
        return row
    papers = docstrings.read(page.kind).papers[:1]
    return row + " ".join(f" [{p}](https://arxiv.org/abs/{p})" for p in papers) + " |"


def _section(group: str, name: str) -> str:
    if group == "scenario":
        return _NAMED[configuration.kind(group, name).setting]
    if group == "backbone":
        return "Backbones"
    strategy = measured.strategy(name)
    if strategy.settings == frozenset({Setting.TEST_TIME_ADAPTATION}):
        return "Test-time adaptation"
    if "base" in configuration.chosen(group, name):
        return "Around another method"
    try:
        strategy.check(ToyScenario())
    except UserError:
        return "With a pre-trained model"
    return "Labelled streams"


def _commands(page: Page) -> Iterator[str]:
    """How each of the files is chosen, with what it says of itself."""
    yield "| choose it by | |"
    yield "|---|---|"
    for name in page.names:
        more = ""
        if page.group == "strategy":
            base = configuration.chosen(page.group, name).get("base")
            more = " strategy@strategy.base=..." if base else ""
        said = cell(configuration.title(page.group, name))
        yield f"| `python -m clbench {page.group}={name}{more}` | {said} |"


def _options(page: Page, said: docstrings.Documentation) -> Iterator[str]:
    types = docstrings.types(page.kind)
    files = {name: configuration.raw(page.group, name) for name in page.names}
    parts = {name: configuration.chosen(page.group, name) for name in page.names}
    yield "| option | " + " | ".join(f"`{name}`" for name in page.names) + " | type | meaning |"
    yield "|---" * (len(page.names) + 3) + "|"
    for option in types:
        values = (_value(option, files[name], parts[name]) for name in page.names)
        meaning = cell(said.attributes.get(option, ""))
        yield f"| `{option}` | {' | '.join(values)} | {code(types[option])} | {meaning} |"


def _value(option: str, file: Mapping[str, Any], parts: Mapping[str, tuple[str, str]]) -> str:
    if option in parts:
        group, choice = parts[option]
        link = group in FOLDERS
        return f"[`{choice}`](../{page_of(group, choice).path})" if link else f"`{choice}`"
    if option not in file:
        return ""
    value = file[option]
    text = {True: "true", False: "false", None: "null"}.get(value) if _plain(value) else None
    return code(text or str(value) or '""')


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _search(page: Page) -> list[str]:
    spaces = {name: configuration.raw(page.group, name).get("search") for name in page.names}
    if not any(spaces.values()):
        return ["There is nothing to tune."]
    lines = ["| strategy | option | space |", "|---|---|---|"]
    for name, space in spaces.items():
        lines += [
            f"| `{name}` | `{key}` | {code(str(text))} |" for key, text in (space or {}).items()
        ]
    return ["In Hydra's sweep grammar, the same for all scenarios.", "\n".join(lines)]


def _costs(page: Page) -> list[str]:
    found = {name: measured.costs(name) for name in page.names}
    lines = [
        "| strategy | forward | backward | weights trained | samples kept | toy |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for name, one in found.items():
        if one is not None:
            lines.append(f"| `{name}` | {' | '.join(_numbers(one[1]))} | `{one[0]}` |")
    if len(lines) == 2:
        return []
    words = (
        "Counted in a run on a toy: passes through the model for each sample that the stream "
        "offers (a plain step is one of each), the part of the weights that trains at the end, "
        "and samples kept."
    )
    return ["## Cost", words, "\n".join(lines)]


def _numbers(cost: Mapping[str, float]) -> list[str]:
    return [
        f"{cost['forward']:.2f}",
        f"{cost['backward']:.2f}",
        f"{100 * cost['trained']:.0f} %",
        f"{cost['kept']:.0f}",
    ]


def _measured(page: Page) -> list[str]:
    if page.group == "backbone":
        return []

    column = "scenario" if page.group == "scenario" else "name"
    rows = measured.rows(column, page.names)
    if not rows:
        return ["## Measured", "The committed leaderboard has no run of it."]
    words = "From the committed leaderboard; means over seeds, ± 95 % intervals where it has them."
    return ["## Measured", words, "\n".join(table(measured.shown(), rows))]


def table(titles: Sequence[str], rows: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """Rows of texts as Markdown."""
    yield "| " + " | ".join(map(cell, titles)) + " |"
    yield "|---" * len(titles) + "|"
    for row in rows:
        yield "| " + " | ".join(cell(row.get(title, "")) for title in titles) + " |"
