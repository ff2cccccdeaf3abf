"""Named arrays made once and kept on disk: decoded data, rendered data, features.

An entry is a folder `<name>-<12 hex of the key>`: one `.npy` file an array, and a `key.json` that
lists them. It is written under a hidden name and renamed when it is whole, so a reader never sees
half an entry, whatever killed the writer. Nothing in it is a pickle.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from clbench.errors import UserError
from clbench.files import unwritable
from clbench.rows import Array as Array
from clbench.rows import Rows

#: Name, shape and type of an array to the place that it is written to.
Lend = Callable[[str, Sequence[int], DTypeLike], Rows]

_MANIFEST = "key.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*")


def default_folder() -> Path:
    """The user's cache folder of this suite, by the customs of the operating system."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("clbench"))


def arrays(
    folder: Path,
    name: str,
    key: Mapping[str, Any],
    make: Callable[[], Mapping[str, Array]],
    mmap: bool = True,
) -> dict[str, Array]:
    """The arrays of an entry, made first when it is missing or damaged; see `filled`."""
    return filled(folder, name, key, lambda _: make(), mmap)


def filled(
    folder: Path,
    name: str,
    key: Mapping[str, Any],
    make: Callable[[Lend], Mapping[str, Array | Rows]],
    mmap: bool = True,
) -> dict[str, Array]:
    """The arrays of an entry, made first when it is missing or damaged, large ones in their place.

    Two processes that ask at once: where the file system offers locks one makes it and the other
    waits; elsewhere both make it and the first rename stays. Neither ever sees a part.

    Args:
        folder: The cache folder; created when missing.
        name: What the entry holds, for people: letters, digits and `_`.
        key: Everything that decides the arrays, in JSON's own types. It must change when the
            code behind `make` does, so give it a version.
        make: Makes the arrays, by name (letters, digits and `_`). Called at most once. What does
            not fit in memory it writes to rows that it is lent: those of zeros of a name, shape
            and type, in the entry.
        mmap: Map the files copy-on-write (pages are read when touched; writing to an array
            never reaches the file) and check only their sizes and headers. False reads them
            whole and checks their SHA-256 too.

    Returns:
        The arrays by name, as they were made; they may be written to.

    Raises:
        UserError: The folder cannot be written, or what was written cannot be read.
        TypeError, ValueError: The key is not plain JSON, an array holds Python objects, or a
            name has other characters.
    """
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    entry = folder / f"{_checked(name)}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"
    found = _read(entry, canonical, mmap)
    if found is not None:
        return found
    with _locked(entry) as alone:
        found = _read(entry, canonical, mmap)
        if found is not None:
            return found
        with _refused(folder):
            room = _room(entry, alone)
        try:
            made = {_checked(part): array for part, array in make(_lender(room)).items()}
            with _refused(folder):
                _write(room, canonical, made)
                _publish(room, entry, canonical, mmap)
        finally:
            shutil.rmtree(room, ignore_errors=True)
        found = _read(entry, canonical, mmap)
    if found is None:
        raise UserError(
            f"The cache entry {entry} was written, but does not read back whole. "
            "Check the disk, or choose another folder with cache_dir=."
        )
    return found


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a cache entry or an array: use A-Z a-z 0-9 _")
    return name


@contextlib.contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Turns the system's refusal to write into a message for the user."""
    try:
        yield
    except OSError as error:
        raise unwritable(folder, error) from error


@contextlib.contextmanager
def _locked(entry: Path) -> Iterator[bool]:
    """Waits until no other process makes this entry; yields whether that is certain.

    The lock file stays: a process that removed it could take the lock from one that waits.
    """
    with _refused(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(entry.parent / f".{entry.name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):
            alone = False
        yield alone
    finally:
        os.close(lock)


def _room(entry: Path, alone: bool) -> Path:
    """A new hidden folder beside the entry; sweeps up those that killed processes left."""
    if alone:
        for abandoned in entry.parent.glob(f".{entry.name}.*.tmp"):
            shutil.rmtree(abandoned, ignore_errors=True)
    room = _hidden(entry)
    room.mkdir()
    return room


def _hidden(entry: Path) -> Path:
    return entry.parent / f".{entry.name}.{secrets.token_hex(6)}.tmp"


def _lender(room: Path) -> Lend:
    return lambda part, shape, dtype: Rows.create(room / f"{_checked(part)}.npy", shape, dtype)


def _write(room: Path, canonical: str, made: Mapping[str, Array | Rows]) -> None:
    listed = {}
    for part, content in made.items():
        path = room / f"{part}.npy"
        array = content if isinstance(content, Rows) else np.asarray(content)
        if isinstance(array, Rows):
            array.sync()
        else:
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        listed[part] = {
            "shape": list(array.shape),
            "dtype": array.dtype.str,
            "bytes": path.stat().st_size,
            "sha256": _digest(path),
        }
    manifest = {"key": json.loads(canonical), "arrays": listed}
    with (room / _MANIFEST).open("w", encoding="utf-8") as text:
        json.dump(manifest, text, indent=1, sort_keys=True, allow_nan=False)
        text.flush()
        os.fsync(text.fileno())


def _publish(room: Path, entry: Path, canonical: str, mmap: bool) -> None:
    """Gives the whole entry its name; a damaged one makes way, another process's stays."""
    if _read(entry, canonical, mmap) is not None:
        return
    if entry.exists():
        aside = _hidden(entry)
        with contextlib.suppress(FileNotFoundError):
            entry.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        room.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise


def _read(entry: Path, canonical: str, mmap: bool) -> dict[str, Array] | None:
    """The arrays of a whole entry; None when it is missing, damaged or another key's."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["key"] != json.loads(canonical):
            return None
        return {
            part: _load(entry / f"{_checked(part)}.npy", facts, mmap)
            for part, facts in manifest["arrays"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _load(path: Path, facts: Mapping[str, Any], mmap: bool) -> Array:
    """One array; ValueError when the file is not what the manifest says."""
    if path.stat().st_size != facts["bytes"]:
        raise ValueError(f"{path} has another size")
    if not mmap and _digest(path) != facts["sha256"]:
        raise ValueError(f"{path} has other bytes")
    array: Array = np.asarray(np.load(path, mmap_mode="c" if mmap else None, allow_pickle=False))
    if list(array.shape) != facts["shape"] or array.dtype.str != facts["dtype"]:
        raise ValueError(f"{path} has another shape or type")
    return array


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
