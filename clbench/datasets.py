"""Datasets that come with a library: scikit-learn's digits and some of torchvision's."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from clbench import checksums, downloads
from clbench.classification import Images, channel_statistics
from clbench.division import DividedImages, held_out
from clbench.errors import UserError
from clbench.samples import TensorSource
from clbench.types import LOCATION, Split

Name = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"]

_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
#: What torchvision reads instead, where an old release of it left them.
_PROCESSED = ("../processed/training.pt", "../processed/test.pt")
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


@dataclass(frozen=True)
class _Published:
    """A dataset of torchvision.

    Attributes:
        title: Its class in torchvision.
        folder: Where its files lie, below data_dir.
        files: Their names.
        page: Where to get them.
        mean: Per channel, of the training images, in [0, 1].
        std: Per channel.
        n_classes: Classes.
        verified: torchvision compares the files with their published MD5 sums when it reads them.
        archives: What the files are packed in, below data_dir.
    """

    title: str
    folder: str
    files: Sequence[str]
    page: str
    mean: Sequence[float]
    std: Sequence[float]
    n_classes: int
    verified: bool
    archives: Sequence[str]


_PUBLISHED: Mapping[str, _Published] = {
    "mnist": _Published(
        "MNIST",
        "MNIST/raw",
        _IDX,
        "https://ossci-datasets.s3.amazonaws.com/mnist/ (four .gz files, to be unpacked)",
        (0.1307,),
        (0.3081,),
        10,
        False,
        [f"MNIST/raw/{name}.gz" for name in _IDX],
    ),
    "fashion_mnist": _Published(
        "FashionMNIST",
        "FashionMNIST/raw",
        _IDX,
        "https://github.com/zalandoresearch/fashion-mnist (four .gz files, to be unpacked)",
        (0.2860,),
        (0.3530,),
        10,
        False,
        [f"FashionMNIST/raw/{name}.gz" for name in _IDX],
    ),
    "cifar10": _Published(
        "CIFAR10",
        "cifar-10-batches-py",
        (*_BATCHES, "test_batch", "batches.meta"),
        "https://www.cs.toronto.edu/~kriz/cifar.html (the Python version, to be unpacked)",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        10,
        True,
        ["cifar-10-python.tar.gz"],
    ),
    "cifar100": _Published(
        "CIFAR100",
        "cifar-100-python",
        ("train", "test", "meta"),
        "https://www.cs.toronto.edu/~kriz/cifar.html (the Python version, to be unpacked)",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        100,
        True,
        ["cifar-100-python.tar.gz"],
    ),
}


@dataclass(kw_only=True)
class LibraryImages(DividedImages):
    """Base of the class-incremental scenarios on a dataset of torchvision.

    Attributes:
        data_dir: Folder of the datasets, laid out as torchvision does.
        download: Let torchvision fetch what is missing.
    """

    dataset: ClassVar[Name]

    data_dir: Path = field(default=Path("data"), metadata=LOCATION)
    download: bool = field(default=False, metadata=LOCATION)

    @property
    def n_classes(self) -> int:
        return n_classes(self.dataset)

    def check(self, split: Split) -> None:
        check(self.dataset, self.data_dir, self.download)
        super().check(split)

    def whole(self) -> Images:
        return load(self.dataset, self.data_dir, self.download)

    def fingerprint(self) -> Mapping[str, Any]:
        return fingerprint(self.dataset, self.data_dir, self.download)


def n_classes(name: Name) -> int:
    """Classes of a dataset."""
    return 10 if name == "digits" else _PUBLISHED[name].n_classes


def load(name: Name, data_dir: Path, download: bool = False) -> Images:
    """A whole dataset.

    Args:
        name: Which one.
        data_dir: Folder of the datasets, laid out as torchvision does.
        download: Let torchvision fetch what is missing.

    Raises:
        UserError: If it is missing or damaged.
    """
    if name == "digits":
        return _digits()
    check(name, data_dir, download)
    known = _PUBLISHED[name]
    if download:
        _fetch(known, data_dir)
    checksums.compare(data_dir, [data_dir / known.folder / file for file in known.files])
    train, _ = _part(known, data_dir, True)
    test, class_names = _part(known, data_dir, False)
    return Images(train, test, class_names, known.mean, known.std)


def check(name: Name, data_dir: Path, download: bool = False) -> None:
    """Refuses a dataset that is not there and may not be fetched.

    Raises:
        UserError: With what is missing, where to get it and where to put it.
    """
    if name == "digits" or download:
        return
    known = _PUBLISHED[name]
    folder = data_dir / known.folder
    missing = [file for file in known.files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{known.title} is not in {data_dir}: {folder} lacks {', '.join(missing)}. Get it from "
            f"{known.page}, set data_dir to the folder that has {known.folder}, or set "
            "scenario.download=true."
        )


def fingerprint(name: Name, data_dir: Path, download: bool = False) -> dict[str, Any]:
    """The SHA-256 of each file that torchvision itself does not verify.

    What may be fetched is fetched first: its content is part of the run's identity.
    """
    if name == "digits" or _PUBLISHED[name].verified:
        return {}
    known = _PUBLISHED[name]
    if download:
        _fetch(known, data_dir)
    check(name, data_dir)
    folder = data_dir / known.folder
    return {
        file: hashlib.sha256((folder / file).read_bytes()).hexdigest()
        for file in (*known.files, *_PROCESSED)
        if (folder / file).is_file()
    }


def digit_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: uint8 [1797, 1, 8, 8] and their labels, int64 [1797]."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # 0..16 ink levels to 0..255.
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    return images, torch.from_numpy(labels.astype(np.int64))


def _digits() -> Images:
    """The digits, a quarter of each class for testing: always the same ones."""
    images, targets = digit_images()
    train, test = held_out(targets, 0.25, "digits test")
    mean, std = channel_statistics(images[train])
    return Images(
        TensorSource(images[train], targets[train]),
        TensorSource(images[test], targets[test]),
        [str(d) for d in range(10)],
        mean,
        std,
    )


def _fetch(known: _Published, data_dir: Path) -> None:
    """Fetches what is missing, and remembers what was unpacked of it.

    Raises:
        UserError: If it can't be fetched, or is not what it should be.
    """
    folder = data_dir / known.folder
    with downloads.fetching(data_dir):
        if all((folder / file).is_file() for file in known.files):
            return
        room = data_dir / ".fetching"
        shutil.rmtree(room, ignore_errors=True)  # of a process that was killed
        try:
            for archive in known.archives:
                expected = checksums.known()[archive]
                addresses = _addresses(known, Path(archive).name)
                downloads.kept(room / archive, addresses, expected, "the suite")
            _read(known, room, True, download=True)
            folder.mkdir(parents=True, exist_ok=True)
            for file in known.files:
                (room / known.folder / file).replace(folder / file)
        finally:
            shutil.rmtree(room, ignore_errors=True)
        checksums.remember(data_dir, [folder / file for file in known.files])


def _addresses(known: _Published, name: str) -> list[str]:
    """Where torchvision gets an archive."""
    from torchvision import datasets

    kind = vars(datasets)[known.title]
    if issubclass(kind, datasets.MNIST):
        return [f"{mirror}{name}" for mirror in kind.mirrors]
    return [kind.url]


def _read(known: _Published, data_dir: Path, train: bool, download: bool = False) -> Any:
    """torchvision's dataset: the training or the test part.

    Raises:
        UserError: If it is missing or damaged.
    """
    from torchvision import datasets

    with warnings.catch_warnings():
        # NumPy 2.4.0 to 2.4.4 warn of the files that NumPy 1 wrote, as CIFAR's.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        try:
            return vars(datasets)[known.title](str(data_dir), train=train, download=download)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{known.title} in {data_dir / known.folder} can't be read: {error}. Delete the "
                f"folder and get it again from {known.page}."
            ) from error


def _part(known: _Published, data_dir: Path, train: bool) -> tuple[TensorSource, list[str]]:
    """The training or the test part, and the class names."""
    read = _read(known, data_dir, train)
    pixels = torch.as_tensor(np.asarray(read.data))
    images = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    targets = torch.as_tensor(read.targets, dtype=torch.int64)
    # MNIST's are called "0 - zero".
    return TensorSource(images, targets), [str(c).split(" - ")[0] for c in read.classes]
