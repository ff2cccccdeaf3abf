"""Batches are the samples asked for, in order, however they are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clbench.nn.transforms import Identity, ImageTransform
from clbench.samples import Samples, TensorSource


class _Counting(TensorSource):
    """Remembers how many samples were asked for at once."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        super().__init__(inputs, targets)
        self.asked: list[int] = []

    def gather(self, index: Tensor) -> Tensor:
        self.asked.append(len(index))
        return super().gather(index)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50, 60])
@pytest.mark.parametrize("chunk", [1, 24, 100, 10**6])
def test_batches_are_the_samples_in_order(
    batch_size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Samples, "CHUNK", chunk)
    raw = torch.arange(60 * 4, dtype=torch.float32).view(60, 4)
    source = TensorSource(raw, torch.arange(60) + 1000)
    index = torch.arange(5, 55)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    batches = list(Samples(source, index, Identity()).batches(order, batch_size))
    sizes = [len(batch) for batch in batches]
    assert all(size == batch_size for size in sizes[:-1])
    assert sum(sizes) == 50
    expected = index[order]
    assert torch.equal(torch.cat([b.index for b in batches]), expected)
    assert torch.equal(torch.cat([b.targets for b in batches]), expected + 1000)
    assert torch.equal(torch.cat([b.raw for b in batches]), raw[expected])


def test_the_samples_held_at_once_are_bounded_in_bytes_and_whole_batches() -> None:
    shape = (3, 64, 64)
    source = _Counting(torch.zeros(400, *shape, dtype=torch.uint8), torch.zeros(400).long())
    samples = Samples(source, torch.arange(400), ImageTransform([0.5] * 3, [0.5] * 3))
    list(samples.batches(torch.arange(400), 8))
    largest = max(source.asked)
    assert largest * 3 * 64 * 64 <= Samples.CHUNK < (largest + 8) * 3 * 64 * 64
    assert largest % 8 == 0
    source.asked.clear()
    list(samples.batches(torch.arange(400), 200))
    assert max(source.asked) == 200


def test_a_chunk_is_announced_while_the_one_before_it_is_worked_on() -> None:
    """And the batches are those of a source that nobody tells."""
    told: list[tuple[str, list[int]]] = []

    class Told(TensorSource):
        def expect(self, index: Tensor) -> None:
            told.append(("expect", index.tolist()))

        def gather(self, index: Tensor) -> Tensor:
            told.append(("gather", index.tolist()))
            return super().gather(index)

    raw, order = torch.arange(2**20 * 5 // 2).view(20, -1), torch.randperm(20)
    sources = [kind(raw, torch.arange(20)) for kind in (Told, TensorSource)]
    one, other = (
        [batch.raw for batch in Samples(s, torch.arange(20), Identity()).batches(order, 2)]
        for s in sources
    )
    assert all(map(torch.equal, one, other))
    chunks = [part.tolist() for part in order.split(2)]
    expected = [("gather", chunks[0][:1])]  # to see how large a sample is
    for now, after in zip(chunks, [*chunks[1:], []], strict=True):
        expected += [("expect", after), ("gather", now)]
    assert told == expected


def test_no_samples_no_batches() -> None:
    source = TensorSource(torch.zeros(3, 1, dtype=torch.uint8), torch.zeros(3).long())
    samples = Samples(source, torch.arange(3), Identity())
    assert list(samples.batches(torch.arange(0), 2)) == []
