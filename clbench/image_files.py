"""Folders of image files: listed, decoded once into one array, and kept."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench import cache
from clbench.classification import Images
from clbench.division import selected
from clbench.errors import UserError
from clbench.machine import available_cores, available_memory
from clbench.progress import counting
from clbench.rows import Rows
from clbench.samples import MappedSource, ReadSource, Source, TensorSource

Pixels = NDArray[np.uint8]

#: What a file with such a name may hold; Pillow is asked for nothing else.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")

_VERSION = 1
_CHUNK = 64
_MANY = 5
_LONGEST = 100


class Entry(NamedTuple):
    """One image file.

    Attributes:
        name: Path below the root, parts joined by "/".
        label: Its class.
        testing: Whether it belongs to the test part.
    """

    name: str
    label: int
    testing: bool


@dataclass(frozen=True)
class ImageFiles:
    """The labelled image files below one folder, training files first, each part by name.

    Attributes:
        root: The folder.
        entries: The files.
        sizes: Bytes of each file.
        class_names: Name of each label.
    """

    root: Path
    entries: tuple[Entry, ...]
    sizes: tuple[int, ...]
    class_names: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, labels and parts; where the root lies is no part of it.

        A file that is replaced by another one of exactly its size goes unnoticed.
        """
        digest = hashlib.sha256()
        for (name, label, testing), size in zip(self.entries, self.sizes, strict=True):
            digest.update(os.fsencode(name) + f"\0{size}\0{label}\0{testing:d}\n".encode())
        return digest.hexdigest()

    @property
    def n_train(self) -> int:
        """Training files."""
        return sum(not entry.testing for entry in self.entries)

    def first_of_each_class(self, train: int, test: int) -> ImageFiles:
        """So many files of each class in either part, the first by name; 0: all of them."""
        seen: Counter[tuple[int, bool]] = Counter()
        kept = []
        for i, (_, label, testing) in enumerate(self.entries):
            seen[label, testing] += 1
            limit = test if testing else train
            if limit == 0 or seen[label, testing] <= limit:
                kept.append(i)
        return replace(
            self,
            entries=tuple(self.entries[i] for i in kept),
            sizes=tuple(self.sizes[i] for i in kept),
        )


def listed(root: Path, entries: Iterable[Entry], class_names: Sequence[str]) -> ImageFiles:
    """The files with their sizes, in order.

    Raises:
        UserError: If one is not there.
    """
    return sized(root, sorted(entries, key=lambda e: (e.testing, e.name)), class_names)


def sized(root: Path, ordered: Sequence[Entry], class_names: Sequence[str]) -> ImageFiles:
    """As `listed`, in an order of the caller's, which only `pixels` and `FileSource` may get."""
    sizes = []
    for entry in ordered:
        try:
            sizes.append((root / entry.name).stat().st_size)
        except OSError as error:
            raise UserError(
                f"{root / entry.name} should be there, but {error.strerror}. "
                "Unpack the dataset again; it is incomplete."
            ) from error
    return ImageFiles(root, tuple(ordered), tuple(sizes), tuple(class_names))


def load(
    files: ImageFiles,
    image_size: int,
    channels: int,
    cache_dir: Path | None,
    skip_corrupt: bool,
) -> Images:
    """All images, decoded at the first call and then read from the cache folder.

    Where the array takes more than half of the memory that is free, it stays on disk. JPEG's
    EXIF orientation is not applied, transparency is dropped, as torchvision does.

    Args:
        files: Which files.
        image_size: Side in pixels; an image of another shape is cut to a centred square and
            resized (bicubic, antialiased). 0: the size of the first image; others are cut to
            its aspect ratio and resized.
        channels: 3 (RGB) or 1 (luma).
        cache_dir: The cache folder; None: the user's.
        skip_corrupt: Leave files out that can't be decoded, and count them.

    Returns:
        The dataset, its normalisation computed from the training images.

    Raises:
        UserError: If files can't be decoded and may not be skipped, or can't be read at all.
    """
    stored = _stored(files, image_size, channels, cache_dir, skip_corrupt)
    labels = torch.tensor([entry.label for entry in files.entries])
    n, same = files.n_train, torch.arange(len(files.class_names))
    readable = torch.from_numpy(stored["readable"])
    train, test = (
        selected(_source(stored["images"], labels, part), keep.nonzero().flatten(), same)
        for part, keep in ((slice(n), readable[:n]), (slice(n, None), readable[n:]))
    )
    facts = {
        "files": len(files.entries),
        "files_sha256": files.fingerprint,
        "resized_files": int(stored["resized"].sum()),
        "skipped_corrupt_files": int((~readable).sum()),
    }
    mean, std = stored["mean"].tolist(), stored["std"].tolist()
    return Images(train, test, files.class_names, mean, std, facts)


def pixels(
    files: ImageFiles, image_size: int, channels: int, cache_dir: Path | None, border: float = 0.0
) -> Pixels:
    """All images as one array in the order of the files, mapped from the cache folder.

    Args:
        files: Which files, in any order.
        image_size: See `load`.
        channels: See `load`.
        cache_dir: See `load`.
        border: Part of each side that is cut off an image of another shape, before `load`'s cut.

    Returns:
        uint8 [N, channels, H, W].

    Raises:
        UserError: If a file can't be decoded or read.
    """
    return _stored(files, image_size, channels, cache_dir, False, border)["images"]


class FileSource(ReadSource):
    """Image files that are decoded each time that they are asked for: nothing is kept.

    Args:
        files: Which files, in any order.
        image_size: Side in pixels; see `load`.
        border: See `pixels`.
        targets: Labels, where they are served; default: those of the files, on the CPU.
    """

    def __init__(
        self, files: ImageFiles, image_size: int, border: float = 0.0, targets: Tensor | None = None
    ) -> None:
        self.files, self.image_size, self.border = files, image_size, border
        labels = torch.tensor([entry.label for entry in files.entries], dtype=torch.int64)
        self.targets = labels if targets is None else targets

    def read(self, index: Tensor) -> Tensor:
        size = self.image_size, self.image_size
        rows = index.tolist()
        out = np.empty((len(rows), 3, *size), np.uint8)

        def fill(place: int) -> None:
            path = self.files.root / self.files.entries[rows[place]].name
            found = _read(path, 3, size, self.border)
            if isinstance(found, str):
                raise UserError(f"{path} can't be decoded: {found}. Replace it.")
            out[place] = found[0]

        with ThreadPoolExecutor(available_cores()) as pool:
            for _ in pool.map(fill, range(len(rows))):
                pass
        return torch.from_numpy(out)

    def to(self, device: torch.device) -> Source:
        if device == self.device:
            return self
        return FileSource(self.files, self.image_size, self.border, self.targets.to(device))


def _stored(
    files: ImageFiles,
    image_size: int,
    channels: int,
    cache_dir: Path | None,
    skip_corrupt: bool,
    border: float = 0.0,
) -> dict[str, NDArray[Any]]:
    """What `decode` makes, from the cache folder."""
    folder = cache_dir or cache.default_folder()
    key = {
        "version": _VERSION,
        "files": files.fingerprint,
        "image_size": image_size,
        "channels": channels,
        **({"border": border} if border else {}),
        **_decoder(),
    }

    def make(lend: cache.Lend) -> dict[str, NDArray[Any] | Rows]:
        with counting(f"decoding {files.root.name}", "images") as tell:
            made = decode(files, image_size, channels, _room(lend, folder), tell, border)
            _refuse(files, made, skip_corrupt)
            return made

    stored = cache.filled(folder, "images", key, make)
    _refuse(files, stored, skip_corrupt)
    return stored


def decode(
    files: ImageFiles,
    image_size: int,
    channels: int,
    room: Callable[[tuple[int, ...]], Pixels | Rows],
    tell: Callable[[int, int], None],
    border: float = 0.0,
) -> dict[str, NDArray[Any] | Rows]:
    """Every file as pixels.

    Args:
        files: Which files.
        image_size: See `load`.
        channels: See `load`.
        room: Makes the array to fill.
        tell: Told the number of files done and of all.
        border: See `pixels`.

    Returns:
        images: uint8 [N, channels, H, W]; zeros where a file can't be decoded.
        readable: bool [N].
        reasons: Why the others are not, text [N - readable].
        resized: bool [N].
        mean, std: Of the readable training images, [channels], of 1.

    Raises:
        UserError: If the system refuses a file, or none can be decoded.
    """
    n = len(files.entries)
    paths = [files.root / entry.name for entry in files.entries]
    height, width = (image_size, image_size) if image_size else _first_size(paths)
    images = room((n, channels, height, width))
    resized, reasons = np.zeros(n, bool), dict[int, str]()

    def fill(start: int) -> int:
        for i in range(start, min(start + _CHUNK, n)):
            found = _read(paths[i], channels, (width, height), border)
            if isinstance(found, str):
                reasons[i] = found
            else:
                images[i], resized[i] = found
        return min(_CHUNK, n - start)

    pool, done = ThreadPoolExecutor(available_cores()), 0
    try:
        for future in as_completed([pool.submit(fill, start) for start in range(0, n, _CHUNK)]):
            done += future.result()
            tell(done, n)
    finally:
        pool.shutdown(cancel_futures=True)
    readable = np.array([i not in reasons for i in range(n)])
    mean, std = statistics(images, readable[: files.n_train].nonzero()[0])
    return {
        "images": images,
        "readable": readable,
        "reasons": np.array([reasons[i] for i in sorted(reasons)], np.str_),
        "resized": resized,
        "mean": mean,
        "std": std,
    }


def statistics(
    images: Pixels | Rows, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation per channel, in [0, 1], from exact counts of the grey levels.

    Args:
        images: uint8 [N, C, H, W]; may be larger than the memory.
        rows: The images that count.
    """
    counts = np.zeros((images.shape[1], 256), np.int64)
    for start in range(0, len(rows), _CHUNK):
        chunk = images[rows[start : start + _CHUNK]]
        for channel, histogram in enumerate(counts):
            histogram += np.bincount(chunk[:, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    return mean, np.sqrt(variance).clip(1e-3)


def _refuse(files: ImageFiles, made: Mapping[str, Any], skip_corrupt: bool) -> None:
    bad, n = (~made["readable"]).nonzero()[0].tolist(), len(files.entries)
    if not bad or (skip_corrupt and len(bad) < n):
        return
    named = ", ".join(
        f"{files.root / files.entries[i].name} ({why})"
        for i, why in zip(bad[:_MANY], made["reasons"].tolist(), strict=False)
    )
    more = f" and {len(bad) - _MANY} more" if len(bad) > _MANY else ""
    advice = "Replace or delete them"
    if len(bad) < n:
        advice += ", or set scenario.skip_corrupt=true to leave them out"
    raise UserError(f"{len(bad)} of {n} image files can't be decoded: {named}{more}. {advice}.")


def _first_size(paths: Sequence[Path]) -> tuple[int, int]:
    """Height and width of the first image that can be decoded; (1, 1) where none can."""
    for path in paths:
        found = _read(path, 1, None)
        if not isinstance(found, str):
            return found[0].shape[1], found[0].shape[2]
    return 1, 1


def _read(
    path: Path, channels: int, size: tuple[int, int] | None, border: float = 0.0
) -> tuple[Pixels, bool] | str:
    """`decoded` for a file; raises `UserError` if the system refuses it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"Can't read {path}: {error.strerror}.") from error
    return decoded(data, channels, size, border)


def decoded(
    data: bytes, channels: int, size: tuple[int, int] | None, border: float = 0.0
) -> tuple[Pixels, bool] | str:
    """Pixels [C, H, W] and whether they were resized; or why the data can't be decoded.

    Args:
        data: Content of an image file.
        channels: 3 or 1.
        size: Wanted (width, height); None: as it is.
        border: See `pixels`.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.mode.startswith(("I", "F")):
                return "more than 8 bits a channel"
            image = file.convert("RGBA") if "transparency" in file.info else file
            image = image.convert("RGB" if channels == 3 else "L")
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises whatever its decoders meet in a damaged file
        return f"{type(error).__name__}: {error}"[:_LONGEST] if data else "empty"
    other = size is not None and image.size != size
    if size is not None and other:
        image = ImageOps.fit(image, size, Image.Resampling.BICUBIC, border)
    array = np.asarray(image)
    return (array.transpose(2, 0, 1) if channels == 3 else array[None]), other


def _source(images: Pixels, labels: Tensor, part: slice) -> Source:
    """Some of the images, mapped ones; where all together are large, they stay in their file."""
    if images.nbytes <= available_memory() / 2:
        return TensorSource(torch.from_numpy(images[part]), labels[part])
    return MappedSource(Rows.behind(images), labels[part], torch.arange(len(labels))[part])


def _room(lend: cache.Lend, folder: Path) -> Callable[[tuple[int, ...]], Rows]:
    """Makes the rows to decode into, in the cache folder."""

    def room(shape: tuple[int, ...]) -> Rows:
        try:
            return lend("images", shape, np.uint8)
        except OSError as error:
            raise UserError(
                f"{shape[0]} decoded images of {shape[3]}x{shape[2]} pixels take "
                f"{np.prod(shape) / 1e9:.1f} GB, which {folder} can't hold: {error.strerror}. "
                "Set a smaller scenario.image_size, or cache_dir to a larger disk."
            ) from error

    return room


def _decoder() -> Mapping[str, str | None]:
    """What decides the pixels besides the files."""
    from PIL import __version__, features

    return {"pillow": __version__, "jpeg": features.version("jpg")}
