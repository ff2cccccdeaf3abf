"""Several selections of samples as one, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clbench.samples import Samples, Source, concatenate


class JoinedSource(Source):
    """The samples of several sources, one source after another.

    Args:
        sources: At least one, all on one device, with samples of one shape and type.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.targets = torch.cat([source.targets for source in self.sources])
        lengths = [source.lengths for source in self.sources if source.lengths is not None]
        self.lengths = torch.cat(lengths) if len(lengths) == len(self.sources) else None

    def gather(self, index: Tensor) -> Tensor:
        parts, places, start = [], [], 0
        for source in self.sources:
            mine = ((index >= start) & (index < start + len(source))).nonzero().flatten()
            parts.append(source.gather(index[mine] - start))
            places.append(mine)
            start += len(source)
        joined = torch.cat(parts)
        return torch.empty_like(joined).index_copy_(0, torch.cat(places), joined)

    def to(self, device: torch.device) -> Source:
        if device == self.device:
            return self
        return JoinedSource([source.to(device) for source in self.sources])


def join(parts: Sequence[Samples]) -> Samples:
    """All samples of several selections, in order, even if they lie in different sources.

    Args:
        parts: At least one, with one transform between them.

    Raises:
        ValueError: If there is none, or their transforms differ.
    """
    if not parts or any(part.transform is not parts[0].transform for part in parts):
        raise ValueError("only selections with one transform can be joined")
    sources = list({id(part.source): part.source for part in parts}.values())
    if len(sources) == 1:
        return concatenate(parts)
    starts, total = {}, 0
    for source in sources:
        starts[id(source)] = total
        total += len(source)
    index = torch.cat([part.index + starts[id(part.source)] for part in parts])
    return Samples(JoinedSource(sources), index, parts[0].transform)
