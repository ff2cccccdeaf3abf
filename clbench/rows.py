"""Arrays that stay in their file: rows come and go by system calls, and none stays in memory.

A memory map would do the same, but what it has shown counts as this process's memory until the
system wants it back, and each page costs a fault the first time: on random rows of 12 kB that is
three times what reading them costs.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

#: Buffers that a system call takes at most (IOV_MAX is 1,024 or more).
_AT_ONCE = 512


class Rows:
    """Rows of a `.npy` file, each a first index of its array; threads may read and write at once.

    Args:
        descriptor: Of the open file; closed when this object goes.
        offset: Bytes before the first row.
        shape: Of the whole array.
        dtype: Of its numbers.
    """

    def __init__(
        self, descriptor: int, offset: int, shape: Sequence[int], dtype: DTypeLike
    ) -> None:
        weakref.finalize(self, os.close, descriptor)
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._file, self._offset = descriptor, offset
        self._size = int(np.prod(self.shape[1:])) * self.dtype.itemsize

    @classmethod
    def create(cls, path: Path, shape: Sequence[int], dtype: DTypeLike) -> Rows:
        """A new file of zeros.

        Raises:
            OSError: If there is no room for it, which must show here: where a file is longer than
                the disk has room for, writing fails late.
        """
        rows = cls._of(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, shape, dtype)
        end = rows._offset + rows.nbytes
        if sys.platform == "linux":
            os.posix_fallocate(rows._file, 0, end)
        else:
            os.ftruncate(rows._file, end)
        return rows

    @classmethod
    def behind(cls, array: Array) -> Rows:
        """The file that is mapped as this whole array."""
        mapped = array
        while isinstance(mapped.base, np.ndarray):
            mapped = mapped.base
        same = mapped.__array_interface__ == array.__array_interface__
        if not (isinstance(mapped, np.memmap) and same and array.flags.c_contiguous):
            raise ValueError("this is no whole memory-mapped array")
        descriptor = os.open(str(mapped.filename), os.O_RDONLY)
        return cls(descriptor, mapped.offset, array.shape, array.dtype)

    @classmethod
    def _of(cls, path: Path, flags: int, shape: Sequence[int], dtype: DTypeLike) -> Rows:
        descriptor = os.open(path, flags, 0o666)
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
        with os.fdopen(os.dup(descriptor), "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            offset = file.tell()
        return cls(descriptor, offset, shape, dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return len(self) * self._size

    def __getitem__(self, positions: NDArray[np.int64]) -> Array:
        """The rows at `positions` ([B], in any order, from 0), [B, ...]."""
        out = np.empty((len(positions), *self.shape[1:]), self.dtype)
        places = out.reshape(-1).view(np.uint8).data
        order = np.argsort(positions, kind="stable")
        for start, stop, first in _runs(positions[order]):
            wanted = order[start:stop].tolist()
            parts = [places[p * self._size : (p + 1) * self._size] for p in wanted]
            done = os.preadv(self._file, parts, self._offset + first * self._size)
            if done != len(parts) * self._size:
                raise IndexError(f"row {first} and the next {len(parts)} are not all there")
        return out

    def __setitem__(self, key: int | slice, rows: Array) -> None:
        """Writes one row, or as many as given from the start of a slice on."""
        first = (key.start or 0) if isinstance(key, slice) else key
        data = np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data
        place = self._offset + first * self._size
        while data:
            done = os.pwrite(self._file, data, place)
            data, place = data[done:], place + done

    def sync(self) -> None:
        """Waits until everything that was written is on the disk."""
        os.fsync(self._file)


def _runs(ascending: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Neighbours as one: (start, stop, position at start) of each part that counts up by one."""
    breaks = (np.diff(ascending) != 1).nonzero()[0] + 1
    bounds = [0, *breaks.tolist(), len(ascending)]
    firsts = ascending[bounds[:-1]].tolist() if len(ascending) else []
    for start, stop, first in zip(bounds, bounds[1:], firsts, strict=False):
        for cut in range(start, stop, _AT_ONCE):
            yield cut, min(cut + _AT_ONCE, stop), first + cut - start
