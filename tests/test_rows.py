"""Rows in a file are those of the array, whatever is asked for, and none stays in memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.rows import Rows

SHAPE = (30, 2, 3)


def stored(folder: Path, dtype: str = "int16") -> tuple[Rows, np.ndarray]:
    content = np.arange(180).reshape(SHAPE).astype(dtype)
    np.save(folder / f"{dtype}.npy", content)
    return Rows.behind(np.load(folder / f"{dtype}.npy", mmap_mode="c")), content


@given(st.lists(st.integers(0, 29), max_size=60), st.sampled_from(["uint8", "int16", "float32"]))
def test_any_rows_in_any_order_are_those_of_the_array(positions: list[int], dtype: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rows, content = stored(Path(folder), dtype)
        index = np.array(positions, np.int64)
        found = rows[index]
        assert found.dtype == content.dtype
        np.testing.assert_array_equal(found, content[index])


def test_more_neighbours_than_a_system_call_takes(tmp_path: Path) -> None:
    content = np.arange(5000, dtype=np.int32)
    rows = Rows.create(tmp_path / "x.npy", content.shape, content.dtype)
    rows[:] = content
    np.testing.assert_array_equal(rows[np.arange(5000)], content)
    order = np.random.default_rng(0).permutation(5000)
    np.testing.assert_array_equal(rows[order], content[order])


def test_what_is_written_is_a_file_that_numpy_reads(tmp_path: Path) -> None:
    rows = Rows.create(tmp_path / "x.npy", SHAPE, np.float32)
    content = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: rows.__setitem__(i, content[i]), range(0, 20)))
    rows[20:30] = content[20:]
    rows.sync()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), content)
    np.testing.assert_array_equal(rows[np.arange(30)], content)
    assert (len(rows), rows.shape, rows.nbytes) == (30, SHAPE, 720)
    assert rows.dtype == np.float32


def test_what_was_not_written_is_zero(tmp_path: Path) -> None:
    rows = Rows.create(tmp_path / "x.npy", SHAPE, np.uint8)
    assert not rows[np.arange(30)].any()


def test_rows_that_are_not_there_are_no_zeros(tmp_path: Path) -> None:
    rows, _ = stored(tmp_path)
    os.truncate(tmp_path / "int16.npy", os.stat(tmp_path / "int16.npy").st_size - 1)
    with pytest.raises(IndexError, match="not all there"):
        rows[np.array([29])]
    with pytest.raises(IndexError, match="not all there"):
        rows[np.array([3, 31])]


def test_a_part_of_an_array_is_no_file(tmp_path: Path) -> None:
    stored(tmp_path)
    whole = np.load(tmp_path / "int16.npy", mmap_mode="r")
    assert len(Rows.behind(np.asarray(whole))) == 30
    for part in (whole[:5], np.asarray(whole)[::-1], whole.view(np.uint16), np.zeros(SHAPE)):
        with pytest.raises(ValueError, match="no whole memory-mapped array"):
            Rows.behind(part)


def test_a_file_is_read_although_its_name_is_gone_and_closed_in_the_end(tmp_path: Path) -> None:
    rows, content = stored(tmp_path)
    (tmp_path / "int16.npy").unlink()
    np.testing.assert_array_equal(rows[np.arange(30)], content)
    descriptor: Any = rows._file
    del rows
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    """Where a memory map would hold all of its 200 MB."""
    code = """
import sys, numpy as np
from clbench.rows import Rows
def resident():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l[:6] == "VmRSS:") * 1024
rows = Rows.create(sys.argv[1], (50_000, 4096), np.uint8)
block = np.ones((1000, 4096), np.uint8)
rows[0:1000] = block
before = resident()
for start in range(0, 50_000, 1000):
    rows[start : start + 1000] = block
order = np.random.default_rng(0).permutation(50_000)
total = sum(int(rows[order[i : i + 500]].sum()) for i in range(0, 50_000, 500))
assert total == 50_000 * 4096
print(resident() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40e6
