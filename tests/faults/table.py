"""Runs the tests of faults and writes docs/faults.md: `python tests/faults/table.py`.

Each fault is a test whose docstring says what is injected and what is expected; the last column is
what came of it now, on this machine.
"""

from __future__ import annotations

import argparse
import ast
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "faults.md"
#: Where the table begins on the page; what stands before it is written by hand.
HEADING = "## The faults, one by one"


class Fault(NamedTuple):
    """A test of a fault."""

    number: str
    injected: str
    expected: str
    file: str
    test: str


def faults() -> Iterator[Fault]:
    """Every fault that has a test, in order."""
    found = []
    for file in sorted(HERE.glob("test_fault_*.py")):
        for node in ast.parse(file.read_text()).body:
            match = isinstance(node, ast.FunctionDef) and re.match(
                r"test_fault_((?:\d\d_)+)", node.name
            )
            if isinstance(node, ast.FunctionDef) and match:
                injected, _, expected = (ast.get_docstring(node) or "").rpartition(" | ")
                number = match[1].strip("_").replace("_", ", ")
                found.append(Fault(number, injected, expected, file.name, node.name))
    yield from sorted(found)


def outcomes(report: Path) -> dict[str, list[str]]:
    """What came of each test, by its name without parameters."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = str(case.get("name")).partition("[")[0]
        outcome = "passed"
        for part in case:
            if part.tag in ("failure", "error"):
                outcome = "FAILED"
            elif part.tag == "skipped":
                outcome = f"skipped: {part.get('message')}"
        found.setdefault(name, []).append(outcome)
    return found


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")


def rows(found: dict[str, list[str]]) -> Iterator[str]:
    yield "| # | injected | expected | test | last result |"
    yield "|---|---|---|---|---|"
    for fault in faults():
        results = found.get(fault.test, ["not run"])
        count = f" ({len(results)} cases)" if len(results) > 1 else ""
        last = ", ".join(sorted(set(results))) + count
        place = f"`{fault.file}::{fault.test}`"
        words = (fault.number, cell(fault.injected), cell(fault.expected), place, last)
        yield f"| {' | '.join(words)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, help="a JUnit file that is there, of an earlier run")
    chosen = parser.parse_args(arguments)
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        report = chosen.report or Path(folder) / "report.xml"
        if chosen.report is None:
            words = ("-m", "pytest", "-q", str(HERE), f"--junitxml={report}")
            code = subprocess.run([sys.executable, *words]).returncode
        table = "\n".join(rows(outcomes(report)))
    head = PAGE.read_text().partition(HEADING)[0]
    when = time.strftime("%Y-%m-%d")
    where = f"{platform.system()}, Python {platform.python_version()}"
    PAGE.write_text(f"{head}{HEADING}\n\nLast run: {when}, {where}.\n\n{table}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
