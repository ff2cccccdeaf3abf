"""Arrays one after another, and files decoded when asked for, serve what one tensor does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clbench import chained as module
from clbench.chained import ChainedSource, chained
from clbench.errors import UserError
from clbench.image_files import Entry, FileSource, pixels, sized
from clbench.samples import TensorSource

INDICES = [[], [0], [11], [4, 3], [5, 0, 11, 5, 7], list(range(11, -1, -1))]


def parts(folder: Path) -> list[np.ndarray]:
    """Three mapped files of four images."""
    generator = np.random.default_rng(0)
    for i in range(3):
        np.save(folder / f"{i}.npy", generator.integers(0, 256, (4, 3, 6, 5), dtype=np.uint8))
    return [np.load(folder / f"{i}.npy", mmap_mode="r") for i in range(3)]


@pytest.mark.parametrize("index", INDICES)
def test_a_chain_gives_what_one_tensor_gives(index: list[int], tmp_path: Path) -> None:
    arrays, targets = parts(tmp_path), torch.arange(12)
    whole = TensorSource(torch.from_numpy(np.concatenate(arrays)), targets)
    chain, where = ChainedSource(arrays, targets), torch.tensor(index, dtype=torch.int64)
    assert torch.equal(chain.gather(where), whole.gather(where))
    assert chain.gather(where).dtype == torch.uint8
    assert len(chain) == 12
    assert chain.to(torch.device("cpu")) is chain


def test_few_images_are_held_and_many_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, targets = parts(tmp_path), torch.arange(12)
    size = sum(array.nbytes for array in arrays)
    assert isinstance(chained(arrays, targets), TensorSource)
    for limit, memory in ((size - 1, 10**12), (10**12, 2 * size - 1)):
        monkeypatch.setattr(module, "_IN_MEMORY", limit)
        monkeypatch.setattr(module, "available_memory", lambda memory=memory: memory)
        kept = chained(arrays, targets)
        assert isinstance(kept, ChainedSource)
        assert kept.parts[1] is arrays[1]
    monkeypatch.setattr(module, "_IN_MEMORY", size)
    monkeypatch.setattr(module, "available_memory", lambda: 2 * size)
    assert isinstance(chained(arrays, targets), TensorSource)


def test_parts_that_do_not_fit_together_are_an_error(tmp_path: Path) -> None:
    arrays = parts(tmp_path)
    for wrong, count in ((arrays, 11), ([arrays[0], arrays[1][:3]], 7), ([], 0)):
        with pytest.raises(ValueError, match="parts of"):
            ChainedSource(wrong, torch.arange(count))


def painted(folder: Path, sizes: list[tuple[int, int]]) -> list[Entry]:
    """Pictures with a red frame of an eighth of the shorter side's quarter, green inside."""
    entries = []
    for i, (width, height) in enumerate(sizes):
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0], image[..., 2] = 255, i
        y, x = height // 16, width // 16
        image[y : height - y, x : width - x, :2] = 0, 255
        Image.fromarray(image).save(folder / f"{i}.png")
        entries.append(Entry(f"{i}.png", i % 2, True))
    return entries


def test_a_border_is_left_out(tmp_path: Path) -> None:
    """As by "resize to 256, cut out the central 224", at any size."""
    sizes = [(32, 32), (64, 32), (32, 48), (28, 28)]
    entries = painted(tmp_path, sizes)
    files = sized(tmp_path, entries, ("a", "b"))
    plain = pixels(files, 28, 3, tmp_path / "kept")
    inside = pixels(files, 28, 3, tmp_path / "kept", 1 / 16)
    for i in range(3):
        assert (inside[i, 0] == 0).all()
        assert (inside[i, 1] == 255).all()
        assert plain[i, 0].max() == 255
    # What has the size already was cut before: nothing more is left out.
    assert (inside[3] == plain[3]).all()


def test_pixels_are_in_the_order_of_the_files(tmp_path: Path) -> None:
    entries = painted(tmp_path, [(16, 16)] * 4)
    order = [2, 0, 3, 1]
    files = sized(tmp_path, [entries[i] for i in order], ("a", "b"))
    found = pixels(files, 16, 3, tmp_path / "kept")
    assert isinstance(found.base, np.memmap)
    assert found[:, 2].max((1, 2)).tolist() == order
    forward = pixels(sized(tmp_path, entries, ("a", "b")), 16, 3, tmp_path / "kept")
    assert forward[:, 2].max((1, 2)).tolist() == [0, 1, 2, 3]


def blue(images: Tensor) -> list[int]:
    return images[:, 2].amax((1, 2)).tolist()


def test_files_decoded_on_demand(tmp_path: Path) -> None:
    files = sized(tmp_path, painted(tmp_path, [(32, 32)] * 5), ("a", "b"))
    source = FileSource(files, 28, 1 / 16)
    assert source.targets.tolist() == [0, 1, 0, 1, 0]
    for index in ([], [3], [4, 0, 4]):
        found = source.gather(torch.tensor(index, dtype=torch.int64))
        assert found.shape == (len(index), 3, 28, 28)
        assert found.dtype == torch.uint8
        assert blue(found) == index
    kept = pixels(files, 28, 3, tmp_path / "kept", 1 / 16)
    np.testing.assert_array_equal(source.gather(torch.arange(5)).numpy(), kept)
    assert source.to(torch.device("cpu")) is source


def test_a_file_that_can_not_be_decoded_on_demand_is_named(tmp_path: Path) -> None:
    files = sized(tmp_path, painted(tmp_path, [(8, 8)] * 2), ("a", "b"))
    (tmp_path / "1.png").write_bytes(b"no image")
    assert len(FileSource(files, 8).gather(torch.tensor([0]))) == 1
    with pytest.raises(UserError, match=r"1\.png can't be decoded"):
        FileSource(files, 8).gather(torch.tensor([0, 1]))
