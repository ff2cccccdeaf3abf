"""CIFAR-10-C from small files in the published format, and made from folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import draw_folder
from torch import Tensor

from clbench import datasets
from clbench.classification import Images
from clbench.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from clbench.errors import UserError
from clbench.nn.backbones import ConvNet
from clbench.samples import Samples, TensorSource
from clbench.types import Split, Stream
from scenarios import cifar_c
from scenarios.cifar_c import CIFARC

#: Of each severity; four of each class.
COUNT = 40


def code(corruption: str) -> int:
    """A number from 1 on, for the green of its images."""
    return 1 + (*CORRUPTIONS, *EXTRA_CORRUPTIONS).index(corruption)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every image is painted (its position, its corruption, its severity), clean ones with 0."""
    labels = torch.arange(COUNT) % 10

    def painted(*colours: Tensor) -> TensorSource:
        pixels = torch.stack(colours, 1).to(torch.uint8).view(-1, 3, 1, 1).expand(-1, -1, 32, 32)
        return TensorSource(pixels.contiguous(), labels)

    position, nothing = torch.arange(COUNT), torch.zeros(COUNT)
    train, test = painted(position, nothing, nothing + 99), painted(position, nothing, nothing)
    names = [f"thing {i}" for i in range(10)]
    images = Images(train, test, names, (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr(datasets, "check", lambda *_: None)
    monkeypatch.setattr(datasets, "load", lambda *_: images)
    monkeypatch.setattr(datasets, "fingerprint", lambda *_: {"painted": COUNT})
    monkeypatch.setattr(cifar_c, "_PER_SEVERITY", COUNT)
    for name in (*CORRUPTIONS, *EXTRA_CORRUPTIONS):
        array = np.zeros((5 * COUNT, 32, 32, 3), np.uint8)
        array[..., 0] = np.tile(np.arange(COUNT), 5)[:, None, None]
        array[..., 1] = code(name)
        array[..., 2] = np.repeat(np.arange(1, 6), COUNT)[:, None, None]
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "labels.npy", np.tile(labels.numpy(), 5))
    return tmp_path


def scenario(published: Path | None, **options: Any) -> CIFARC:
    options = {"held_out": 0.5, "tuning_fraction": 0.5} | options
    return CIFARC(backbone=ConvNet(widths=(4,)), published=published, **options)


def colours(samples: Samples | None) -> Tensor:
    """(position, corruption, severity) of each sample."""
    assert samples is not None
    raw = samples.take(torch.arange(len(samples))).raw
    assert raw.shape[1:] == (3, 32, 32)
    assert torch.equal(raw, raw[:, :, :1, :1].expand_as(raw))
    return raw[:, :, 0, 0].long()


def parts(stream: Stream) -> list[Tensor]:
    return [colours(arrivals.samples) for arrivals in stream.arrivals]


def test_published_images_come_with_their_labels(published: Path) -> None:
    stream = scenario(published, severity=3).stream(Split.EVALUATE, 0)
    assert [e.name for e in stream.experiences] == list(CORRUPTIONS)
    for name, arrivals, test in zip(CORRUPTIONS, stream.arrivals, stream.tests, strict=True):
        for samples in (arrivals.samples, test):
            found = colours(samples)
            assert (found[:, 1] == code(name)).all()
            assert (found[:, 2] == 3).all()
            assert torch.equal(found[:, 0] % 10, samples.targets)
    clean = colours(stream.source_test)
    assert (clean[:, 1:] == 0).all()
    assert torch.equal(clean[:, 0], colours(stream.tests[0])[:, 0])
    assert (colours(stream.source)[:, 2] == 99).all()


def test_what_arrives_is_held_out_or_tuned_on_is_disjoint(published: Path) -> None:
    seen: list[set[int]] = []
    for split, names in ((Split.EVALUATE, CORRUPTIONS), (Split.TUNE, EXTRA_CORRUPTIONS)):
        stream = scenario(published).stream(split, 0)
        assert [e.name for e in stream.experiences] == list(names)
        arriving = {frozenset(part[:, 0].tolist()) for part in parts(stream)}
        held = {frozenset(colours(test)[:, 0].tolist()) for test in stream.tests}
        assert len(arriving) == len(held) == 1
        seen += [set(*arriving), set(*held)]
    # Of each class one image for each of the four.
    assert [len(part) for part in seen] == [10] * 4
    assert len(set().union(*seen)) == COUNT


def test_the_protocol_of_the_literature_is_all_images(published: Path) -> None:
    stream = scenario(published, held_out=0.0, tuning_fraction=0.0).stream(Split.EVALUATE, 0)
    assert not stream.tests
    assert stream.source_test is None
    for part in parts(stream):
        assert part[:, 0].sort().values.tolist() == list(range(COUNT))
        assert (part[:, 2] == 5).all()
    orders = {tuple(part[:, 0].tolist()) for part in parts(stream)}
    assert len(orders) > 1


def test_the_seed_decides_the_order_and_nothing_else(published: Path) -> None:
    one, again, other = (
        parts(scenario(published).stream(Split.EVALUATE, seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for a, b in zip(one, other, strict=True):
        assert a[:, 0].sort().values.tolist() == b[:, 0].sort().values.tolist()


def test_a_gradual_domain_comes_and_goes(published: Path) -> None:
    options = {"arrival": "gradual", "severity": 3, "corruptions": ("fog",)}
    stream = scenario(published, held_out=0.0, tuning_fraction=0.0, **options).stream(
        Split.EVALUATE, 0
    )
    (part,) = parts(stream)
    assert part[:, 2].view(5, COUNT).float().mean(1).tolist() == [1, 2, 3, 2, 1]


def test_a_mixed_stream_has_every_image_of_every_domain_once(published: Path) -> None:
    corruptions = ("fog", "snow")
    stream = scenario(published, arrival="mixed", corruptions=corruptions).stream(Split.EVALUATE, 0)
    everything = torch.cat(parts(stream))
    assert len(everything) == len({tuple(row) for row in everything.tolist()})
    for part, arrivals in zip(parts(stream), stream.arrivals, strict=True):
        names = [corruptions[i] for i in arrivals.domains]
        assert [code(name) for name in names] == part[:, 1].tolist()
        assert len(set(names)) == 2


def test_files_that_are_missing_or_of_another_kind_are_refused(published: Path) -> None:
    (published / "snow.npy").unlink()
    with pytest.raises(UserError, match=r"snow.npy can't be read.*CIFAR-10-C.tar"):
        scenario(published).check(Split.EVALUATE)
    scenario(published).check(Split.TUNE)
    np.save(published / "snow.npy", np.zeros((7, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"holds uint8 \[7, 32, 32, 3\], not uint8 \[200, 32"):
        scenario(published).check(Split.EVALUATE)
    np.save(published / "snow.npy", np.zeros((5 * COUNT, 32, 32, 3)))
    with pytest.raises(UserError, match="holds float64"):
        scenario(published).check(Split.EVALUATE)
    (published / "snow.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"snow.npy can't be read"):
        scenario(published).check(Split.EVALUATE)


def test_files_of_another_dataset_are_noticed_by_their_labels(published: Path) -> None:
    np.save(published / "labels.npy", np.zeros(5 * COUNT, np.int64))
    with pytest.raises(UserError, match="CIFAR-10-C belongs to dataset=cifar10"):
        scenario(published).stream(Split.EVALUATE, 0)
    (published / "labels.npy").unlink()
    scenario(published).stream(Split.EVALUATE, 0)


def test_published_files_belong_to_the_dataset_not_to_a_folder(published: Path) -> None:
    with pytest.raises(UserError, match=r"leave out scenario\.root"):
        scenario(published, root=published)


def test_published_and_made_images_are_different_runs(published: Path) -> None:
    assert scenario(published).fingerprint() != scenario(None).fingerprint()


def test_made_from_a_folder(tmp_path: Path) -> None:
    """A class after another in the folder; held-out images do not follow that order."""
    root = draw_folder(tmp_path / "images", ("cat", "dog", "ewe"), train=2, test=12)
    made = CIFARC(
        backbone=ConvNet(widths=(4,)),
        root=root,
        cache_dir=tmp_path / "kept",
        corruptions=("contrast", "gaussian_noise"),
        held_out=0.5,
        tuning_fraction=0.0,
    )
    made.check(Split.EVALUATE)
    stream = made.stream(Split.EVALUATE, 0)
    labels = stream.tests[0].targets.tolist()
    assert labels != sorted(labels)
    assert stream.source_test is not None
    assert stream.source_test.targets.tolist() == labels
    clean = stream.source_test.take(torch.arange(18)).raw.numpy()
    contrast = corrupt(clean, "contrast", 5, 0)
    found = stream.tests[0].take(torch.arange(18)).raw.numpy()
    np.testing.assert_array_equal(found, contrast)
    again = made.stream(Split.EVALUATE, 0)
    for a, b in zip(stream.arrivals, again.arrivals, strict=True):
        every = torch.arange(len(a.samples))
        assert torch.equal(a.samples.take(every).raw, b.samples.take(every).raw)
