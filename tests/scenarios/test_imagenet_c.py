"""ImageNet-C, a small one in the layout of its archives: 4 classes of 10 images of 16x16."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clbench import chained
from clbench.chained import ChainedSource
from clbench.conditions import Conditions
from clbench.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from clbench.errors import UserError
from clbench.nn.backbones import ConvNet
from clbench.nn.heads import classifier
from clbench.protocol import run
from clbench.samples import Samples, TensorSource
from clbench.types import Split, Stream
from scenarios.imagenet_c import ImageNetC
from strategies.source import Source

WNIDS = ("n01440764", "n01443537", "n02007558", "n02007559")
EACH = 10
SIZE = 16
LEVEL = 5


def code(corruption: str) -> int:
    return 1 + (*CORRUPTIONS, *EXTRA_CORRUPTIONS).index(corruption)


def name(label: int, number: int) -> str:
    return f"{WNIDS[label]}/ILSVRC2012_val_{label + 4 * number:08}.JPEG"


def paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (SIZE, SIZE)) -> None:
    """Losslessly, whatever the name says: the decoder goes by the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="PNG")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every image is painted (its class, its number, its corruption); clean ones with 0."""
    top = tmp_path_factory.mktemp("imagenet")
    for label in range(len(WNIDS)):
        for number in range(EACH):
            file = name(label, number)
            paint(top / "val" / file, (label, number, 0), (32, 24))
            paint(top / "flat" / file.rpartition("/")[2], (label, number, 0))
            paint(top / "train" / WNIDS[label] / f"{number}.JPEG", (label, number, 99))
            for corruption in (*CORRUPTIONS, *EXTRA_CORRUPTIONS):
                folder = top / "published" / corruption / str(LEVEL)
                paint(folder / file, (label, number, code(corruption)))
    return top


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is no better than chance, with a head for the four classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = classifier(ConvNet(widths=(4,)), (3, SIZE, SIZE), len(WNIDS))
    file = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(model.state_dict(), file)
    return str(file)


@pytest.fixture
def make(original: Path, weights: str, tmp_path: Path) -> Any:
    """The scenario with other options."""

    def scenario(**options: Any) -> ImageNetC:
        chosen: dict[str, Any] = {
            "published": original / "published",
            "root": original / "val",
            "cache_dir": tmp_path / "kept",
            "backbone": ConvNet(widths=(4,), weights=weights, load_head=True),
            "image_size": SIZE,
            "samples": 0,
            "held_out": 0.25,
            "tuning_fraction": 0.2,
        }
        return ImageNetC(**chosen | options)

    return scenario


def colours(samples: Samples | None) -> Tensor:
    """(class, number, corruption) of each sample."""
    assert samples is not None
    raw = samples.take(torch.arange(len(samples))).raw
    assert raw.shape[1:] == (3, SIZE, SIZE)
    assert torch.equal(raw, raw[:, :, :1, :1].expand_as(raw))
    return raw[:, :, 0, 0].long()


def which(found: Tensor) -> set[tuple[int, ...]]:
    """Class and number of each image."""
    return {tuple(row) for row in found[:, :2].tolist()}


def arrived(stream: Stream) -> list[Tensor]:
    return [colours(arrivals.samples) for arrivals in stream.arrivals]


def test_images_come_with_their_labels_and_corruptions(make: Any) -> None:
    scenario = make()
    scenario.check(Split.EVALUATE)
    stream = scenario.stream(Split.EVALUATE, 0)
    assert [e.name for e in stream.experiences] == list(CORRUPTIONS)
    assert stream.facts["class_names"] == list(WNIDS)
    assert stream.facts["image_shape"] == [3, SIZE, SIZE]
    for corruption, arrivals, test in zip(CORRUPTIONS, stream.arrivals, stream.tests, strict=True):
        for samples, count in ((arrivals.samples, 24), (test, 8)):
            found = colours(samples)
            assert torch.equal(found[:, 0], samples.targets)
            assert (found[:, 2] == code(corruption)).all()
            assert len(which(found)) == len(found) == count
        assert not which(colours(test)) & which(colours(arrivals.samples))
    clean = colours(stream.source_test)
    assert (clean[:, 2] == 0).all()
    assert stream.source_test is not None
    assert torch.equal(clean[:, 0], stream.source_test.targets)
    assert which(clean) == which(colours(stream.tests[0]))
    assert stream.source is None


def test_tuning_has_other_images_and_the_extra_corruptions(make: Any) -> None:
    tune, evaluate = (make().stream(split, 0) for split in Split)
    assert [e.name for e in tune.experiences] == list(EXTRA_CORRUPTIONS)
    seen = [
        which(torch.cat([*arrived(stream), *map(colours, stream.tests)]))
        for stream in (tune, evaluate)
    ]
    assert not seen[0] & seen[1]
    assert [len(part) for part in seen] == [8, 32]


def test_the_images_that_arrive_are_always_the_same(make: Any) -> None:
    """As many of each class; the seed decides their order."""
    one, other = (arrived(make(samples=8).stream(Split.EVALUATE, seed)) for seed in (0, 1))
    assert len({frozenset(which(part)) for part in (*one, *other)}) == 1
    assert one[0][:, 0].bincount().tolist() == [2] * 4
    assert not torch.equal(one[0], other[0])


def test_all_images_are_the_protocol_of_some_papers(make: Any) -> None:
    stream = make(held_out=0.0, tuning_fraction=0.0).stream(Split.EVALUATE, 0)
    assert all(len(which(part)) == 4 * EACH for part in arrived(stream))
    assert not stream.tests


def test_a_list_says_which_images_count(make: Any, tmp_path: Path) -> None:
    wanted = [name(label, number) for number in (7, 2) for label in (3, 0, 1, 2)]
    (tmp_path / "list.txt").write_text("\n".join(wanted) + "\n")
    options = {"image_list": tmp_path / "list.txt", "held_out": 0.0, "tuning_fraction": 0.0}
    stream = make(**options).stream(Split.EVALUATE, 0)
    assert which(arrived(stream)[0]) == {(label, i) for label in range(4) for i in (2, 7)}
    assert make(**options).fingerprint() != make().fingerprint()
    (tmp_path / "list.txt").write_text("n01440764/ILSVRC2012_val_00050001.JPEG\n")
    with pytest.raises(UserError, match=r"names n01440764/ILSVRC2012_val_00050001\.JPEG, not"):
        make(**options).check(Split.EVALUATE)
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(UserError, match="names no image"):
        make(**options).check(Split.EVALUATE)
    with pytest.raises(UserError, match=r"gone.txt can't be read"):
        make(image_list=tmp_path / "gone.txt").check(Split.EVALUATE)


def test_clean_images_may_lie_in_one_folder(make: Any, original: Path) -> None:
    one, two = (
        make(root=original / root).stream(Split.EVALUATE, 0).source_test for root in ("val", "flat")
    )
    assert torch.equal(colours(one), colours(two))


def test_without_clean_images_only_answers_are_measured(make: Any) -> None:
    with pytest.raises(UserError, match=r"scenario\.root is not set.*held_out=0"):
        make(root=None).check(Split.EVALUATE)
    scenario = make(root=None, held_out=0.0, corruptions=("fog", "snow"))
    scenario.check(Split.EVALUATE)
    result = run(scenario, Source(), Conditions(device="cpu"))
    assert result.status == "complete"
    assert result.online["by_domain"]["samples"] == [32, 32]
    assert result.metrics["source_accuracy"] is None


def test_a_run_starts_from_the_weights_that_it_is_given(make: Any) -> None:
    scenario = make(corruptions=("fog", "snow"))
    result = run(scenario, Source(), Conditions(device="cpu"))
    stream = scenario.stream(Split.EVALUATE, 0)
    model = scenario.model(0, stream).eval()
    for test, found in zip(
        (stream.source_test, *stream.tests),
        (result.online["source_accuracy"][0], *result.accuracy_matrix[0]),
        strict=True,
    ):
        batch = test.take(torch.arange(len(test)))
        with torch.no_grad():
            right = (model(batch.inputs).argmax(1) == batch.targets).float().mean()
        assert found == pytest.approx(float(right))


def test_training_images_are_there_for_methods_that_look_at_them(
    make: Any, original: Path, tmp_path: Path
) -> None:
    stream = make(train=original / "train", train_samples=12).stream(Split.EVALUATE, 0)
    found = colours(stream.source)
    assert len(which(found)) == 12
    assert (found[:, 2] == 99).all()
    assert stream.source is not None
    assert torch.equal(found[:, 0], stream.source.targets)
    assert found[:, 0].bincount().tolist() == [3] * 4
    everything = make(train=original / "train", train_samples=0).stream(Split.EVALUATE, 0)
    assert everything.source is not None
    assert len(everything.source) == 40
    shutil.copytree(original / "train" / WNIDS[0], tmp_path / "train" / WNIDS[0])
    with pytest.raises(UserError, match="has 1 classes, not the same as the 4"):
        make(train=tmp_path / "train").stream(Split.EVALUATE, 0)


def test_what_does_not_fit_in_memory_stays_on_disk(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arrival in ("domains", "mixed"):
        held = make(arrival=arrival).stream(Split.EVALUATE, 0)
        assert isinstance(held.arrivals[0].samples.source, TensorSource)
        with monkeypatch.context() as patch:
            patch.setattr(chained, "_IN_MEMORY", 0)
            mapped = make(arrival=arrival).stream(Split.EVALUATE, 0)
        source = mapped.arrivals[0].samples.source
        assert isinstance(source, ChainedSource)
        assert all(isinstance(part.base, np.memmap) for part in source.parts)
        for a, b in zip(arrived(held), arrived(mapped), strict=True):
            assert torch.equal(a, b)


def test_made_from_the_clean_images(make: Any) -> None:
    """The published constants, on the images as the model sees clean ones."""
    scenario = make(published=None, corruptions=("contrast", "gaussian_noise"))
    scenario.check(Split.EVALUATE)
    stream = scenario.stream(Split.EVALUATE, 0)
    assert stream.facts["corrupted"] == "made"
    assert stream.source_test is not None
    every = torch.arange(len(stream.tests[0]))
    clean = stream.source_test.take(every).raw.numpy()
    found = stream.tests[0].take(every).raw.numpy()
    np.testing.assert_array_equal(found, corrupt(clean, "contrast", LEVEL, 0))


def test_a_missing_corruption_is_named(make: Any, original: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    for corruption in ("fog", "snow"):
        folder = Path(corruption, str(LEVEL))
        shutil.copytree(original / "published" / folder, few / folder)
    make(published=few, corruptions=("fog", "snow")).check(Split.EVALUATE)
    with pytest.raises(UserError, match=r"no folder .*gaussian_noise.*zenodo.org/records/2235448"):
        make(published=few).check(Split.EVALUATE)
    with pytest.raises(UserError, match=r"no folder .*speckle_noise"):
        make(published=few, corruptions=("fog", "snow")).check(Split.TUNE)
    with pytest.raises(UserError, match=r"no folder .*fog.[1-4]\."):
        make(published=few, corruptions=("fog",), arrival="gradual").check(Split.EVALUATE)


def test_a_missing_or_damaged_image_is_named(make: Any, original: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    for corruption in ("fog", "snow"):
        folder = Path(corruption, str(LEVEL))
        shutil.copytree(original / "published" / folder, few / folder)
    options = {"published": few, "corruptions": ("fog", "snow"), "held_out": 0.0}
    file = few / "snow" / str(LEVEL) / name(2, 3)
    file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"snow.*ILSVRC2012_val_00000014\.JPEG"):
        make(**options, tuning_fraction=0.0).stream(Split.EVALUATE, 0)
    file.unlink()
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000014\.JPEG should be there"):
        make(**options, tuning_fraction=0.0).stream(Split.EVALUATE, 0)


def test_a_model_that_is_not_trained_is_refused(make: Any) -> None:
    with pytest.raises(UserError, match="imagenet_c needs a trained model: backbone=resnet50"):
        make(backbone=ConvNet(widths=(4,))).check(Split.EVALUATE)
