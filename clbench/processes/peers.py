"""A run whose model is computed by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.heads import Classifier
from clbench.population.companion import Companion, introduce
from clbench.processes.group import Group
from clbench.processes.rows import Division, Forward
from clbench.types import Scenario, Setting

Found = TypeVar("Found")


class Peers(Companion):
    """The other processes of a run; see `clbench.processes`.

    Args:
        group: All of them.
    """

    def __init__(self, group: Group) -> None:
        self.group, self._division = group, Division(group)
        self.leads, self.processes = group.rank == 0, group.count

    @property
    def part(self) -> slice | None:
        return self._division.part

    def adopt(self, model: nn.Module) -> None:
        for entry in [model, model.features] if isinstance(model, Classifier) else [model]:
            entry.forward = Forward(self._division, entry)
        self.compare(model)

    def check(self, scenario: Scenario) -> None:
        if scenario.setting is Setting.TEST_TIME_ADAPTATION:
            raise UserError(
                "Test-time adaptation looks at the statistics of whole batches, so several "
                "processes can't share them out. Use one process."
            )

    def told(self, find: Callable[[], Found]) -> Found:
        return self.group.told(find)

    def agree(self, code: int) -> int:
        return self.group.agree(code)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.group.total(tensors)

    def compare(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        sums = [t.detach().contiguous().flatten().view(torch.uint8).sum() for t in tensors]
        digest = [sum((place + 1) * int(s) for place, s in enumerate(sums)) % 2**62]
        if len({tuple(digests) for digests in self.group.all_of(digest)}) > 1:
            raise RuntimeError(
                "the processes of this run have different weights. Each needs the same versions, "
                "the same data and the same kind of device."
            )


@contextmanager
def together(group: Group) -> Iterator[Peers]:
    """Within the block, runs in this thread are done by all processes of the group."""
    peers = Peers(group)
    introduce(peers)
    try:
        with group.reporting():
            yield peers
    finally:
        introduce(Companion())
