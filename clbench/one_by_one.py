"""Samples that come one at a time, as a library's datasets give them, in one array."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench import machine
from clbench.errors import UserError
from clbench.samples import MappedSource, Source, TensorSource
from clbench.types import Split

#: Of what tuning gets, the part that it tests on.
_TUNING_TEST = 0.2
#: Samples of each dataset by which a transform is known.
_PROBES = 256
#: Differences between inputs, which are of order one, that are rounding.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Views:
    """One labelled dataset in three ways; each gives tuples that begin with the sample.

    Attributes:
        plain: Without any transform.
        tested: With the transform of evaluation.
        learned: With the transform of training.
        labels: Of each sample.
    """

    plain: Sequence[Any]
    tested: Sequence[Any]
    learned: Sequence[Any]
    labels: Sequence[int]


class Stored:
    """All samples of some datasets in one array, and what is known about them.

    Args:
        datasets: Of the training experiences, then of the tests.
        n_train: How many are of the former.

    Attributes:
        source: The samples, labels as in the datasets.
        train: Positions of each training experience.
        test: Positions of each test.
        shape: Of one sample, (C, H, W).
        scaling: Mean and standard deviation by which stored pixels become inputs; None: the
            stored floats are the inputs.
        facts: For the result file.
    """

    def __init__(self, datasets: Sequence[Views], n_train: int) -> None:
        probes = [
            (views, i)
            for views in datasets
            for i in range(0, len(views.plain), -(-len(views.plain) // _PROBES))
        ]
        plain, tested = [v.plain[i][0] for v, i in probes], [v.tested[i][0] for v, i in probes]
        self.scaling = _scaling(plain, tested)
        self._read(datasets)
        sizes = [len(views.plain) for views in datasets]
        positions = torch.arange(sum(sizes)).split(sizes)
        self.train, self.test = positions[:n_train], positions[n_train:]
        learning = {id(views) for views in datasets[:n_train]}
        same = all(
            _alike(views.learned[i][0], shown)
            for (views, i), shown in zip(probes, tested, strict=True)
            if id(views) in learning
        )
        self.facts = {
            "stored": "pixels" if self.scaling else "inputs",
            "training_transform": "that of evaluation" if same else "left out",
        }

    def _read(self, datasets: Sequence[Views]) -> None:
        """Every sample once, and the digest of its content before any transform."""
        first = self._sample(datasets[0], 0)
        self.shape = tuple(first.shape)
        count = sum(len(views.plain) for views in datasets)
        out = _room((count, *self.shape), np.uint8 if self.scaling else np.float32)
        labels = torch.empty(count, dtype=torch.int64)
        self.contents = np.empty(count, "S12")
        row = 0
        for views in datasets:
            for i in range(len(views.plain)):
                sample, content = self._sample(views, i), views.plain[i][0]
                if sample.shape != self.shape:
                    raise UserError(
                        f"The benchmark's samples have different shapes, {list(self.shape)} and "
                        f"{list(sample.shape)}. Give it transforms that resize them."
                    )
                out[row], labels[row] = sample.numpy(), int(views.labels[i])
                self.contents[row] = hashlib.blake2b(_bytes(content), digest_size=12).digest()
                row += 1
        if isinstance(out, np.memmap):
            self.source: Source = MappedSource(out, labels)
        else:
            self.source = TensorSource(torch.from_numpy(out), labels)

    def _sample(self, views: Views, position: int) -> Tensor:
        """One sample as it is stored, [C, H, W]."""
        if self.scaling:
            pixels = _pixels(views.plain[position][0])
            if pixels is None:
                raise UserError("Some of the benchmark's samples are 8-bit images, some are not.")
            return pixels
        value = views.tested[position][0]
        if not isinstance(value, Tensor) or value.ndim not in (1, 2, 3):
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"The benchmark's samples are {what}. They must be images or vectors: tensors "
                "[C, H, W], [H, W] or [D]."
            )
        shapes = {1: (-1, 1, 1), 2: (1, *value.shape), 3: value.shape}
        return value.detach().float().reshape(shapes[value.ndim])

    def classes(self, *parts: Tensor) -> list[int]:
        """The labels in these parts, ascending."""
        return sorted(set(self.source.targets[torch.cat(parts)].tolist()))

    def divided(self, split: Split, fraction: float) -> tuple[list[Tensor], list[Tensor]]:
        """Positions to learn from and to be tested on, for each experience."""
        everything = torch.cat([*self.train])
        tuning, checking = torch.zeros(2, len(self.source), dtype=torch.bool)
        for label in self.classes(everything) if fraction else ():
            mine = everything[self.source.targets[everything] == label]
            found, which = np.unique(self.contents[mine.numpy()], return_inverse=True)
            # The order of digests is as good as random, and the same for every class order.
            taken = max(1, round(fraction * len(found)))
            tested = max(1, round(_TUNING_TEST * taken))
            place = torch.from_numpy(which)
            tuning[mine[place < taken]] = True
            checking[mine[place < tested]] = True
        if split is Split.EVALUATE:
            return [part[~tuning[part]] for part in self.train], list(self.test)
        learn = tuning & ~checking
        return (
            [part[learn[part]] for part in self.train],
            [part[checking[part]] for part in self.train],
        )


def _scaling(
    raw: Sequence[Any], shown: Sequence[Any]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation by which `shown` is `raw` normalised; None: it is not so.

    Args:
        raw: Samples before any transform.
        shown: The same after the transform of evaluation.
    """
    pixels = [_pixels(value) for value in raw]
    if pixels[0] is None or any(p is None or p.shape != pixels[0].shape for p in pixels):
        return None
    x = torch.stack([p for p in pixels if p is not None]).double().div(255)
    if not all(isinstance(value, Tensor) and value.shape == x.shape[1:] for value in shown):
        return None
    y = torch.stack([*shown]).double()
    mean, std = [], []
    for a, b in zip(x.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1), strict=True):
        spread = (a - a.mean()).square().sum()
        if not spread:
            return None
        slope = ((a - a.mean()) * (b - b.mean())).sum() / spread
        shift = b.mean() - slope * a.mean()
        if slope <= 0 or (slope * a + shift - b).abs().max() > _ROUNDING:
            return None
        mean.append(float(-shift / slope))
        std.append(float(1 / slope))
    return tuple(mean), tuple(std)


def _pixels(value: Any) -> Tensor | None:
    """uint8 [C, H, W] of an image of any usual kind; None where that would lose something."""
    if isinstance(value, Tensor):
        if value.dtype == torch.uint8:
            return value if value.ndim == 3 else value[None] if value.ndim == 2 else None
        grey = (255 * value).round() if value.is_floating_point() and value.ndim == 3 else None
        if grey is None or (grey - 255 * value).abs().max() > 255 * _ROUNDING:
            return None
        return grey.to(torch.uint8) if grey.min() >= 0 and grey.max() <= 255 else None
    array = np.array(value)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        return None
    image = torch.from_numpy(array)
    return image[None] if array.ndim == 2 else image.permute(2, 0, 1)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, atol=_ROUNDING)
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def _bytes(value: Any) -> bytes:
    array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
    return bytes(np.ascontiguousarray(array).tobytes())


def _room(shape: tuple[int, ...], kind: type[Any]) -> NDArray[Any]:
    """An array in memory, or in a nameless file if it is too large."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    if size <= machine.available_memory() / 2:
        return np.empty(shape, kind)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, kind, "w+", shape=shape)
