"""Labelled data that can be drawn in batches without per-sample Python."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench.nn.transforms import Transform
from clbench.rows import Rows


@dataclass(frozen=True)
class Batch:
    """Some samples, ready for the model.

    Attributes:
        inputs: What the model reads: augmented and normalised, [B, ...] float (or token ids).
        targets: Labels, [B] int64; empty ([0]) where they are withheld.
        raw: The samples as they are stored, before augmentation, [B, ...]; what a memory keeps.
        index: Position of each sample in its source, [B] int64: the identity of a sample.
    """

    inputs: Tensor
    targets: Tensor
    raw: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def unlabelled(self) -> Batch:
        """The same inputs with the labels withheld."""
        return Batch(self.inputs, self.targets.new_empty(0), self.raw, self.index)


class Source(ABC):
    """A store of samples: where they lie is its own business.

    Attributes:
        targets: Labels of all samples, [N] int64, on the device the source serves; [N, A] where a
            sample has several.
        lengths: How much of each sample is no padding, [N] int64, likewise; None: all of it.
    """

    targets: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def device(self) -> torch.device:
        """Where `gather` puts its samples."""
        return self.targets.device

    @abstractmethod
    def gather(self, index: Tensor) -> Tensor:
        """The stored samples at `index` ([B] int64 on the source's device), [B, ...] on it."""

    def ahead(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """What `gather` gives for each, in order; it may be got before it is asked for."""
        return map(self.gather, indices)

    @abstractmethod
    def to(self, device: torch.device) -> Source:
        """The same samples served on `device`; itself where nothing changes."""


class TensorSource(Source):
    """Samples held as one tensor on the device: the fast case, for data that fit.

    Args:
        inputs: All samples, [N, ...]; uint8 for images.
        targets: Their labels, [N] int64.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} samples but {len(targets)} targets")
        self.inputs, self.targets = inputs, targets

    def gather(self, index: Tensor) -> Tensor:
        return self.inputs.index_select(0, index)

    def to(self, device: torch.device) -> Source:
        if device == self.device:
            return self
        return TensorSource(self.inputs.to(device), self.targets.to(device))


class ReadSource(Source):
    """Samples that lie elsewhere than on a device, such as on a disk."""

    @abstractmethod
    def read(self, index: Tensor) -> Tensor:
        """The stored samples at `index`, [B, ...] in main memory; called from any thread."""

    def gather(self, index: Tensor) -> Tensor:
        return self.read(index).to(self.device)

    def ahead(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """See `Source.ahead`: while one is worked on, a thread reads the next.

        For a GPU it does so into pinned memory, from where nobody waits for the copy.
        """

        def read(index: Tensor) -> Tensor:
            found = self.read(index)
            return found.pin_memory() if self.device.type == "cuda" else found

        waiting: Future[Tensor] | None = None
        with ThreadPoolExecutor(1, "clbench-reader") as reader:
            for index in indices:
                found, waiting = waiting, reader.submit(read, index)
                if found is not None:
                    yield found.result().to(self.device, non_blocking=True)
            if waiting is not None:
                yield waiting.result().to(self.device, non_blocking=True)


class MappedSource(ReadSource):
    """Samples in an array on disk, for data that do not fit in memory.

    Args:
        inputs: A NumPy memory map, [M, ...], or better `Rows`, which keep nothing in memory.
        targets: Labels, [N] int64.
        rows: Where each sample lies in `inputs`, [N] int64 on the CPU; None: one after another.
    """

    def __init__(
        self, inputs: np.ndarray | Rows, targets: Tensor, rows: Tensor | None = None
    ) -> None:
        count = len(inputs if rows is None else rows)
        if count != len(targets):
            raise ValueError(f"{count} samples but {len(targets)} targets")
        self.inputs, self.targets, self.rows = inputs, targets, rows

    def read(self, index: Tensor) -> Tensor:
        positions = self._positions(index)
        if isinstance(self.inputs, Rows):
            out = self.inputs[positions]
        else:
            order = np.argsort(positions)  # in file order: sequential pages are read once
            out = np.empty((len(positions), *self.inputs.shape[1:]), self.inputs.dtype)
            out[order] = self.inputs[positions[order]]
        return torch.from_numpy(out)

    def _positions(self, index: Tensor) -> NDArray[np.int64]:
        index = index.cpu()
        positions: NDArray[np.int64] = (index if self.rows is None else self.rows[index]).numpy()
        return positions

    def to(self, device: torch.device) -> Source:
        if device == self.device:
            return self
        return MappedSource(self.inputs, self.targets.to(device), self.rows)


class Samples:
    """A selection of a source's samples, with the transform that makes them model inputs.

    Args:
        source: Where the samples lie.
        index: Which of them, [N] int64 on the source's device.
        transform: Augmentation and normalisation, applied to whole batches.
    """

    #: Bytes, as stored, of the samples that are gathered and augmented together, then cut into
    #: batches: few enough to stay in a CPU's cache when they have become floats.
    CHUNK = 2**20

    def __init__(self, source: Source, index: Tensor, transform: Transform) -> None:
        self.source, self.index, self.transform = source, index, transform

    def __len__(self) -> int:
        return len(self.index)

    @property
    def targets(self) -> Tensor:
        """Labels of the selection, [N] int64."""
        return self.source.targets[self.index]

    def to(self, device: torch.device) -> Samples:
        """The same selection served on `device`."""
        return Samples(self.source.to(device), self.index.to(device), self.transform)

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """A random order in which to cut batches: all positions, [N] int64.

        Where samples differ in length, those in a batch are about as long as each other.

        Args:
            batch_size: Samples in a batch.
            generator: On the device of the samples.
        """
        order = torch.randperm(len(self), generator=generator, device=self.index.device)
        if self.source.lengths is None:
            return order
        return neighbours(order, self.source.lengths[self.index], batch_size, generator)

    def subset(self, positions: Tensor) -> Samples:
        """The samples at `positions` ([M] int64) of this selection."""
        return Samples(self.source, self.index[positions.to(self.index.device)], self.transform)

    def take(self, positions: Tensor, augment: torch.Generator | None = None) -> Batch:
        """One batch.

        Args:
            positions: Which samples of this selection, [B] int64 on its device.
            augment: Draws the augmentation; None means the test-time transform.

        Returns:
            The batch, labels included.
        """
        index = self.index[positions]
        return self._batch(self.source.gather(index), index, augment)

    def _batch(self, raw: Tensor, index: Tensor, augment: torch.Generator | None) -> Batch:
        inputs = self.transform.test(raw) if augment is None else self.transform.train(raw, augment)
        return Batch(inputs, self.source.targets[index], raw, index)

    def batches(
        self, order: Tensor, batch_size: int, augment: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Batches in the given order; the last one may be short.

        Samples are gathered and transformed in chunks of many batches, so that a small
        batch costs a few slices and no more.

        Args:
            order: Positions to visit, [M] int64.
            batch_size: Samples in a batch.
            augment: Draws the augmentation; None means the test-time transform.
        """
        batch_bytes = self.source.gather(self.index[order[:1]]).nbytes * batch_size
        chunk = max(1, self.CHUNK // max(1, batch_bytes)) * batch_size
        chunks = self.index[order].split(chunk) if len(order) else ()
        for index, raw in zip(chunks, self.source.ahead(chunks), strict=True):
            whole = self._batch(raw, index, augment)
            columns = [
                part.split(batch_size)
                for part in (whole.inputs, whole.targets, whole.raw, whole.index)
            ]
            yield from map(Batch, *columns)


def concatenate(parts: Sequence[Samples]) -> Samples:
    """All samples of several selections of one source, in order.

    Raises:
        ValueError: If the selections are empty or lie in different sources.
    """
    if not parts or any(part.source is not parts[0].source for part in parts):
        raise ValueError("only selections of one source can be joined")
    index = torch.cat([part.index for part in parts])
    return Samples(parts[0].source, index, parts[0].transform)


#: Samples whose lengths differ by less than this factor may share a batch: at most a fifth of it
#: is padding then, and batches are no more alike than that takes.
_STRETCH = 1.25


def neighbours(
    order: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator
) -> Tensor:
    """An order rearranged so that samples of similar length share a batch.

    Lengths fall into classes, each wider than the last by `_STRETCH`; samples of a class stay in
    the given order. Batches come in a random order. What does not fill one stays at the end.

    Args:
        order: Positions in a random order, [N] int64.
        lengths: Of each sample, [N] int64.
        batch_size: Samples in a batch.
        generator: On the device of the order.
    """
    count = len(order) // batch_size
    whole, rest = order[: count * batch_size], order[count * batch_size :]
    if not count:
        return order
    classes = (lengths[whole].clamp_min(1).double().log() / math.log(_STRETCH)).floor()
    batches = whole[classes.argsort(stable=True)].view(count, batch_size)
    turn = torch.randperm(count, generator=generator, device=order.device)
    return torch.cat((batches[turn].flatten(), rest))


def class_balanced(
    targets: Tensor, batch_size: int, batches: int, generator: torch.Generator
) -> Tensor:
    """Batches in which no class has two samples more than another.

    In each batch the classes take turns, in a random order; each gives its samples in a random
    order, and begins again when it has no more.

    Samples of several labels each are one class together.

    Args:
        targets: Labels of the samples to draw from, [N] or [N, A] int64, at least one.
        batch_size: B.
        batches: How many.
        generator: On the device of the labels.

    Returns:
        Positions, [batches * B] int64, batch after batch.
    """
    device, n = targets.device, len(targets)
    if targets.ndim > 1:
        targets = targets.new_zeros(n)
    classes, members = targets.unique(return_inverse=True)
    counts = members.bincount()
    starts = counts.cumsum(0) - counts
    place = torch.arange(batch_size, device=device)
    turn, lap = place % len(classes), place // len(classes)
    drawn = []
    # Some batches at once, without tensors that grow with their number.
    for some in torch.arange(batches).split(max(1, 2**20 // n)):
        rows = len(some)
        keys = torch.rand(rows, n, dtype=torch.float64, generator=generator, device=device)
        by_class = keys.add_(members).argsort(1)
        ranks = torch.rand(rows, len(classes), generator=generator, device=device).argsort(1)
        chosen = ranks[:, turn]
        drawn.append(by_class.gather(1, starts[chosen] + lap % counts[chosen]).flatten())
    return torch.cat(drawn)
