"""Your own data as a scenario, from Python: arrays, a folder of images, a DataFrame."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from clbench.classification import Images, channel_statistics
from clbench.division import DividedImages, held_out
from clbench.errors import UserError, did_you_mean
from clbench.folders import FolderImages, chosen, train_and_test
from clbench.image_files import Entry, ImageFiles, listed
from clbench.nn.backbones import MLP, Backbone, SlimResNet18
from clbench.nn.transforms import AsStored, ImageTransform
from clbench.samples import TensorSource
from clbench.types import LOCATION

if TYPE_CHECKING:
    import pandas as pd

Layout = Literal["auto", "channels_first", "channels_last"]

#: Images with a shorter side than this are read by an MLP unless a backbone is given.
_SMALL = 16


@dataclass(kw_only=True)
class OwnArrays(DividedImages):
    """Class-incremental stream of samples in memory; `from_arrays` makes it.

    Attributes:
        data: The samples, uint8 or float32 [N, C, H, W].
        digest: SHA-256 of samples and labels, by which runs are told apart.
    """

    data: Images = field(metadata=LOCATION, repr=False)
    digest: str = field(metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.crop_padding or self.flip) and max(self.data.image_shape[1:]) == 1:
            raise UserError("crop_padding and flip are for images; these samples are vectors.")

    @property
    def n_classes(self) -> int:
        return len(self.data.class_names)

    def whole(self) -> Images:
        return self.data

    def transform(self, images: Images) -> ImageTransform:
        first = images.train.gather(images.train.targets.new_zeros(1))
        if first.dtype == torch.uint8:
            return super().transform(images)
        return AsStored(self.crop_padding, self.flip)

    def fingerprint(self) -> Mapping[str, Any]:
        return {"arrays": self.digest}


@dataclass(kw_only=True)
class OwnFiles(FolderImages):
    """Class-incremental stream of image files; `from_folder` and `from_frame` make it.

    Attributes:
        entries: The files below the root. Names, sizes and labels are part of a run's identity.
        class_names: Name of each label.
        channels: 3 (RGB) or 1 (luma, ITU-R 601).
    """

    entries: tuple[Entry, ...] = field(metadata=LOCATION, repr=False)
    class_names: tuple[str, ...] = field(metadata=LOCATION)
    channels: Literal[1, 3] = 3

    def list_files(self, root: Path) -> ImageFiles:
        return listed(root, self.entries, self.class_names)


def from_arrays(
    train_images: ArrayLike,
    train_labels: ArrayLike,
    test_images: ArrayLike | None = None,
    test_labels: ArrayLike | None = None,
    *,
    n_experiences: int = 5,
    backbone: Backbone | None = None,
    epochs: int = 5,
    batch_size: int = 32,
    memory_size: int = 500,
    test_fraction: float = 0.2,
    layout: Layout = "auto",
) -> OwnArrays:
    """Arrays or tensors as a class-incremental scenario.

    Other options are those of the class: `dataclasses.replace(scenario, crop_padding=4)`.

    Args:
        train_images: uint8 images, [N, H, W] grey, [N, H, W, C] or [N, C, H, W]; or floats of the
            same shapes, or vectors [N, D], which the model gets as they are.
        train_labels: [N] numbers or texts, one for each class.
        test_images: Likewise; None: `test_fraction` of each class, always the same samples.
        test_labels: [M], of the same classes.
        n_experiences: Divides the number of classes.
        backbone: Of the model; default: an MLP for vectors and images with a side of less than 16
            pixels, else the slim ResNet-18.
        epochs: Passes over each experience.
        batch_size: Samples of the stream in a step.
        memory_size: Samples that a strategy may keep.
        test_fraction: See `test_images`.
        layout: Where the channels are; "auto": where the shape has 1 or 3.

    Raises:
        UserError: With what is wrong with the arrays.
    """
    images, labels = _samples(train_images, "train_images", layout), _labels(train_labels)
    _same_length("train", images, labels)
    names = np.unique(labels)
    targets = torch.from_numpy(np.searchsorted(names, labels).astype(np.int64))
    if test_images is None or test_labels is None:
        if test_images is not None or test_labels is not None:
            raise UserError("Give test_images and test_labels, or neither.")
        if not 0 < test_fraction < 1:
            raise UserError(f"test_fraction={test_fraction} must lie between 0 and 1.")
        learn, check = held_out(targets, test_fraction, "test")
        train = TensorSource(images[learn], targets[learn])
        test = TensorSource(images[check], targets[check])
    else:
        train = TensorSource(images, targets)
        test = _test_part(test_images, test_labels, layout, images, names)
    data = _described(train, test, [str(name) for name in names.tolist()])
    return OwnArrays(
        data=data,
        digest=_digest(train, test),
        backbone=backbone or _reader(data.image_shape),
        n_experiences=n_experiences,
        epochs=epochs,
        batch_size=batch_size,
        memory_size=memory_size,
    )


def from_folder(
    root: str | Path,
    *,
    n_experiences: int = 5,
    backbone: Backbone | None = None,
    epochs: int = 5,
    batch_size: int = 32,
    memory_size: int = 500,
    test_fraction: float = 0.2,
    image_size: int = 0,
    channels: Literal[1, 3] = 3,
    cache_dir: str | Path | None = None,
) -> OwnFiles:
    """root/train/<class>/*.jpg, and root/test if there is one, as a class-incremental scenario.

    Args:
        root: The folder.
        n_experiences: See `from_arrays`.
        backbone: Default: the slim ResNet-18.
        epochs: See `from_arrays`.
        batch_size: See `from_arrays`.
        memory_size: See `from_arrays`.
        test_fraction: Part of each class that is for testing where there is no test folder.
        image_size: Side in pixels: centred square, resized; 0: the first image's size.
        channels: 3 (RGB) or 1 (luma).
        cache_dir: Where decoded images are kept; None: the user's cache folder.

    Raises:
        UserError: If the folder does not look like that.
    """
    files = train_and_test(chosen(Path(root)), test_fraction)
    return OwnFiles(
        root=Path(root),
        entries=files.entries,
        class_names=files.class_names,
        backbone=backbone or SlimResNet18(),
        n_experiences=n_experiences,
        epochs=epochs,
        batch_size=batch_size,
        memory_size=memory_size,
        image_size=image_size,
        channels=channels,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )


def from_frame(
    frame: pd.DataFrame,
    *,
    label: str = "label",
    path: str = "path",
    values: Sequence[str] | None = None,
    shape: tuple[int, ...] | None = None,
    part: str | None = None,
    root: str | Path = ".",
    n_experiences: int = 5,
    backbone: Backbone | None = None,
    epochs: int = 5,
    batch_size: int = 32,
    memory_size: int = 500,
    test_fraction: float = 0.2,
    image_size: int = 0,
    channels: Literal[1, 3] = 3,
    cache_dir: str | Path | None = None,
) -> OwnArrays | OwnFiles:
    """A DataFrame as a class-incremental scenario, one row a sample.

    Args:
        frame: With a column of labels, and one of paths or several of values.
        label: Column of the labels.
        path: Column of image files, below `root`; not looked at where `values` is given.
        values: Columns of pixels (whole numbers from 0 to 255) or of features (floats).
        shape: Of the pixels in a row: (H, W) or (H, W, C); None: the values are a vector.
        part: Column that says "train" or "test"; None: `test_fraction` of each class is for
            testing, always the same rows.
        root: Folder of the image files.
        n_experiences: See `from_arrays`.
        backbone: See `from_arrays` and `from_folder`.
        epochs: See `from_arrays`.
        batch_size: See `from_arrays`.
        memory_size: See `from_arrays`.
        test_fraction: See `part`.
        image_size: See `from_folder`.
        channels: See `from_folder`.
        cache_dir: See `from_folder`.

    Raises:
        UserError: If a column is missing or holds something else.
    """
    labels = _labels(_column(frame, label))
    testing = None if part is None else _testing(_column(frame, part), part)
    if values is not None:
        cells = _cells(frame, values, shape)
        rest = slice(None) if testing is None else ~testing
        return from_arrays(
            cells[rest],
            labels[rest],
            None if testing is None else cells[testing],
            None if testing is None else labels[testing],
            n_experiences=n_experiences,
            backbone=backbone,
            epochs=epochs,
            batch_size=batch_size,
            memory_size=memory_size,
            test_fraction=test_fraction,
            layout="channels_last" if shape is not None and len(shape) == 3 else "auto",
        )
    folder = chosen(Path(root))
    names, targets = np.unique(labels, return_inverse=True)
    if testing is None:
        testing = np.zeros(len(labels), dtype=bool)
        testing[held_out(torch.from_numpy(targets), test_fraction, "test")[1].numpy()] = True
    files = (_below(folder, str(name)) for name in _column(frame, path))
    entries = map(Entry, files, targets.tolist(), testing.tolist())
    return OwnFiles(
        root=folder,
        entries=tuple(entries),
        class_names=tuple(str(name) for name in names.tolist()),
        backbone=backbone or SlimResNet18(),
        n_experiences=n_experiences,
        epochs=epochs,
        batch_size=batch_size,
        memory_size=memory_size,
        image_size=image_size,
        channels=channels,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )


def _samples(values: ArrayLike, name: str, layout: Layout) -> Tensor:
    """uint8 or float32 [N, C, H, W]; vectors as images of one pixel with D channels."""
    array = np.asarray(values)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise UserError(
            f"{name} has type {array.dtype}. Give uint8 images (0 to 255), or floats that the "
            "model gets as they are; other whole numbers: array.astype('uint8')."
        )
    if array.ndim not in (2, 3, 4) or not array.size:
        raise UserError(
            f"{name} has shape {array.shape}. Give images [N, H, W], [N, H, W, C] or [N, C, H, W], "
            "or vectors [N, D], at least one."
        )
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds numbers that are not finite. Fill or drop them.")
    samples = torch.from_numpy(np.ascontiguousarray(array))
    if array.ndim == 2:
        return samples[:, :, None, None]
    if array.ndim == 3:
        return samples[:, None]
    if layout == "auto":
        first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
        if first == last:
            raise UserError(
                f"{name} has shape {array.shape}: are the channels in front or last? Say "
                "layout='channels_first' or layout='channels_last'."
            )
        layout = "channels_first" if first else "channels_last"
    return samples if layout == "channels_first" else samples.permute(0, 3, 1, 2).contiguous()


def _labels(values: ArrayLike) -> NDArray[Any]:
    labels = np.asarray(values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "O":
        labels = labels.astype(str)
    if labels.ndim != 1 or labels.dtype.kind not in "biuUS":
        raise UserError(
            f"The labels have shape {labels.shape} and type {labels.dtype}. Give one whole number "
            "or text for each sample."
        )
    return labels


def _same_length(part: str, images: Tensor, labels: NDArray[Any]) -> None:
    if len(images) != len(labels):
        raise UserError(f"There are {len(images)} {part}_images and {len(labels)} {part}_labels.")


def _test_part(
    images: ArrayLike, labels: ArrayLike, layout: Layout, train: Tensor, names: NDArray[Any]
) -> TensorSource:
    samples, found = _samples(images, "test_images", layout), _labels(labels)
    _same_length("test", samples, found)
    if samples.shape[1:] != train.shape[1:] or samples.dtype != train.dtype:
        raise UserError(
            f"test_images are {samples.dtype} {list(samples.shape[1:])} each (channels first), "
            f"train_images {train.dtype} {list(train.shape[1:])}. Give both alike."
        )
    unknown = sorted(set(np.unique(found).tolist()) - set(names.tolist()))
    if unknown:
        raise UserError(f"test_labels has the class {unknown[0]!r}, which train_labels has not.")
    return TensorSource(samples, torch.from_numpy(np.searchsorted(names, found).astype(np.int64)))


def _described(train: TensorSource, test: TensorSource, names: Sequence[str]) -> Images:
    if train.inputs.dtype == torch.uint8:
        mean, std = channel_statistics(train.inputs)
    else:
        channels = train.inputs.shape[1]
        mean, std = [0.0] * channels, [1.0] * channels
    return Images(train, test, names, mean, std)


def _digest(*sources: TensorSource) -> str:
    digest = hashlib.sha256()
    for source in sources:
        for part in (source.inputs, source.targets):
            digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def _reader(image_shape: tuple[int, int, int]) -> Backbone:
    return MLP() if min(image_shape[1:]) < _SMALL else SlimResNet18()


def _column(frame: pd.DataFrame, name: str) -> NDArray[Any]:
    if name not in frame.columns:
        guess = did_you_mean(name, map(str, frame.columns))
        raise UserError(f"The DataFrame has no column {name!r}. {guess}")
    if frame[name].isna().any():
        raise UserError(f"Column {name!r} has empty cells. Fill them or drop their rows.")
    return np.asarray(frame[name])


def _cells(
    frame: pd.DataFrame, values: Sequence[str], shape: tuple[int, ...] | None
) -> NDArray[Any]:
    """The values of every row, uint8 in this shape, or float vectors."""
    columns = [_column(frame, name) for name in values]
    cells = np.stack(columns, axis=1)
    if shape is None:
        return cells.astype(np.float32)
    if len(shape) not in (2, 3) or int(np.prod(shape)) != len(values):
        raise UserError(
            f"{len(values)} columns of values can't be images of shape {shape}. Give (H, W) or "
            "(H, W, C)."
        )
    if cells.dtype.kind == "f":
        return cells.reshape(-1, *shape)
    if cells.min() < 0 or cells.max() > 255:
        raise UserError(f"Pixels from {cells.min()} to {cells.max()}: they must lie in 0 to 255.")
    return cells.astype(np.uint8).reshape(-1, *shape)


def _testing(values: NDArray[Any], column: str) -> NDArray[np.bool_]:
    other = sorted({str(value) for value in values} - {"train", "test"})
    if other:
        raise UserError(f"Column {column!r} says {other[0]!r}; it may say 'train' or 'test'.")
    testing: NDArray[np.bool_] = np.array([str(value) == "test" for value in values])
    return testing


def _below(root: Path, name: str) -> str:
    """A file's path below the root, parts joined by "/"."""
    place = os.path.relpath(root / name, root)
    if place.startswith(os.pardir):
        raise UserError(f"{name} is not below {root}. Set root to a folder that has all files.")
    return Path(place).as_posix()
