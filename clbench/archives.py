"""What libraries unpack: into its own folder only, and not without end."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakSet

from clbench.errors import UserError

#: What a member takes on a disk beside its content: without it, empty members would be free.
_ENTRY = 512
_ADVICE = (
    "It may be made to fill disks: delete it, and see where it comes from. If it is what you want, "
    "unpack it yourself."
)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What an archive may become.

    Attributes:
        members: Files and folders.
        total: Bytes.
        ratio: Bytes for each byte of the archive; datasets have 1 to 20, bombs 1,000 and more.
        spared: Bytes up to which the ratio does not matter.
    """

    members: int = 5_000_000
    total: int = 2**40
    ratio: float = 200.0
    spared: int = 2**28


BOUNDS = Bounds()


@contextmanager
def kept_inside(bounds: Bounds = BOUNDS) -> Iterator[None]:
    """In the block, no archive that a library unpacks leaves its folder, or fills the disk.

    Members of a tar archive that would land outside, are devices, or are links to elsewhere are
    refused (PEP 706), where the library asks for nothing else; Python's zipfile keeps to its folder
    by itself. Members, bytes and ratio are counted before the first one is unpacked.

    Args:
        bounds: What is allowed.

    Raises:
        UserError: If an archive would become more; nothing of it is unpacked.
    """

    seen: WeakSet[tarfile.TarFile] = WeakSet()

    def look(archive: tarfile.TarFile) -> None:
        if archive not in seen:
            path = None if archive.name is None else os.fsdecode(archive.name)
            _require_modest(path, _packed(path), _sizes(archive), bounds)
            seen.add(archive)

    def opened(archive: zipfile.ZipFile) -> None:
        sizes = (_ENTRY + member.file_size for member in archive.filelist)
        try:
            path = None if archive.filename is None else os.fsdecode(archive.filename)
            _require_modest(path, _packed(path), sizes, bounds)
        except UserError:
            archive.close()
            raise

    filtered = staticmethod(tarfile.data_filter)
    with ExitStack() as stack:
        stack.enter_context(_replaced(tarfile.TarFile, "extraction_filter", filtered))
        for name in ("extract", "extractall"):
            unpack = _preceded(getattr(tarfile.TarFile, name), look)
            stack.enter_context(_replaced(tarfile.TarFile, name, unpack))
        init = _followed(zipfile.ZipFile.__init__, opened)
        stack.enter_context(_replaced(zipfile.ZipFile, "__init__", init))
        yield


def _sizes(archive: tarfile.TarFile) -> Iterator[int]:
    """Bytes of each member by its header, one after the other: a bomb is not read to its end."""
    if type(archive.fileobj).__name__ == "_Stream":
        raise UserError(
            f"{archive.name!r} is not unpacked: read as a stream, it can't be looked "
            "at before. Unpack it yourself."
        )
    for member in archive:
        yield _ENTRY + member.size


def _packed(path: str | None) -> int | None:
    """Bytes of an archive that is a file."""
    return os.path.getsize(path) if path is not None and os.path.isfile(path) else None


def _require_modest(
    path: str | None, packed: int | None, sizes: Iterable[int], bounds: Bounds
) -> None:
    """Refuses what would become too much."""
    allowed, whose = float(bounds.total), path or "An archive"
    if packed is not None:
        allowed = min(allowed, max(bounds.spared, bounds.ratio * packed))
    total = 0
    for count, size in enumerate(sizes, 1):
        total += size
        if count > bounds.members:
            raise UserError(
                f"{whose} is not unpacked: it holds more than {bounds.members:,} files. {_ADVICE}"
            )
        if total > allowed:
            has = "" if packed is None else f" of {packed:,} bytes"
            raise UserError(
                f"{whose} is not unpacked: an archive{has} may become {allowed:,.0f} bytes, and "
                f"its first {count:,} files take {total:,}. {_ADVICE}"
            )


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    """A class has another attribute in the block."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _preceded(method: Callable[..., Any], look: Callable[[Any], None]) -> Callable[..., Any]:
    """The method, after a look at its object; its arguments differ from one Python to another."""

    @wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        look(self)
        return method(self, *args, **kwargs)

    return both


def _followed(method: Callable[..., Any], look: Callable[[Any], None]) -> Callable[..., Any]:
    """The method, before a look at its object."""

    @wraps(method)
    def both(self: Any, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        look(self)

    return both
