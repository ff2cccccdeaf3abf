"""Arrays one after another, as one source of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench.machine import available_memory
from clbench.samples import ReadSource, Source, TensorSource

#: Bytes that are held in memory, on the device, rather than left where they are.
_IN_MEMORY = 2**31


class ChainedSource(ReadSource):
    """Samples in several arrays, memory-mapped ones as a rule; nothing is held.

    Args:
        parts: Arrays [N, ...] of one shape and type.
        targets: Labels of all samples, part after part.
    """

    def __init__(self, parts: Sequence[NDArray[Any]], targets: Tensor) -> None:
        shapes = {(part.shape, part.dtype) for part in parts}
        if len(shapes) != 1 or len(targets) != len(parts) * len(parts[0]):
            raise ValueError(f"parts of {shapes} for {len(targets)} targets")
        self.parts, self.targets = list(parts), targets

    def read(self, index: Tensor) -> Tensor:
        which, rows = np.divmod(index.cpu().numpy(), len(self.parts[0]))
        first = self.parts[0]
        out = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for part in np.unique(which):
            places = (which == part).nonzero()[0]
            # In file order: pages that follow each other are read once.
            places = places[rows[places].argsort()]
            out[places] = self.parts[part][rows[places]]
        return torch.from_numpy(out)

    def to(self, device: torch.device) -> Source:
        return self if device == self.device else ChainedSource(self.parts, self.targets.to(device))


def chained(parts: Sequence[NDArray[Any]], targets: Tensor) -> Source:
    """The samples of several arrays: in memory where they are few, else left where they are.

    Few are at most 2 GiB, and half of the memory that is free.

    Args:
        parts: See `ChainedSource`.
        targets: See `ChainedSource`.
    """
    if sum(part.nbytes for part in parts) <= min(_IN_MEMORY, available_memory() / 2):
        return TensorSource(torch.from_numpy(np.concatenate(parts)), targets)
    return ChainedSource(parts, targets)
