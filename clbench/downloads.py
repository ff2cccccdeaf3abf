"""What libraries fetch and unpack: by one process at a time, and into its own folder only."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clbench import locks


@contextmanager
def kept_inside() -> Iterator[None]:
    """In the block, no tar archive that a library unpacks leaves its folder (PEP 706).

    Members that would land outside, are devices, or are links to elsewhere are refused, where the
    library asks for nothing else; Python's zipfile keeps to its folder by itself.
    """
    before = vars(tarfile.TarFile).get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        if before is None:
            del tarfile.TarFile.extraction_filter
        else:
            tarfile.TarFile.extraction_filter = before


@contextmanager
def fetching(folder: Path) -> Iterator[None]:
    """For a library that may fetch a dataset: others that want it wait, and find it there.

    Args:
        folder: Where it goes; made if it is not there.
    """
    with locks.in_turn(folder), kept_inside():
        yield
