"""Selections of several sources as one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clbench.nn.joined import join
from clbench.nn.transforms import Identity
from clbench.samples import MappedSource, Samples, TensorSource

TRANSFORM = Identity()


def samples(first: int, count: int, picks: list[int], mapped: bool = False) -> Samples:
    """Samples whose stored value is first, first + 1, ...; labels are those mod 3."""
    raw = torch.arange(first, first + count, dtype=torch.uint8).unsqueeze(1)
    targets = raw.flatten().long() % 3
    source = MappedSource(np.asarray(raw), targets) if mapped else TensorSource(raw, targets)
    return Samples(source, torch.tensor(picks), TRANSFORM)


def test_samples_of_several_sources_come_in_order() -> None:
    a, b = samples(0, 10, [3, 1]), samples(100, 5, [4, 0, 2], mapped=True)
    c = Samples(a.source, torch.tensor([9]), TRANSFORM)
    joined = join([a, b, c])
    assert joined.take(torch.arange(6)).raw.flatten().tolist() == [3, 1, 104, 100, 102, 9]
    assert joined.targets.tolist() == [v % 3 for v in (3, 1, 104, 100, 102, 9)]
    assert joined.take(torch.arange(6)).raw.dtype == torch.uint8
    assert len(joined.take(torch.arange(6)).index.unique()) == 6


def test_any_order_and_any_part_can_be_asked_for() -> None:
    joined = join([samples(0, 10, [3, 1]), samples(100, 5, [4, 0, 2])])
    values = torch.tensor([3, 1, 104, 100, 102])
    for order in ([4, 0, 2, 1, 3], [1, 0], [3], []):
        positions = torch.tensor(order, dtype=torch.int64)
        whole = torch.cat([b.raw for b in joined.batches(positions, 2)] or [torch.empty(0, 1)])
        assert whole.flatten().tolist() == values[positions].tolist()


def test_one_source_stays_itself() -> None:
    a = samples(0, 10, [3, 1])
    joined = join([a, Samples(a.source, torch.tensor([7]), TRANSFORM)])
    assert joined.source is a.source
    assert joined.index.tolist() == [3, 1, 7]


def test_it_can_be_served_elsewhere() -> None:
    joined = join([samples(0, 10, [3]), samples(100, 5, [4])])
    assert joined.to(torch.device("cpu")).source is joined.source
    assert joined.to(torch.device("meta")).targets.device.type == "meta"


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(ValueError, match="one transform"):
        join([])
    other = samples(0, 3, [0])
    with pytest.raises(ValueError, match="one transform"):
        join([other, Samples(other.source, other.index, Identity())])
