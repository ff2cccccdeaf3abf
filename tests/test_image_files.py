"""Image files become one array: the right pixels, once, or a message that names the file."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clbench import image_files
from clbench.classification import Images
from clbench.errors import UserError
from clbench.image_files import Entry, ImageFiles, decode, listed, load, statistics
from clbench.machine import available_memory
from clbench.rows import Rows
from clbench.samples import MappedSource, Source, TensorSource


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def numbered(root: Path, n: int, testing: int = 0) -> ImageFiles:
    """n colour images, the last `testing` of them for tests; number i is painted (i, 2i, 255-i)."""
    entries = []
    for i in range(n):
        name = f"{i:04}.png"
        save(root / name, np.full((4, 6, 3), (i % 256, 2 * i % 256, 255 - i % 256), np.uint8))
        entries.append(Entry(name, i % 3, i >= n - testing))
    return listed(root, entries, ["a", "b", "c"])


def one(root: Path, name: str) -> ImageFiles:
    return listed(root, [Entry(name, 0, False)], ["a"])


def pixels(source: Source) -> np.ndarray:
    return source.gather(torch.arange(len(source))).numpy()


def loaded(files: ImageFiles, cache: Path, size: int = 0, channels: int = 3) -> Images:
    return load(files, size, channels, cache, skip_corrupt=False)


def test_every_image_is_where_its_label_is(tmp_path: Path) -> None:
    """Several threads fill the array; 300 files are several chunks for each."""
    images = loaded(numbered(tmp_path / "x", 300, testing=50), tmp_path / "cache")
    train, test = pixels(images.train), pixels(images.test)
    assert train.shape == (250, 3, 4, 6)
    assert test.shape == (50, 3, 4, 6)
    for source, array, first in ((images.train, train, 0), (images.test, test, 250)):
        i = np.arange(first, first + len(array))
        expected = np.stack((i % 256, 2 * i % 256, 255 - i % 256), 1).astype(np.uint8)
        np.testing.assert_array_equal(
            array, np.broadcast_to(expected[:, :, None, None], array.shape)
        )
        assert source.targets.tolist() == (i % 3).tolist()
    assert isinstance(images.train, TensorSource)
    assert images.facts["files"] == 300
    assert images.facts["resized_files"] == images.facts["skipped_corrupt_files"] == 0


def test_training_files_come_first_each_part_by_name(tmp_path: Path) -> None:
    for name in "dcba":
        save(tmp_path / name / "x.png", np.zeros((2, 2, 3), np.uint8))
    files = listed(tmp_path, [Entry(f"{c}/x.png", 0, c in "ca") for c in "dcba"], ["only"])
    assert [entry.name[0] for entry in files.entries] == ["b", "d", "a", "c"]
    assert files.n_train == 2


MODES = [
    *((".png", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")),
    *((".jpg", mode) for mode in ("RGB", "L", "CMYK")),
]


@pytest.mark.parametrize(("suffix", "mode"), MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_and_grey_files_become_what_is_asked_for(
    suffix: str, mode: str, channels: int, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = tmp_path / f"x{suffix}"
    save(file, noise, mode)
    found = pixels(loaded(one(tmp_path, file.name), tmp_path / "cache", channels=channels).train)[0]
    with Image.open(file) as image:
        wanted = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    np.testing.assert_array_equal(
        found, wanted.transpose(2, 0, 1) if channels == 3 else wanted[None]
    )


def test_lossless_files_keep_their_pixels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save(tmp_path / "x.png", noise)
    found = pixels(loaded(one(tmp_path, "x.png"), tmp_path / "cache").train)[0]
    np.testing.assert_array_equal(found, noise.transpose(2, 0, 1))


def test_a_palette_with_transparent_entries_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info["transparency"] = bytes([0, 128])
    image.save(tmp_path / "x.png", transparency=bytes([0, 128]))
    found = pixels(loaded(one(tmp_path, "x.png"), tmp_path / "cache").train)[0]
    assert found[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("wide", [True, False])
def test_another_shape_is_cut_to_its_centre(wide: bool, tmp_path: Path) -> None:
    """A grey square with red to both sides; the square is all that is left."""
    picture = np.full((8, 24, 3), (255, 0, 0), np.uint8)
    picture[:, 8:16] = 100
    save(tmp_path / "x.png", picture if wide else picture.transpose(1, 0, 2))
    images = loaded(one(tmp_path, "x.png"), tmp_path / "cache", size=8)
    assert pixels(images.train).shape == (1, 3, 8, 8)
    assert (pixels(images.train) == 100).all()
    assert images.facts["resized_files"] == 1


def test_cut_and_resized_is_resized_and_cut(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    save(tmp_path / "x.png", noise)
    found = pixels(loaded(one(tmp_path, "x.png"), tmp_path / "cache", size=8).train)[0]
    whole = np.asarray(Image.fromarray(noise).resize((24, 8), Image.Resampling.BICUBIC))
    assert np.abs(found.transpose(1, 2, 0).astype(int) - whole[:, 8:16]).max() <= 1


def test_reduction_averages(tmp_path: Path) -> None:
    """A fine chequerboard turns grey: reduced with antialiasing, not by leaving pixels out."""
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    save(tmp_path / "x.png", board)
    found = pixels(loaded(one(tmp_path, "x.png"), tmp_path / "cache", size=8, channels=1).train)
    assert np.abs(found[0, 0, 2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_without_a_size_the_first_image_decides(tmp_path: Path) -> None:
    for name, shape in (("0.png", (4, 6, 3)), ("1.png", (4, 6, 3)), ("2.png", (8, 12, 3))):
        save(tmp_path / name, np.full(shape, 7, np.uint8))
    entries = [Entry(f"{i}.png", 0, False) for i in range(3)]
    images = loaded(listed(tmp_path, entries, ["a"]), tmp_path / "cache")
    assert pixels(images.train).shape == (3, 3, 4, 6)
    assert images.facts["resized_files"] == 1


def broken(kind: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    if kind == "16 bit":
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(file, "PNG")
        return file.getvalue()
    Image.fromarray(noise).save(file, "JPEG" if "JPEG" in kind else "PNG")
    content = file.getvalue()
    return {
        "empty": b"",
        "a web page": b"<!doctype html><title>404</title>",
        "JPEG cut short": content[: len(content) // 2],
        "PNG cut short": content[: len(content) // 2],
        "PNG with flipped bytes": content[:60] + bytes(200) + content[260:],
    }[kind]


BROKEN = {
    "empty": "empty",
    "a web page": "UnidentifiedImageError",
    "JPEG cut short": "truncated",
    "PNG cut short": "truncated",
    "PNG with flipped bytes": "Error",
    "16 bit": "more than 8 bits",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_file_is_named_and_refused(kind: str, tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 10)
    (tmp_path / "x" / "0004.png").write_bytes(broken(kind))
    message = rf"1 of 10 image files.*0004\.png \(.*{BROKEN[kind]}.*skip_corrupt=true"
    with pytest.raises(UserError, match=message):
        loaded(files, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("images-*")), "nothing is kept of a refused folder"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_file_is_left_out_and_counted(kind: str, tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 10, testing=4)
    for i in (0, 4, 7):
        (tmp_path / "x" / f"{i:04}.png").write_bytes(broken(kind))
    images = load(files, 0, 3, tmp_path / "cache", skip_corrupt=True)
    assert images.facts["skipped_corrupt_files"] == 3
    assert pixels(images.train)[:, 0, 0, 0].tolist() == [1, 2, 3, 5]
    assert images.train.targets.tolist() == [1, 2, 0, 2]
    assert pixels(images.test)[:, 0, 0, 0].tolist() == [6, 8, 9]
    # What was skipped once is not taken for whole by a later run that asks for all.
    with pytest.raises(UserError, match=rf"3 of 10.*{BROKEN[kind]}"):
        load(files, 0, 3, tmp_path / "cache", skip_corrupt=False)


def test_many_damaged_files_are_counted_and_some_named(tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 20)
    for i in range(12):
        (tmp_path / "x" / f"{i:04}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"12 of 20.*0004\.png \(empty\) and 7 more"):
        loaded(files, tmp_path / "cache")


def test_nothing_readable_is_refused_even_when_skipping(tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 3)
    for i in range(3):
        (tmp_path / "x" / f"{i:04}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"3 of 3 .*Replace or delete them\.$"):
        load(files, 0, 3, tmp_path / "cache", skip_corrupt=True)


def test_a_file_that_vanishes_is_not_taken_for_damaged(tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 3)
    (tmp_path / "x" / "0001.png").unlink()
    with pytest.raises(UserError, match=r"Can't read .*0001\.png: No such file"):
        load(files, 0, 3, tmp_path / "cache", skip_corrupt=True)


def test_a_listed_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.png should be there.*incomplete"):
        one(tmp_path, "missing.png")


def test_files_are_decoded_once(tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 12)
    first = pixels(loaded(files, tmp_path / "cache").train)
    shutil.rmtree(tmp_path / "x")
    again = loaded(files, tmp_path / "cache")
    np.testing.assert_array_equal(pixels(again.train), first)


def test_every_option_has_its_own_entry_in_the_cache(tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 3)
    shapes = [
        pixels(loaded(files, tmp_path / "cache", size, channels).train).shape[1:]
        for size, channels in ((0, 3), (0, 1), (2, 3), (2, 1))
    ]
    assert shapes == [(3, 4, 6), (1, 4, 6), (3, 2, 2), (1, 2, 2)]


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 6)
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    moved = listed(tmp_path / "y", files.entries, files.class_names)
    assert moved.fingerprint == files.fingerprint
    fewer = listed(tmp_path / "y", files.entries[1:], files.class_names)
    relabelled = listed(
        tmp_path / "y", [e._replace(label=2 - e.label) for e in files.entries], files.class_names
    )
    tested = listed(
        tmp_path / "y", [e._replace(testing=e.label == 0) for e in files.entries], files.class_names
    )
    with (tmp_path / "y" / "0002.png").open("ab") as file:
        file.write(b"\0")
    longer = listed(tmp_path / "y", files.entries, files.class_names)
    others = [f.fingerprint for f in (fewer, relabelled, tested, longer)]
    assert len({files.fingerprint, *others}) == 5


def test_what_does_not_fit_in_memory_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = numbered(tmp_path / "x", 200, testing=50)
    (tmp_path / "x" / "0003.png").write_bytes(b"")
    small = load(files, 0, 3, tmp_path / "one", skip_corrupt=True)
    monkeypatch.setattr(image_files, "available_memory", lambda: 2 * 200 * 3 * 4 * 6 - 1)
    large = load(files, 0, 3, tmp_path / "two", skip_corrupt=True)
    for a, b in ((small.train, large.train), (small.test, large.test)):
        assert isinstance(a, TensorSource)
        assert isinstance(b, MappedSource)
        assert isinstance(b.inputs, Rows)
        np.testing.assert_array_equal(pixels(a), pixels(b))
        assert torch.equal(a.targets, b.targets)
    assert (small.mean, small.std) == (large.mean, large.std)


def test_too_little_disk_is_a_message_with_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = numbered(tmp_path / "x", 3)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"3 decoded images of 6x4 .* GB.*No space.*image_size"):
        loaded(files, tmp_path / "cache")


def test_normalisation_is_that_of_the_readable_training_images(tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 30, testing=10)
    (tmp_path / "x" / "0005.png").write_bytes(b"")
    images = load(files, 0, 3, tmp_path / "cache", skip_corrupt=True)
    values = pixels(images.train) / 255
    np.testing.assert_allclose(images.mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(images.std, values.std((0, 2, 3)), rtol=1e-12)


def test_statistics_of_one_colour_are_safe_to_divide_by() -> None:
    mean, std = statistics(np.full((5, 1, 2, 2), 51, np.uint8), np.arange(5))
    np.testing.assert_allclose(mean, [0.2])
    assert std.tolist() == [1e-3]


def test_decoding_tells_how_far_it_is(tmp_path: Path) -> None:
    files = numbered(tmp_path / "x", 150)
    told: list[tuple[int, int]] = []
    decode(files, 0, 3, lambda shape: np.zeros(shape, np.uint8), lambda *now: told.append(now))
    assert told[-1] == (150, 150)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) == 3


def test_an_error_stops_the_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle must not decode the rest first."""
    files = numbered(tmp_path / "x", 64 * 40)
    read = image_files._read
    count = []

    def counted(*arguments: object) -> object:
        count.append(1)
        return read(*arguments)  # type: ignore[arg-type]

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_files, "_read", counted)
    with pytest.raises(KeyboardInterrupt):
        decode(files, 4, 3, lambda shape: np.zeros(shape, np.uint8), interrupt)
    assert len(count) < len(files.entries) / 2


def test_free_memory_is_within_the_machine_s_and_its_container_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory() <= there
    real = Path.read_text

    def read(path: Path, *arguments: str) -> str:
        if path == Path("/sys/fs/cgroup/memory.max"):
            return "12345\n"
        return real(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read)
    assert available_memory() == 12345
