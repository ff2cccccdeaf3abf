"""Where samples lie makes no difference; a selection is a selection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clbench.nn.transforms import Identity, ImageTransform
from clbench.rows import Rows
from clbench.samples import MappedSource, Samples, Source, TensorSource, concatenate

CPU = torch.device("cpu")
COUNT = 40


def content() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (COUNT, 3, 5, 4), generator=generator, dtype=torch.uint8)
    return inputs, torch.randint(7, (COUNT,), generator=generator)


@pytest.fixture
def mapped(tmp_path: Path) -> MappedSource:
    inputs, targets = content()
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    return MappedSource(np.load(tmp_path / "inputs.npy", mmap_mode="r"), targets)


@pytest.fixture
def scattered(tmp_path: Path) -> MappedSource:
    """The same samples in a file where they lie in another order among others."""
    inputs, targets = content()
    rows = torch.randperm(2 * COUNT, generator=torch.Generator().manual_seed(1))[:COUNT]
    whole = torch.zeros(2 * COUNT, 3, 5, 4, dtype=torch.uint8)
    whole[rows] = inputs
    np.save(tmp_path / "scattered.npy", whole.numpy())
    return MappedSource(np.load(tmp_path / "scattered.npy", mmap_mode="r"), targets, rows)


INDICES = [[], [0], [39], [5, 3, 4], [7, 7, 2, 7], list(range(COUNT)), list(range(39, -1, -1))]


@pytest.mark.parametrize("index", INDICES, ids=lambda index: f"{len(index)} of {index[:3]}")
def test_a_file_gives_what_a_tensor_gives(
    index: list[int], mapped: MappedSource, scattered: MappedSource
) -> None:
    held = TensorSource(*content())
    where = torch.tensor(index, dtype=torch.int64)
    expected = held.gather(where)
    for source in (mapped, scattered):
        found = source.gather(where)
        assert found.dtype == expected.dtype == torch.uint8
        assert torch.equal(found, expected)
        assert torch.equal(source.targets, held.targets)
        assert len(source) == len(held) == COUNT


def test_a_run_s_batches_are_the_same_from_a_file(
    mapped: MappedSource, scattered: MappedSource
) -> None:
    """Shuffled, augmented, cut: every bit."""
    transform = ImageTransform((0.5,) * 3, (0.2,) * 3, crop_padding=2, flip=True)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2))

    def batches(source: Source) -> list[Tensor]:
        samples = Samples(source, torch.arange(COUNT), transform)
        augment = torch.Generator().manual_seed(3)
        return [
            part.double()
            for b in samples.batches(order, 7, augment)
            for part in (b.inputs, b.targets, b.raw, b.index)
        ]

    expected = batches(TensorSource(*content()))
    for source in (mapped, scattered):
        for a, b in zip(batches(source), expected, strict=True):
            assert torch.equal(a, b)


def test_rows_of_a_file_are_those_of_its_map(tmp_path: Path, scattered: MappedSource) -> None:
    rows = Rows.behind(np.load(tmp_path / "scattered.npy", mmap_mode="r"))
    on_disk = MappedSource(rows, scattered.targets, scattered.rows)
    index = torch.tensor([3, 0, 0, 5])
    assert torch.equal(on_disk.gather(index), scattered.gather(index))
    both = [list(source.ahead([index, index[:1]])) for source in (on_disk, scattered)]
    assert all(map(torch.equal, *both))
    assert [len(part) for part in both[0]] == [4, 1]


def test_what_is_gathered_may_be_written_to(mapped: MappedSource) -> None:
    mapped.gather(torch.tensor([3]))[:] = 0
    assert torch.equal(mapped.gather(torch.tensor([3])), content()[0][3:4])


def test_a_source_that_is_there_already_is_not_copied(mapped: MappedSource) -> None:
    held = TensorSource(*content())
    assert held.to(CPU) is held
    assert mapped.to(CPU) is mapped
    assert held.device == mapped.device == CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_on_another_device_the_same(mapped: MappedSource, scattered: MappedSource) -> None:
    device = torch.device("cuda")
    held = TensorSource(*content()).to(device)
    index = torch.tensor([7, 7, 2], device=device)
    for source in (mapped.to(device), scattered.to(device)):
        assert source.gather(index).device.type == "cuda"
        assert torch.equal(source.gather(index), held.gather(index))


def test_samples_and_targets_must_be_as_many() -> None:
    inputs, targets = content()
    with pytest.raises(ValueError, match="40 samples but 39 targets"):
        TensorSource(inputs, targets[1:])
    with pytest.raises(ValueError, match="40 samples but 39 targets"):
        MappedSource(inputs.numpy(), targets[1:])
    with pytest.raises(ValueError, match="3 samples but 40 targets"):
        MappedSource(inputs.numpy(), targets, torch.arange(3))


# Selections.


def selection(index: list[int]) -> Samples:
    return Samples(TensorSource(*content()), torch.tensor(index), Identity())


def test_a_batch_says_which_samples_it_has() -> None:
    inputs, targets = content()
    batch = selection([9, 4, 6]).take(torch.tensor([2, 0]))
    assert batch.index.tolist() == [6, 9]
    assert torch.equal(batch.raw, inputs[[6, 9]])
    assert torch.equal(batch.targets, targets[[6, 9]])
    assert len(batch) == 2


def test_without_labels_the_rest_stays() -> None:
    batch = selection([9, 4]).take(torch.arange(2))
    bare = batch.unlabelled()
    assert bare.targets.shape == (0,)
    assert bare.targets.dtype == batch.targets.dtype
    assert bare.inputs is batch.inputs
    assert bare.index is batch.index
    assert len(bare) == 2


def test_augmentation_only_when_asked_for() -> None:
    transform = ImageTransform((0.5,) * 3, (0.2,) * 3, crop_padding=2)
    samples = Samples(TensorSource(*content()), torch.arange(20), transform)
    plain = samples.take(torch.arange(20))
    moved = samples.take(torch.arange(20), torch.Generator().manual_seed(0))
    assert torch.equal(plain.inputs, transform.test(plain.raw))
    assert not torch.equal(moved.inputs, plain.inputs)
    assert torch.equal(moved.raw, plain.raw), "a memory keeps what was stored"


def test_a_part_of_a_selection_and_several_as_one() -> None:
    samples = selection([9, 4, 6, 30])
    part = samples.subset(torch.tensor([3, 1]))
    assert part.index.tolist() == [30, 4]
    assert torch.equal(part.targets, content()[1][[30, 4]])
    whole = concatenate([part, samples])
    assert whole.index.tolist() == [30, 4, 9, 4, 6, 30]
    assert len(whole) == 6


def test_selections_of_different_sources_are_not_joined() -> None:
    with pytest.raises(ValueError, match="only selections of one source"):
        concatenate([selection([1]), selection([2])])
    with pytest.raises(ValueError, match="only selections of one source"):
        concatenate([])
