"""MNIST and Fashion-MNIST as torchvision keeps them on disk."""

from __future__ import annotations

import hashlib
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import SHARED

from clbench import datasets, downloads
from clbench.classification import channel_statistics
from clbench.datasets import LibraryImages
from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.samples import TensorSource
from clbench.testing import check_scenario
from clbench.types import Split
from scenarios.split_fashion_mnist import SplitFashionMNIST
from scenarios.split_mnist import SplitMNIST

EACH = pytest.mark.parametrize(
    ("kind", "folder"), [(SplitMNIST, "MNIST"), (SplitFashionMNIST, "FashionMNIST")]
)


def write(data_dir: Path, folder: str, train: int = 200, test: int = 50) -> Path:
    """Noise in the files' own format (idx); the upper left pixel is the label."""
    raw = data_dir / folder / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, n in (("train", train), ("t10k", test)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = labels
        header = struct.pack(">IIII", 0x803, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">II", 0x801, n)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return data_dir


def scenario(kind: type[LibraryImages], data_dir: Path, **options: Any) -> LibraryImages:
    return kind(backbone=MLP(hidden=(8,)), data_dir=data_dir, **options)


@EACH
@pytest.mark.parametrize("classes", [0, 5])
def test_conforms(kind: type[LibraryImages], folder: str, classes: int, tmp_path: Path) -> None:
    check_scenario(scenario(kind, write(tmp_path, folder), classes=classes))


@EACH
def test_images_and_labels_belong_together(
    kind: type[LibraryImages], folder: str, tmp_path: Path
) -> None:
    images = scenario(kind, write(tmp_path, folder)).whole()
    assert images.image_shape == (1, 28, 28)
    for source, n in ((images.train, 200), (images.test, 50)):
        raw = source.gather(torch.arange(n))
        assert raw.dtype == torch.uint8
        assert torch.equal(raw[:, 0, 0, 0].long(), source.targets)
    assert len(images.class_names) == 10


def test_class_names_are_for_people() -> None:
    """torchvision calls MNIST's "0 - zero"; Fashion-MNIST's contain a slash and a hyphen."""
    from torchvision.datasets import MNIST

    assert [c.split(" - ")[0] for c in MNIST.classes] == [str(d) for d in range(10)]


@EACH
def test_absent_files_are_listed_with_where_to_get_and_to_put_them(
    kind: type[LibraryImages], folder: str, tmp_path: Path
) -> None:
    write(tmp_path, folder)
    (tmp_path / folder / "raw" / "t10k-labels-idx1-ubyte").unlink()
    message = rf"{folder}.raw lacks t10k-labels-idx1-ubyte\. Get it from https.*data_dir"
    with pytest.raises(UserError, match=message):
        scenario(kind, tmp_path).check(Split.EVALUATE)
    with pytest.raises(UserError, match=message):
        scenario(kind, tmp_path).stream(Split.EVALUATE, 0)


@EACH
@pytest.mark.parametrize("damage", ["cut short", "not idx"])
def test_damaged_files_are_refused(
    kind: type[LibraryImages], folder: str, damage: str, tmp_path: Path
) -> None:
    file = write(tmp_path, folder) / folder / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000] if damage == "cut short" else b"<html>" * 1000)
    with pytest.raises(UserError, match=rf"{folder} in .* can't be read.*get it again"):
        scenario(kind, tmp_path).stream(Split.EVALUATE, 0)


@EACH
def test_the_content_is_part_of_the_identity_and_the_place_is_not(
    kind: type[LibraryImages], folder: str, tmp_path: Path
) -> None:
    one, two = (write(tmp_path / name, folder) for name in ("one", "two"))
    assert scenario(kind, one).fingerprint() == scenario(kind, two).fingerprint()
    file = two / folder / "raw" / "train-labels-idx1-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = scenario(kind, two).fingerprint()
    assert found != scenario(kind, one).fingerprint()
    assert found[file.name] == hashlib.sha256(content).hexdigest()


def test_a_download_comes_before_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run that fetches the data and the next one are the same run."""
    from torchvision import datasets as theirs

    asked = []

    def fetch(self: Any) -> None:
        asked.append(self.root)
        write(Path(self.root), "MNIST")

    monkeypatch.setattr(downloads, "kept", lambda *_: None)
    monkeypatch.setattr(theirs.MNIST, "download", fetch)
    fetching = scenario(SplitMNIST, tmp_path, download=True)
    fetching.check(Split.EVALUATE)
    assert not asked, "a check fetches nothing"
    assert fetching.fingerprint() == scenario(SplitMNIST, tmp_path).fingerprint()
    assert len(asked) == 1


def test_a_failed_download_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets as theirs

    def fail(_: Any) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(downloads, "kept", lambda *_: None)
    monkeypatch.setattr(theirs.MNIST, "download", fail)
    with pytest.raises(UserError, match="Error downloading train-images"):
        scenario(SplitMNIST, tmp_path, download=True).stream(Split.EVALUATE, 0)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = SHARED / "mnist-raw.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive.name} is not in {SHARED}")
    folder = tmp_path_factory.mktemp("mnist")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def test_sizes_of_the_splits_are_those_in_the_docstring(real: Path) -> None:
    whole = scenario(SplitMNIST, real, tuning_fraction=0.0).images(Split.EVALUATE)
    tune, evaluate = (scenario(SplitMNIST, real).images(split) for split in Split)
    assert (len(tune.train), len(tune.test)) == (9_600, 2_400)
    assert (len(evaluate.train), len(evaluate.test)) == (48_000, 10_000)
    assert (len(whole.train), len(whole.test)) == (60_000, 10_000)


def test_the_normalisation_in_the_literature_is_that_of_the_images(real: Path) -> None:
    images = datasets.load("mnist", real)
    assert isinstance(images.train, TensorSource)
    mean, std = channel_statistics(images.train.inputs, at_most=60_000)
    assert images.mean == pytest.approx(mean, abs=5e-5)
    assert images.std == pytest.approx(std, abs=5e-5)
