"""Docstrings in Google's form as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

_SECTION = re.compile(r"^(Attributes|Args|Returns|Raises|Yields):\s*$", re.M)
_LABEL = re.compile(
    r"^(Paper|Equation|Source|Licence|Sizes|Splits|Output|Training(?: on experience b)?):", re.M
)
_ARXIV = re.compile(r"(?<![\w/.])(?:arXiv[:\s]\s*)?(\d{4}\.\d{5})(?!\d)")
_CODE = re.compile(r"(``?[^`]+``?)")


@dataclass(frozen=True)
class Documentation:
    """What the docstring of a class says.

    Attributes:
        first: Its first line.
        body: What follows, without sections, as Markdown.
        papers: Numbers of arXiv in it, in order.
        attributes: What the classes of the whole hierarchy say of each attribute.
    """

    first: str
    body: str
    papers: tuple[str, ...]
    attributes: dict[str, str]


@cache
def read(kind: type[Any]) -> Documentation:
    """The documentation of a class."""
    text = inspect.getdoc(kind) or ""
    first, _, rest = _SECTION.split(text)[0].partition("\n")
    after = _afterwards(text)
    attributes: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        attributes.update(_attributes(inspect.getdoc(base) or ""))
    papers = tuple(dict.fromkeys(_ARXIV.findall(text)))
    return Documentation(first, markdown(f"{rest.strip()}\n\n{after}".strip()), papers, attributes)


def markdown(text: str) -> str:
    """Prose of a docstring: emphasis and tables as they are, everything else taken literally."""
    return "\n\n".join(_block(block) for block in re.split(r"\n\s*\n", text) if block.strip())


def escaped(words: str) -> str:
    """Words in which no character but those of bold and code means anything."""
    parts = _CODE.split(words)
    return "".join(part if part.startswith("`") else _literal(part) for part in parts)


def cell(words: str) -> str:
    """Words in a table."""
    return escaped(" ".join(words.split())).replace("|", "\\|")


def code(words: str) -> str:
    """A span of code in a table."""
    return f"`{words}`" if words else ""


def types(kind: type[Any]) -> dict[str, str]:
    """The types of a dataclass's fields, as they are written."""
    assert is_dataclass(kind)
    return {f.name: str(f.type).replace('"', "") for f in fields(kind) if f.init}


def _block(block: str) -> str:
    lines = block.strip("\n").splitlines()
    if all(line.startswith("    ") for line in lines):
        plain = inspect.cleandoc("\n".join(lines))
        return f"```text\n{plain}\n```"
    if lines[0].lstrip().startswith("|"):
        return "\n".join(map(escaped, lines))
    return _LABEL.sub(r"**\1:**", "\n".join(map(_linked, _joined(lines))))


def _joined(lines: Iterable[str]) -> list[str]:
    """Lines of one paragraph or of one item of a list as one, so that none begins a list."""
    found: list[str] = []
    for line in lines:
        label = re.match(r"[A-Z]\w+: ", line)
        if not found or re.match(r"\s*(- |\d+\. )", line) or label:
            found.append(("\n" if label and found else "") + line.rstrip())
        else:
            found[-1] += " " + line.strip()
    return found


def _linked(line: str) -> str:
    lead = re.match(r"\s*(?:- )?", line)
    assert lead
    words = escaped(line[lead.end() :])
    return lead[0] + _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", words)


def _literal(words: str) -> str:
    """Nothing but what is bold keeps a meaning."""
    parts = re.split(r"(\*\*[^*]+\*\*)", words.replace("&", "&amp;").replace("<", "&lt;"))
    return "".join(
        p if p.startswith("**") else re.sub(r"([\\*_\[\]>#])", r"\\\1", p) for p in parts
    )


def _attributes(text: str) -> dict[str, str]:
    """Name and meaning of each entry of the section Attributes."""
    _, _, section = text.partition("Attributes:\n")
    found: dict[str, list[str]] = {}
    indent, name = None, ""
    for line in section.splitlines():
        entry = re.match(r"(\s+)([\w, ]+): (.*)", line)
        if entry and (indent is None or len(entry[1]) == indent):
            indent, name = len(entry[1]), entry[2]
            found[name] = [entry[3]]
        elif name and line.startswith(" " * ((indent or 0) + 1)):
            found[name].append(line.strip())
        elif line.strip():
            break
    return {one: " ".join(said) for names, said in found.items() for one in names.split(", ")}


def _afterwards(text: str) -> str:
    """Paragraphs that stand behind the section Attributes."""
    _, _, section = text.partition("Attributes:\n")
    blocks = re.split(r"\n\s*\n", section)
    starts = (i for i, block in enumerate(blocks) if i and not block.startswith(" "))
    start = next(starts, None)
    return "" if start is None else "\n\n".join(blocks[start:])
