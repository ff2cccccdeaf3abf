"""Datasets of Hugging Face's library `datasets`: a folder or a name in, labelled rows out.

The only file that imports it, and only when something of it is used.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench import hub
from clbench.archives import kept_inside
from clbench.errors import UserError, did_you_mean
from clbench.foreign import quietly
from clbench.image_files import Pixels, decoded, statistics
from clbench.nn.weights import brief

#: Files that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave.
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Table:
    """A dataset: rows in splits.

    Attributes:
        where: The folder or name, for messages.
        splits: `datasets.Dataset` by the name of the split.
        identity: What tells its content from another's: plain data.
    """

    where: str
    splits: Mapping[str, Any]
    identity: Mapping[str, Any]

    def split(self, name: str, option: str) -> Any:
        """One split.

        Raises:
            UserError: If there is none of this name.
        """
        if name not in self.splits:
            guess = did_you_mean(name, self.splits)
            raise UserError(f"{option}={name}: {self.where} has no such split. {guess}")
        return self.splits[name]


def opened(
    path: str, configuration: str | None, revision: str | None, cache_dir: Path | None = None
) -> Table:
    """A dataset in a folder, or of the hub.

    A folder is what `save_to_disk` wrote, or files that `datasets` recognises: a folder of
    images with one folder a class, Parquet, CSV, JSON. Of the hub's datasets the commit is part of
    the identity; of a folder the names and sizes of its files. Code of a dataset is never run.

    Args:
        path: The folder, or "owner/name".
        configuration: Which of the dataset's configurations; None: its only or default one.
        revision: Branch, tag or commit, of the hub alone; None: the newest.
        cache_dir: Where the library keeps what it makes of files; None: where it always does.

    Raises:
        UserError: If the package is missing, or there is no such dataset, or no network.
    """
    datasets = _needed()
    folder = Path(path).expanduser()
    kept = None if cache_dir is None else str(cache_dir / "huggingface")
    if folder.is_dir():
        with _understood(path), kept_inside():
            if any((folder / name).is_file() for name in _SAVED):
                found = datasets.load_from_disk(str(folder))
            else:
                found = datasets.load_dataset(str(folder), configuration, cache_dir=kept)
        return Table(path, _splits(found), {"files": _names_and_sizes(folder)})
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"There is no folder {folder.absolute()}. Set scenario.path to a folder that holds a "
            "dataset, or to the name of one on the Hugging Face hub, as in owner/name."
        )
    commit = _commit(path, revision)
    with _understood(path), hub.verified(path, "dataset"), kept_inside():
        found = datasets.load_dataset(
            path, configuration, revision=commit or revision, cache_dir=kept
        )
    return Table(path, _splits(found), {"name": path, "commit": commit or revision})


def column(rows: Any, name: str, kind: str, option: str, where: str) -> str:
    """The column of a kind: the one that is named, or the only one there is.

    Args:
        rows: A `datasets.Dataset`.
        name: Its name; "": the only one of its kind.
        kind: Class of a feature, "Image" or "ClassLabel".
        option: Which names it, for messages.
        where: The dataset, for messages.

    Raises:
        UserError: If there is none, or several.
    """
    if name:
        if name not in rows.features:
            guess = did_you_mean(name, rows.features)
            raise UserError(f"{option}={name}: {where} has no such column. {guess}")
        return name
    found = [key for key, feature in rows.features.items() if type(feature).__name__ == kind]
    if len(found) == 1:
        return str(found[0])
    there = ", ".join(f"{k} ({type(f).__name__})" for k, f in rows.features.items())
    what = f"several columns of type {kind}" if found else f"no column of type {kind}"
    raise UserError(f"{where} has {what}; set {option} to one of: {there}.")


def labels(splits: Sequence[Any], name: str) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Labels of each split, numbered alike, and the names of the classes.

    Args:
        splits: `datasets.Dataset`s, the first with samples of every class.
        name: The column: of type ClassLabel, whole numbers or texts.

    Raises:
        UserError: If a value is hidden, missing, or no label.
    """
    feature = splits[0].features[name]
    plain = type(feature).__name__ in ("ClassLabel", "Value")  # an image would be decoded
    values = [np.asarray(split[name][:]) if plain else np.empty(0) for split in splits]
    for part in values:
        if part.dtype.kind not in "biuU" or (part.dtype.kind == "i" and (part < 0).any()):
            raise UserError(
                f"Column {name!r} holds values that are no label (hidden, missing, or no whole "
                "number or text). Choose another column, or another split for testing."
            )
    if type(feature).__name__ == "ClassLabel":
        return [part.astype(np.int64) for part in values], [str(n) for n in feature.names]
    names = np.unique(values[0])
    unknown = sorted(set(np.concatenate(values).tolist()) - set(names.tolist()))
    if unknown:
        raise UserError(f"Column {name!r} has {unknown[0]!r} in the test split alone.")
    return [np.searchsorted(names, part).astype(np.int64) for part in values], [
        str(name) for name in names.tolist()
    ]


def images(splits: Sequence[Any], name: str, image_size: int, channels: int) -> dict[str, Any]:
    """All images, decoded.

    Args:
        splits: `datasets.Dataset`s, those to train on first.
        name: The column.
        image_size: Side in pixels: centred square, resized; 0: the first image's size.
        channels: 3 (RGB) or 1 (luma).

    Returns:
        images: uint8 [N, channels, H, W]; mean, std: of the first split, [channels], of 1.

    Raises:
        UserError: If one can't be decoded.
    """
    datasets = _needed()
    encoded = [split.cast_column(name, datasets.Image(decode=False)) for split in splits]
    total = sum(map(len, encoded))
    size = (image_size, image_size) if image_size else None
    made: Pixels | None = None
    for place, (data, source) in enumerate(_encoded(encoded, name)):
        found = decoded(data, channels, size)
        if isinstance(found, str):
            raise UserError(f"Image {place} of column {name!r} ({source}) is damaged: {found}.")
        if made is None:
            made = np.empty((total, *found[0].shape), np.uint8)
            size = found[0].shape[2], found[0].shape[1]
        made[place] = found[0]
    if made is None:
        raise UserError(f"Column {name!r} has no image.")
    mean, std = statistics(made, np.arange(len(splits[0])))
    return {"images": made, "mean": mean, "std": std}


def texts(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows, with the names of classes in place of their numbers."""
    kinds = rows.features.items()
    named = {key: f for key, f in kinds if type(f).__name__ == "ClassLabel"}
    for row in rows:
        given = {key: f.int2str(row[key]) for key, f in named.items() if row[key] is not None}
        yield {**row, **given}


def _encoded(splits: Sequence[Any], name: str) -> Iterator[tuple[bytes, str]]:
    for split in splits:
        for row in split.select_columns([name]):
            image = row[name] or {}
            path = str(image.get("path") or "")
            data = image.get("bytes")
            if data is None:
                data = Path(path).read_bytes() if Path(path).is_file() else b""
            yield data, path


def _splits(found: Any) -> dict[str, Any]:
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def _needed() -> Any:
    try:
        with quietly():
            return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise UserError(
            f"This needs the package {error.name}, which is not installed. "
            "Install it with: pip install 'clbench[huggingface]'"
        ) from error


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a name stands for; None where HF_HUB_OFFLINE forbids to ask."""
    try:
        return hub.commit(name, "dataset", revision)
    except hub.Unreachable as error:
        raise UserError(
            f"{name!r} is no folder, and the Hugging Face hub can't be reached ({error}). "
            "Where there is a network: load_dataset(...).save_to_disk('FOLDER'); then set "
            "scenario.path=FOLDER. Datasets in the hub's own cache: HF_HUB_OFFLINE=1."
        ) from error


@contextmanager
def _understood(where: str) -> Iterator[None]:
    """What `datasets` says of a dataset as a message; its log and its bars stay out of ours."""
    datasets = importlib.import_module("datasets")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with quietly(), hub.quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # its builders raise whatever their readers meet
        raise UserError(f"The dataset {where} can't be loaded: {brief(error)}.") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _names_and_sizes(folder: Path) -> str:
    """SHA-256 of names and sizes of all files, and of the small ones that describe the rest."""
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = Path(place, file)
            name = path.relative_to(folder).as_posix()
            digest.update(os.fsencode(f"{name}\0{path.stat().st_size}\n"))
            if file in ("state.json", "dataset_info.json"):
                digest.update(path.read_bytes())
    return digest.hexdigest()
