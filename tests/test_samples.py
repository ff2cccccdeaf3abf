"""Batches are the samples asked for, in order, however they are cut."""

from __future__ import annotations

import gc
import queue
import threading

import pytest
import torch
from torch import Tensor

from clbench.nn.transforms import Identity, ImageTransform
from clbench.samples import ReadSource, Samples, Source, TensorSource


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


class _Disk(ReadSource):
    """Tells which samples were read, on which thread."""

    def __init__(self, raw: Tensor, targets: Tensor) -> None:
        self.raw, self.targets = raw, targets
        self.done: queue.Queue[tuple[list[int], str]] = queue.Queue()

    def read(self, index: Tensor) -> Tensor:
        index = index.cpu()
        if (index == 13).any():
            raise OSError("sample 13")
        self.done.put((index.tolist(), threading.current_thread().name))
        return self.raw[index]

    def to(self, device: torch.device) -> Source:
        return _Disk(self.raw, self.targets.to(device))


def disk(count: int) -> tuple[_Disk, Samples]:
    """Samples so large that each batch of two is read by itself."""
    source = _Disk(torch.arange(count * 2**19).view(count, -1), torch.arange(count))
    return source, Samples(source, torch.arange(count), Identity())


def test_what_lies_on_a_disk_is_read_while_the_samples_before_it_are_worked_on() -> None:
    source, samples = disk(12)
    order = torch.randperm(12)
    chunks = [part.tolist() for part in order.split(2)]
    batches = samples.batches(order, 2)
    got = [next(batches)]
    read = [source.done.get(timeout=10) for _ in range(3)]
    assert [positions for positions, _ in read] == [chunks[0][:1], chunks[0], chunks[1]]
    assert {name.rpartition("_")[0] for _, name in read[1:]} == {"clbench-reader"}
    got += batches
    assert all(torch.equal(b.raw, source.raw[i]) for b, i in zip(got, chunks, strict=True))
    assert [b.targets.tolist() for b in got] == chunks


def test_what_can_t_be_read_is_raised_in_its_turn() -> None:
    _, samples = disk(14)
    batches = samples.batches(torch.arange(14), 2)
    assert [next(batches).targets.tolist() for _ in range(6)][-1] == [10, 11]
    with pytest.raises(OSError, match="sample 13"):
        next(batches)


def test_nothing_goes_on_reading_for_batches_that_nobody_wants() -> None:
    source, samples = disk(12)
    batches = samples.batches(torch.arange(12), 2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    gc.collect()
    assert not any(t.name.startswith("clbench-reader") for t in threading.enumerate())
    assert source.done.qsize() <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_gpu_gets_the_samples_that_lie_on_a_disk() -> None:
    source, samples = disk(12)
    order = torch.randperm(12)
    there = samples.to(torch.device("cuda"))
    for batch, part in zip(there.batches(order.cuda(), 2), order.split(2), strict=True):
        assert batch.raw.device.type == "cuda"
        assert torch.equal(batch.raw.cpu(), source.raw[part])


def test_no_samples_no_batches() -> None:
    source = TensorSource(torch.zeros(3, 1, dtype=torch.uint8), torch.zeros(3).long())
    samples = Samples(source, torch.arange(3), Identity())
    assert list(samples.batches(torch.arange(0), 2)) == []
