"""Files of instructions: what is wrong with them is said with file, line and field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clbench.errors import UserError
from clbench.text.instruction_files import read_items, read_labels, read_object, sha256


def write(folder: Path, text: str, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


LIST = """[
  {"label": "a", "sentence": "one\\ntwo"},

  {"label": "b",
   "sentence": "grün 猫"}
]
"""


def test_items_know_their_line(tmp_path: Path) -> None:
    items = read_items(write(tmp_path, LIST))
    assert [(item.line, item.text("label")) for item in items] == [(2, "a"), (4, "b")]
    assert [item.text("sentence") for item in items] == ["one\ntwo", "grün 猫"]
    lines = write(tmp_path, '{"a": "1\u2028"}\n\n{"a": "2"}\n', "data.jsonl")
    assert [(item.line, item.text("a")) for item in read_items(lines)] == [(1, "1\u2028"), (3, "2")]
    assert read_items(write(tmp_path, "[]")) == []
    assert read_items(write(tmp_path, "\ufeff[]")) == []
    assert len(read_items(write(tmp_path, json.dumps([{"x": i} for i in range(500)])))) == 500


def test_a_list_within_an_object(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 1,\n "Instances": [\n {"input": "x"},\n {"input": "y"}]}')
    assert [(i.line, i.text("input")) for i in read_items(path, "Instances")] == [
        (3, "x"),
        (4, "y"),
    ]
    with pytest.raises(UserError, match=r"data.json, line 1: field 'Other' is missing"):
        read_items(path, "Other")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[\n {}\n {}]", r"a.json, line 3: a comma or \] must stand here"),
        ("a.json", '[\n {"a": }]', r"a.json, line 2: no JSON: Expecting value"),
        ("a.json", "[{}", r"a.json, line 1: a comma or \] must stand here"),
        ("a.json", '{"a": 1}', r"a.json, line 1: a JSON list must begin here"),
        ("a.json", "", r"a.json, line 1: a JSON list must begin here"),
        ("a.json", '[{},\n"x"]', r"a.json, line 2: text where an object must stand"),
        ("a.jsonl", "{}\n{'a': 1}\n", r"a.jsonl, line 2: no JSON"),
        ("a.jsonl", "{}\n\n3\n", r"a.jsonl, line 3: a number where an object must stand"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_items(write(tmp_path, text, name))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("missing", "field 'missing' is missing; there are: number, output, texts"),
        ("number", "field 'number' is a number, not text"),
        ("texts", "field 'texts' is a list, not text"),
    ],
)
def test_fields_that_are_no_text(tmp_path: Path, field: str, message: str) -> None:
    path = write(tmp_path, '[{},\n{"number": 3, "texts": ["a", "b"], "output": null}]')
    item = read_items(path)[1]
    with pytest.raises(UserError, match=re.escape(f"data.json, line 2: {message}")):
        item.text(field)


def test_one_text_or_several(tmp_path: Path) -> None:
    path = write(tmp_path, '[{"a": "x", "b": ["x", ""], "c": [], "d": [1], "e": null}]')
    (item,) = read_items(path)
    assert item.texts("a") == ("x",)
    assert item.texts("b") == ("x", "")
    for field, why in (("c", "is an empty list"), ("d", "is a list, not"), ("e", "is null, not")):
        with pytest.raises(UserError, match=f"line 1: field '{field}' {why}"):
            item.texts(field)


def test_files_that_are_absent_or_of_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.json can't be read: No such file"):
        read_items(tmp_path / "nothing.json")
    path = tmp_path / "latin.json"
    path.write_bytes(b'[\n{"a": "\xfc"}]')
    with pytest.raises(UserError, match=r"latin.json, line 2: no UTF-8"):
        read_items(path)


def test_labels(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, '["a", "b"]')) == ("a", "b")
    for text in ('{"a": 1}', "[1]", "[]", '["a", "a"]'):
        with pytest.raises(UserError, match=r"data.json"):
            read_labels(write(tmp_path, text))
    assert read_object(write(tmp_path, '{"a": "b"}')).text("a") == "b"


def test_the_digest_is_of_content_and_of_what_is_absent(tmp_path: Path) -> None:
    one, other = write(tmp_path, "1", "one"), write(tmp_path, "2", "other")
    before = sha256([one, other])
    assert before != sha256([other, one])
    assert before != sha256([one, tmp_path / "absent"])
    write(tmp_path, "3", "other")
    assert sha256([one, other]) != before
