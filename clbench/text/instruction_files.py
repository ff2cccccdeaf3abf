"""Instructions in JSON files: each mistake is named by file, line and field."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.errors import UserError

_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_KINDS = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Item:
    """One JSON object of a file.

    Attributes:
        content: Its fields.
        path: Of the file.
        line: On which it begins, from 1.
    """

    content: dict[str, Any]
    path: Path
    line: int

    def text(self, field: str) -> str:
        """A field that must hold text.

        Raises:
            UserError: If it does not.
        """
        value = self._field(field)
        if not isinstance(value, str):
            raise self.wrong(field, f"is {_kind(value)}, not text")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A field that must hold text or a list of at least one text.

        Raises:
            UserError: If it does not.
        """
        value = self._field(field)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self.wrong(field, f"is {_kind(value)}, not text or a list of text")
        if not values:
            raise self.wrong(field, "is an empty list")
        return tuple(values)

    def wrong(self, field: str, why: str) -> UserError:
        """What to raise about a field."""
        return UserError(f"{self.path}, line {self.line}: field {field!r} {why}. Mend the file.")

    def _field(self, field: str) -> Any:
        if field not in self.content:
            there = ", ".join(sorted(self.content)) or "none"
            raise self.wrong(field, f"is missing; there are: {there}")
        return self.content[field]


def read_items(path: Path, within: str = "") -> list[Item]:
    """The objects of a JSON list, or of a file of JSON lines (`.jsonl`).

    Args:
        path: Of the file, UTF-8.
        within: The list is this field of the one object that the file holds; "": the file is it.

    Raises:
        UserError: If the file is absent, or not of this form.
    """
    text = read_text(path)
    if path.suffix == ".jsonl":
        return list(_lines(text, path))
    start = 0
    if within:
        whole = _decoded(text, 0, path)[0]
        if not isinstance(whole, dict) or within not in whole:
            raise UserError(f"{path}, line 1: field {within!r} is missing. Mend the file.")
        found = re.search(rf'"{re.escape(within)}"\s*:', text)
        if found is None:
            raise UserError(f"{path}: field {within!r} is written with escapes. Write it plainly.")
        start = found.end()
    return list(_listed(text, start, path))


def read_object(path: Path) -> Item:
    """The one object that a JSON file holds.

    Raises:
        UserError: If the file is absent, or not of this form.
    """
    return _item(_decoded(read_text(path), 0, path)[0], path, 1)


def read_labels(path: Path) -> tuple[str, ...]:
    """A JSON list of different texts.

    Raises:
        UserError: If the file is absent, or not of this form.
    """
    labels = _decoded(read_text(path), 0, path)[0]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path} must be a JSON list of text: the labels. Mend the file.")
    if not labels or len(set(labels)) < len(labels):
        raise UserError(f"{path} names no label, or one of them twice. Mend the file.")
    return tuple(labels)


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte-order mark.

    Raises:
        UserError: If it is absent or of another encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: no UTF-8. Save the file as UTF-8.") from error


def sha256(paths: Sequence[Path]) -> str:
    """Of the content of some files, in order; what is absent counts as absent."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes() if path.is_file() else b"absent"
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _lines(text: str, path: Path) -> Iterator[Item]:
    # Not splitlines(), which also splits where JSON allows no line to end.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: no JSON: {error}.") from error
            yield _item(value, path, number)


def _listed(text: str, start: int, path: Path) -> Iterator[Item]:
    """The objects of the list that begins at a place, each with its line."""
    place = _skip(text, start)
    if text[place : place + 1] != "[":
        raise UserError(f"{path}, line {_line(text, place)}: a JSON list must begin here.")
    place = _skip(text, place + 1)
    line, counted = _line(text, place), place
    while text[place : place + 1] != "]":
        value, end = _decoded(text, place, path)
        line, counted = line + text.count("\n", counted, place), place
        yield _item(value, path, line)
        place = _skip(text, end)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            raise UserError(f"{path}, line {_line(text, place)}: a comma or ] must stand here.")


def _decoded(text: str, place: int, path: Path) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, _skip(text, place))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: no JSON: {error.msg}.") from error
    except RecursionError as error:
        raise UserError(f"{path}: no JSON that could be read: nested too deeply.") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: no JSON that could be read: {error}.") from error


def _item(value: Any, path: Path, line: int) -> Item:
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {line}: {_kind(value)} where an object must stand.")
    return Item(value, path, line)


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match
    return match.end()


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), "an object")
