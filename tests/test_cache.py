"""The cache of arrays: what comes back, what is remade, and what a reader can never see."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clbench import cache
from clbench.cache import Array
from clbench.errors import UserError

KEY = {"version": 1, "size": 32, "names": ["a", "é"], "nested": {"rate": 0.1, "none": None}}


def sample() -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {
        "images": generator.integers(0, 256, (20, 3, 8, 8), dtype=np.uint8),
        "labels": np.arange(20),
        "weights": np.asfortranarray(generator.normal(size=(5, 4))),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.int16),
        "mask": np.array([True, False]),
    }


class Counting:
    """`make` that counts its calls."""

    def __init__(self, make: Callable[[], dict[str, Array]] = sample) -> None:
        self.calls = 0
        self._make = make

    def __call__(self) -> dict[str, Array]:
        self.calls += 1
        return self._make()


def entry_of(folder: Path) -> Path:
    (entry,) = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return entry


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for part, array in expected.items():
        assert found[part].dtype == array.dtype
        assert found[part].shape == array.shape
        np.testing.assert_array_equal(found[part], array)


@pytest.mark.parametrize("mmap", [True, False])
def test_what_was_made_comes_back_and_is_made_once(tmp_path: Path, mmap: bool) -> None:
    make = Counting()
    for _ in range(3):
        assert_same(cache.arrays(tmp_path / "new" / "deep", "glyphs", KEY, make, mmap), sample())
    assert make.calls == 1


def test_the_key_decides_not_its_order(tmp_path: Path) -> None:
    make = Counting()
    cache.arrays(tmp_path, "x", {"a": 1, "b": 2}, make)
    cache.arrays(tmp_path, "x", {"b": 2, "a": 1}, make)
    assert make.calls == 1
    cache.arrays(tmp_path, "x", {"a": 1, "b": 3}, make)
    cache.arrays(tmp_path, "y", {"a": 1, "b": 2}, make)
    assert make.calls == 3


def test_the_manifest_tells_people_the_key(tmp_path: Path) -> None:
    cache.arrays(tmp_path, "glyphs", KEY, sample)
    entry = entry_of(tmp_path)
    assert entry.name.startswith("glyphs-")
    manifest = json.loads((entry / "key.json").read_text(encoding="utf-8"))
    assert manifest["key"] == KEY
    assert manifest["arrays"]["images"]["shape"] == [20, 3, 8, 8]
    for file in entry.glob("*.npy"):
        np.load(file, allow_pickle=False)


@pytest.mark.parametrize("mmap", [True, False])
def test_writing_to_an_array_never_reaches_the_file(tmp_path: Path, mmap: bool) -> None:
    found = cache.arrays(tmp_path, "x", KEY, sample, mmap)
    found["images"][:] = 0
    assert_same(cache.arrays(tmp_path, "x", KEY, sample, mmap), sample())


def _truncate(entry: Path) -> None:
    path = entry / "images.npy"
    os.truncate(path, path.stat().st_size - 1)


def _cut_manifest(entry: Path) -> None:
    path = entry / "key.json"
    os.truncate(path, path.stat().st_size // 2)


def _replace_array(entry: Path) -> None:
    labels = np.arange(20)
    np.save(entry / "labels.npy", labels.astype(np.float64))
    assert (entry / "labels.npy").stat().st_size > labels.nbytes


def _spoil_header(entry: Path) -> None:
    path = entry / "images.npy"
    data = path.read_bytes()
    path.write_bytes(b"\0" * 16 + data[16:])


def _other_key(entry: Path) -> None:
    path = entry / "key.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["key"]["version"] = 2
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _alien_manifest(entry: Path) -> None:
    (entry / "key.json").write_text("[]", encoding="utf-8")


def _lose_array(entry: Path) -> None:
    (entry / "mask.npy").unlink()


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _cut_manifest,
        _replace_array,
        _spoil_header,
        _other_key,
        _alien_manifest,
        _lose_array,
    ],
)
def test_a_damaged_entry_is_remade(
    tmp_path: Path, damage: Callable[[Path], None], mmap: bool
) -> None:
    make = Counting()
    cache.arrays(tmp_path, "x", KEY, make, mmap)
    damage(entry_of(tmp_path))
    assert_same(cache.arrays(tmp_path, "x", KEY, make, mmap), sample())
    assert make.calls == 2
    cache.arrays(tmp_path, "x", KEY, make, mmap)
    assert make.calls == 2


def test_one_changed_bit_is_seen_when_the_data_are_read_whole(tmp_path: Path) -> None:
    make = Counting()
    cache.arrays(tmp_path, "x", KEY, make, mmap=False)
    path = entry_of(tmp_path) / "images.npy"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    assert_same(cache.arrays(tmp_path, "x", KEY, make, mmap=False), sample())
    assert make.calls == 2


def test_a_failing_make_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Array]:
        raise FileNotFoundError("the data set")

    with pytest.raises(FileNotFoundError, match="the data set"):
        cache.arrays(tmp_path, "x", KEY, fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_objects_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        cache.arrays(tmp_path, "x", KEY, lambda: {"a": np.array([{}], dtype=object)})
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        cache.arrays(tmp_path, name, KEY, sample)
    with pytest.raises(ValueError, match="cannot name"):
        cache.arrays(tmp_path, "x", KEY, lambda: {name: np.zeros(1)})


def test_an_unwritable_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    blocked = tmp_path / "file" / "cache"
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=str(blocked)):
        cache.arrays(blocked, "x", KEY, sample)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_the_users_to_mend(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=str(tmp_path)):
            cache.arrays(tmp_path, "x", KEY, sample)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        cache.arrays(tmp_path, "x", KEY, sample)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


MAKER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    import numpy as np
    from clbench import cache

    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

    def make():
        with (folder.parent / "made").open("a") as log:
            log.write("x")
        time.sleep(seconds)
        return {"a": np.full((300, 300), 7), "b": np.arange(5)}

    if sys.argv[3] == "die":
        import os, signal
        write = np.save

        def save(file, array, allow_pickle):
            write(file, array, allow_pickle=allow_pickle)
            if array.ndim == 1:
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

        np.save = save
    if sys.argv[3] == "nolock":
        sys.modules["fcntl"] = None
    found = cache.arrays(folder, "x", {"k": 1}, make)
    assert found["a"].sum() == 7 * 90000 and found["b"].tolist() == [0, 1, 2, 3, 4]
    """
)


def _start(folder: Path, seconds: float, mode: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", MAKER, str(folder), str(seconds), mode])


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "cache"
    both = [_start(folder, 1.0, "live") for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_without_locks_several_processes_still_agree(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    several = [_start(folder, 0.5, "nolock") for _ in range(3)]
    assert [process.wait(60) for process in several] == [0, 0, 0]
    assert not list(folder.glob("*.tmp"))
    assert entry_of(folder).is_dir()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_in_mid_write_leaves_nothing_visible(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert _start(folder, 0.0, "die").wait(60) == -signal.SIGKILL
    assert [path for path in folder.iterdir() if not path.name.startswith(".")] == []
    assert list(folder.glob(".*.tmp/*.npy")), "it died before it wrote anything"
    assert _start(folder, 0.0, "live").wait(60) == 0
    assert not list(folder.glob(".*.tmp")), "what the killed process left was not swept up"
    assert (tmp_path / "made").read_text() == "xx"
