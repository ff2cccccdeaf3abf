"""A checkpoint comes back bit for bit, or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench import checkpoint
from clbench.files import write_atomically

CPU = torch.device("cpu")


def content(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": torch.randn(7, 3, generator=generator),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "counts": torch.arange(4),
        "pixels": torch.zeros(2, 3, dtype=torch.uint8),
        "empty": torch.empty(0),
        "generator": generator.get_state(),
        "plain": {"text": "é", "none": None, "rate": 0.1, "list": [1, 2.5, True], 3: (4, "5")},
    }


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def saved(folder: Path) -> Path:
    (file,) = folder.glob("*.pt")
    return file


def forged(folder: Path, data: bytes) -> None:
    """Writes a file whose digest is right, whatever is in it."""
    digest = hashlib.sha256(data).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / f"{digest[:16]}.state.pt").write_bytes(data)
    (folder / "state.sha256").write_text(f"{digest}  {digest[:16]}.state.pt\n")


def test_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, content())
    found = checkpoint.load(tmp_path, CPU)
    assert_equal(found, content())


def test_the_newest_comes_back_and_only_it_is_kept(tmp_path: Path) -> None:
    for seed in range(3):
        checkpoint.save(tmp_path, content(seed))
    assert len(os.listdir(tmp_path)) == 2
    assert_equal(checkpoint.load(tmp_path, CPU), content(2))


def test_saving_the_same_twice_keeps_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, content())
    checkpoint.save(tmp_path, content())
    assert_equal(checkpoint.load(tmp_path, CPU), content())


def test_nothing_saved_nothing_loaded(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, CPU) is None
    assert checkpoint.load(tmp_path / "nowhere", CPU) is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_one_flipped_bit_is_noticed(share: float, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, content())
    data = bytearray(saved(tmp_path).read_bytes())
    data[int(share * len(data))] ^= 1
    saved(tmp_path).write_bytes(data)
    assert checkpoint.load(tmp_path, CPU) is None


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file_is_noticed(kept: int, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, content())
    saved(tmp_path).write_bytes(saved(tmp_path).read_bytes()[:kept])
    assert checkpoint.load(tmp_path, CPU) is None


@pytest.mark.parametrize("text", ["", "abc", "a b c", "a  ../../etc/passwd", "\udcff"])
def test_a_damaged_digest_is_noticed(text: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, content())
    (tmp_path / "state.sha256").write_bytes(text.encode(errors="surrogateescape"))
    assert checkpoint.load(tmp_path, CPU) is None


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, content())
    saved(tmp_path).unlink()
    assert checkpoint.load(tmp_path, CPU) is None


@pytest.mark.parametrize("written", [1, 0])
def test_killed_while_saving_the_one_before_comes_back(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first of the two files is there, or between them."""
    checkpoint.save(tmp_path, content(0))
    calls: list[Path] = []

    def until_killed(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) > written:
            raise KeyboardInterrupt
        write_atomically(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", until_killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, content(1))
    assert_equal(checkpoint.load(tmp_path, CPU), content(0))
    checkpoint.save(tmp_path, content(2))
    assert_equal(checkpoint.load(tmp_path, CPU), content(2))
    assert len(os.listdir(tmp_path)) == 2


class Bird:
    """Sings when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    forged(tmp_path / "pickle", pickle.dumps(Bird(canary)))
    torch.save({"weights": Bird(canary)}, tmp_path / "torch.pt")
    forged(tmp_path / "torch", (tmp_path / "torch.pt").read_bytes())
    for folder in ("pickle", "torch"):
        assert checkpoint.load(tmp_path / folder, CPU) is None
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bird(canary)))
    assert canary.exists(), "the bird would have sung"


def test_what_is_no_checkpoint_is_none(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    for i, data in enumerate((b"", b"text", (tmp_path / "list.pt").read_bytes())):
        forged(tmp_path / str(i), data)
        assert checkpoint.load(tmp_path / str(i), CPU) is None


def test_discard_removes_it_and_what_was_left_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, content())
    (folder / "0123.state.pt").write_bytes(b"from a killed writer")
    checkpoint.discard(folder)
    assert not folder.exists()
    checkpoint.discard(folder)
    checkpoint.save(folder, content())
    (folder / "note.txt").write_text("the user's")
    checkpoint.discard(folder)
    assert os.listdir(folder) == ["note.txt"]
