"""Rendered characters as streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.errors import UserError
from clbench.glyph_catalogue import faces
from clbench.glyph_datasets import MINIMUM_FACES, known
from clbench.nn.backbones import MLP
from clbench.samples import Samples
from clbench.testing import check_scenario
from clbench.types import Setting, Split
from scenarios.glyphs import FontDomains, Glyphs


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue takes seconds to make: all tests share one."""
    return tmp_path_factory.mktemp("glyphs")


def glyphs(cache: Path, **options: Any) -> Glyphs:
    options = {"n_classes": 12, "n_experiences": 4, "image_size": 16, **options}
    options = {"train_per_class": 6, "test_per_class": 3, **options}
    return Glyphs(backbone=MLP(hidden=(8,)), cache_dir=cache, **options)


def fonts(cache: Path, **options: Any) -> FontDomains:
    options = {"n_classes": 5, "image_size": 16, "train_per_class": 6, **options}
    return FontDomains(backbone=MLP(hidden=(8,)), cache_dir=cache, test_per_class=3, **options)


def characters(scenario: Glyphs | FontDomains, split: Split, seed: int = 0) -> list[str]:
    return list(scenario.stream(split, seed).facts["class_names"])


def test_glyphs_conform(cache: Path) -> None:
    check_scenario(glyphs(cache))


def test_font_domains_conform(cache: Path) -> None:
    check_scenario(fonts(cache))


def test_splits_and_the_pool_for_pretraining_share_no_character(cache: Path) -> None:
    scenario = glyphs(cache)
    tune, evaluate = (characters(scenario, split) for split in Split)
    before = scenario.pretraining_images(12)
    assert len({*tune, *evaluate, *before.class_names}) == 36
    assert (len(before.train), len(before.test)) == (72, 36)
    assert before.image_shape == (3, 16, 16)


def test_pretraining_can_have_the_whole_pool(cache: Path) -> None:
    scenario = glyphs(cache, train_per_class=1, test_per_class=1, image_size=8)
    assert len(scenario.pretraining_images().class_names) > 100


def test_sizes(cache: Path) -> None:
    stream = glyphs(cache).stream(Split.EVALUATE, 0)
    assert [len(e.train or ()) for e in stream.experiences] == [18] * 4
    assert [len(t) for t in stream.tests] == [9] * 4
    for samples, count in ((stream.experiences[0].train, 6), (stream.tests[0], 3)):
        assert isinstance(samples, Samples)
        assert samples.targets.bincount().tolist() == [count] * 3


def test_the_seed_orders_the_same_characters(cache: Path) -> None:
    one, two = (characters(glyphs(cache), Split.EVALUATE, seed) for seed in (0, 1))
    assert one != two
    assert sorted(one) == sorted(two)


def test_fewer_classes_are_a_part_of_the_same_dataset(cache: Path) -> None:
    few, many = (glyphs(cache, n_classes=n).images(Split.EVALUATE) for n in (8, 12))
    assert many.class_names[:8] == few.class_names
    assert torch.equal(few.train.gather(torch.arange(48)), many.train.gather(torch.arange(48))), (
        "a character's images do not hang on the other characters"
    )


def test_every_character_has_several_faces(cache: Path) -> None:
    available = known(cache)
    for split in Split:
        for drawn_by in available.faces_of("".join(characters(glyphs(cache), split))):
            assert len(drawn_by) >= MINIMUM_FACES


def test_a_domain_is_a_family_of_faces(cache: Path) -> None:
    scenario = fonts(cache)
    stream = scenario.stream(Split.EVALUATE, 0)
    assert scenario.setting is Setting.DOMAIN_INCREMENTAL
    assert {e.name for e in stream.experiences} == {face.family for face in faces()}
    for experience, test in zip(stream.experiences, stream.tests, strict=True):
        assert experience.train is not None
        assert experience.classes == (0, 1, 2, 3, 4)
        assert experience.train.targets.bincount().tolist() == [6] * 5
        assert test.targets.bincount().tolist() == [3] * 5


def test_a_domain_can_be_a_single_face(cache: Path) -> None:
    count = len(faces())
    stream = fonts(cache, n_experiences=count, n_classes=2).stream(Split.EVALUATE, 0)
    assert {e.name for e in stream.experiences} == {face.name for face in faces()}


def test_domains_show_other_shapes_of_the_same_characters(cache: Path) -> None:
    stream = fonts(cache).stream(Split.EVALUATE, 0)
    seen = []
    for experience in stream.experiences:
        assert experience.train is not None
        seen.append(experience.train.take(torch.arange(30)).raw)
    for i in range(len(seen)):
        for j in range(i):
            assert not torch.equal(seen[i], seen[j])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experiences": 5}, "does not divide the 12 classes"),
        ({"n_classes": 7, "n_experiences": 2}, "does not divide the 7 classes"),
    ],
)
def test_experiences_must_divide_the_classes(
    options: dict[str, int], message: str, cache: Path
) -> None:
    with pytest.raises(UserError, match=message):
        glyphs(cache, **options).check(Split.EVALUATE)


def test_experiences_must_divide_the_faces(cache: Path) -> None:
    with pytest.raises(UserError, match=r"n_experiences=3 does not divide the \d+ faces"):
        fonts(cache, n_experiences=3).check(Split.EVALUATE)
    fonts(cache, n_experiences=len(faces())).check(Split.EVALUATE)


def test_more_characters_than_there_are(cache: Path) -> None:
    with pytest.raises(UserError, match=r"the tuning pool has \d+ characters"):
        glyphs(cache, n_classes=2000).images(Split.TUNE)
    with pytest.raises(UserError, match=r"the evaluation pool has \d+ characters"):
        fonts(cache, n_classes=2000).domains(Split.EVALUATE, 0)


@pytest.mark.parametrize(
    "options", [{"n_classes": 0}, {"train_per_class": 0}, {"test_per_class": 0}, {"image_size": 7}]
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], cache: Path) -> None:
    with pytest.raises(UserError, match="out of range"):
        Glyphs(backbone=MLP(), cache_dir=cache, **options)


def test_defaults_have_enough_characters(cache: Path) -> None:
    """The YAMLs' numbers of classes, for both splits."""
    from clbench.glyph_catalogue import Pool

    available = known(cache)
    for pool in (Pool.TUNING, Pool.EVALUATION):
        assert len(available.pool(pool, MINIMUM_FACES)) >= Glyphs(backbone=MLP()).n_classes
        common = [face.name for face in faces()]
        assert len(available.pool(pool, 1, common)) >= FontDomains(backbone=MLP()).n_classes


def test_the_fonts_are_part_of_the_identity(cache: Path) -> None:
    found = glyphs(cache).fingerprint()
    assert found == fonts(cache).fingerprint()
    assert len(found["fonts"]) == 64
