"""CIFAR-10 and CIFAR-100 as torchvision keeps them on disk."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets as theirs

from clbench.datasets import LibraryImages
from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.testing import check_scenario
from clbench.types import Split
from scenarios.split_cifar10 import SplitCIFAR10
from scenarios.split_cifar100 import SplitCIFAR100

FOLDERS = {SplitCIFAR10: "cifar-10-batches-py", SplitCIFAR100: "cifar-100-python"}
EACH = pytest.mark.parametrize("kind", list(FOLDERS))


def old_dtype(*arguments: Any) -> np.dtype[Any]:
    """What NumPy 2.4.0 to 2.4.4 do with the dtypes in the published files, on every NumPy."""
    assert arguments == ("u1", 0, 1)
    warnings.warn("dtype(): align=0", np.exceptions.VisibleDeprecationWarning, stacklevel=2)
    return np.dtype("u1")


class OldDtype:
    """Pickles as the dtypes of the published files do, which NumPy 1.x wrote."""

    def __reduce__(self) -> tuple[Any, ...]:
        return old_dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)


class OldArray:
    """An array with such a dtype, as `numpy.ndarray.__reduce__` writes it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments, _ = self.array.__reduce__()
        state = (1, self.array.shape, OldDtype(), False, self.array.tobytes())
        return function, arguments, state


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Noise in the published format, with the sums that torchvision verifies set to match.

    The upper left pixel is the label.
    """
    generator = np.random.default_rng(0)

    def write(folder: str, name: str, content: dict[str, Any]) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        data = pickle.dumps(content, protocol=2)
        (tmp_path / folder / name).write_bytes(data)
        return [name, hashlib.md5(data, usedforsecurity=False).hexdigest()]

    def batch(n: int, classes: int, key: str) -> dict[str, Any]:
        labels = np.arange(n) % classes
        pixels = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        pixels[:, 0] = labels
        return {"data": OldArray(pixels), key: labels.tolist()}

    for theirs_, folder, classes, key, meta in (
        (theirs.CIFAR10, "cifar-10-batches-py", 10, "labels", "batches.meta"),
        (theirs.CIFAR100, "cifar-100-python", 100, "fine_labels", "meta"),
    ):
        names = [f"thing {c}" for c in range(classes)]
        names_key = theirs_.meta["key"]
        training = ["train"] if classes == 100 else [f"data_batch_{i}" for i in range(1, 6)]
        testing = "test" if classes == 100 else "test_batch"
        n = 1000 if classes == 100 else 40
        lists = [write(folder, name, batch(n, classes, key)) for name in training]
        monkeypatch.setattr(theirs_, "train_list", lists)
        lists = [write(folder, testing, batch(2 * classes, classes, key))]
        monkeypatch.setattr(theirs_, "test_list", lists)
        name, md5 = write(folder, meta, {names_key: names})
        monkeypatch.setattr(theirs_, "meta", {"filename": name, "key": names_key, "md5": md5})
    return tmp_path


def scenario(kind: type[LibraryImages], data_dir: Path, **options: Any) -> LibraryImages:
    return kind(backbone=MLP(hidden=(8,)), data_dir=data_dir, **options)


@EACH
@pytest.mark.parametrize("half", [False, True])
def test_conforms(kind: type[LibraryImages], half: bool, data_dir: Path) -> None:
    classes = scenario(kind, data_dir).n_classes // 2 if half else 0
    check_scenario(scenario(kind, data_dir, classes=classes))


@EACH
def test_images_and_labels_belong_together(kind: type[LibraryImages], data_dir: Path) -> None:
    """Rows of red, then green, then blue pixels: channels first, as stored."""
    images = scenario(kind, data_dir).whole()
    assert images.image_shape == (3, 32, 32)
    for source in (images.train, images.test):
        raw = source.gather(torch.arange(len(source)))
        assert torch.equal(raw[:, 0, 0, 0].long(), source.targets)
    assert images.class_names[:2] == ["thing 0", "thing 1"]
    file = theirs.CIFAR10.train_list[0][0] if kind is SplitCIFAR10 else "train"
    with pytest.warns(np.exceptions.VisibleDeprecationWarning):
        stored = pickle.loads((data_dir / FOLDERS[kind] / file).read_bytes())["data"]
    first = images.train.gather(torch.tensor([0]))[0]
    assert first.numpy().tobytes() == stored[0].tobytes()


@EACH
def test_absent_files_are_listed_with_where_to_get_and_to_put_them(
    kind: type[LibraryImages], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"{FOLDERS[kind]} lacks .*cs\.toronto\.edu.*data_dir"):
        scenario(kind, tmp_path).check(Split.EVALUATE)


@EACH
def test_a_changed_file_is_never_unpickled(kind: type[LibraryImages], data_dir: Path) -> None:
    file = data_dir / FOLDERS[kind] / ("test_batch" if kind is SplitCIFAR10 else "test")

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (data_dir / "executed",)

    file.write_bytes(pickle.dumps(Canary()))
    with pytest.raises(UserError, match=r"can't be read.*corrupted"):
        scenario(kind, data_dir).stream(Split.EVALUATE, 0)
    assert not (data_dir / "executed").exists()


@EACH
def test_verified_content_needs_no_fingerprint(kind: type[LibraryImages], tmp_path: Path) -> None:
    assert scenario(kind, tmp_path).fingerprint() == {}
