"""Two processes leave what one leaves: matrices, counts, memories, Fisher information, weights."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from two import CASES

from clbench import userspace

#: Of weights and curvatures: sums over rows in another order, over all steps of a run.
RELATIVE, ABSOLUTE = 1e-4, 5e-5


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """The numbers of all cases: "1-0" of one process, "2-0" and "2-1" of each of two."""
    folder = tmp_path_factory.mktemp("processes")
    tests = userspace.suite() / "tests"
    places = f"{tests}:{environment['PYTHONPATH']}"
    script = str(tests / "processes" / "two.py")
    names = [("0", "1"), ("0", "2"), ("1", "2")]
    running = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *name],
            env={**environment, "PYTHONPATH": places},
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    said = [process.communicate(timeout=600)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    return {
        f"{count}-{rank}": json.loads((folder / f"{count}-{rank}.json").read_text())
        for rank, count in names
    }


@pytest.mark.parametrize("case", [f"{kind} {name}" for kind, name in CASES])
def test_two_processes_leave_what_one_leaves(found: dict[str, dict[str, Any]], case: str) -> None:
    one, first, second = (found[name][case] for name in ("1-0", "2-0", "2-1"))
    assert (one["processes"], first["processes"]) == (1, 2)
    assert first == second, "the two have drifted apart"
    assert first["accuracy_matrix"] == one["accuracy_matrix"]
    assert first["costs"] == one["costs"]
    for name in ("weights", "curvature"):
        pair = (torch.tensor(some[name], dtype=torch.float64) for some in (first, one))
        assert_close(*pair, rtol=RELATIVE, atol=ABSOLUTE)


def test_curvature_is_compared(found: dict[str, dict[str, Any]]) -> None:
    assert all(found["2-0"][f"{kind} ewc"]["curvature"] for kind in ("mlp", "vit", "text"))
