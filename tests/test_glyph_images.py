"""Images of characters: the same seed the same bytes, and every one shows its character."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clbench import glyph_images
from clbench.errors import UserError
from clbench.glyph_catalogue import ROTATION, Face, faces, open_face
from clbench.glyph_images import CONTRAST, NOISE, load, render

CHARACTERS = "AДΨ∑=@☂"
LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="session")
def sans() -> tuple[Face, ...]:
    return tuple(face for face in faces() if face.family == "DejaVuSans")


@pytest.fixture(scope="session")
def images(sans: tuple[Face, ...]) -> np.ndarray:
    return render(CHARACTERS, [sans] * len(CHARACTERS), 300, seed=3)[0]


def test_shapes_types_and_balance(sans: tuple[Face, ...]) -> None:
    made, labels = render(CHARACTERS, [sans] * len(CHARACTERS), 5, size=24)
    assert made.shape == (35, 3, 24, 24)
    assert made.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == [label for label in range(7) for _ in range(5)]


def test_same_seed_same_bytes_other_seed_others(sans: tuple[Face, ...]) -> None:
    first, again, other = (
        render("AB", [sans] * 2, 40, seed=seed)[0].tobytes() for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_the_global_generators_stay_untouched(sans: tuple[Face, ...]) -> None:
    torch_before, numpy_before = torch.random.get_rng_state(), repr(np.random.get_state())
    render("A", [sans], 3)
    assert torch.equal(torch_before, torch.random.get_rng_state())
    assert repr(np.random.get_state()) == numpy_before


def test_a_characters_images_hang_on_no_other(sans: tuple[Face, ...]) -> None:
    alone, _ = render("Д", [sans], 50, seed=5)
    together, labels = render("AДB", [sans] * 3, 50, seed=5)
    np.testing.assert_array_equal(together[labels == 1], alone)


def test_no_two_images_are_the_same(images: np.ndarray) -> None:
    assert len({image.tobytes() for image in images}) == len(images)


def test_no_image_is_blank(images: np.ndarray) -> None:
    """Ink and background differ by the contrast, less the noise and the rounding to bytes."""
    luma = np.einsum("nchw,c->nhw", images / 255, LUMA)
    spread = luma.max((1, 2)) - luma.min((1, 2))
    assert spread.min() >= CONTRAST - 2 * NOISE - 1 / 255


def test_the_ink_is_apart_from_every_mixture_of_the_background() -> None:
    chance = torch.rand(20_000, 13, generator=torch.Generator().manual_seed(0))
    inked, first, second = (x[..., 0, 0] for x in glyph_images._colours(chance))
    luma = torch.tensor(LUMA, dtype=torch.float32)
    for colour in (inked, first, second):
        assert colour.min() >= -1e-6
        assert colour.max() <= 1 + 1e-6
    ends = torch.stack([(end - inked) @ luma for end in (first, second)])
    assert (ends.abs() >= CONTRAST - 1e-5).all()
    assert (ends[0] * ends[1] > 0).all(), "the two ends lie on either side of the ink"
    assert 0.4 < (ends[0] > 0).float().mean() < 0.6


def _ink(character: str, sans: tuple[Face, ...], n: int = 300, size: int = 32) -> torch.Tensor:
    fonts = {face: open_face(face) for face in sans}
    drawn, chance = glyph_images._prepare(character, sans, fonts, n, size, 0)
    return glyph_images._warp(drawn[chance.template], chance, size)[:, 0]


@pytest.mark.parametrize("character", ["@", '"', "∑", "=", "/", "_"])
@pytest.mark.parametrize("size", [16, 32])
def test_no_ink_is_cut_off(sans: tuple[Face, ...], character: str, size: int) -> None:
    ink = _ink(character, sans, size=size)
    frame = torch.ones(size, size, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    assert ink[:, frame].max() < 0.8
    sharp = ink.flatten(1).max(1).values
    torch.testing.assert_close(sharp, torch.ones_like(sharp))
    assert ink.min() >= 0


def test_place_size_and_slant_vary_as_documented(sans: tuple[Face, ...]) -> None:
    ink = _ink("=", sans, n=2000)
    line = torch.arange(32) - 15.5
    mass = ink.sum((1, 2))
    x, y = (ink * line).sum((1, 2)) / mass, (ink * line[:, None]).sum((1, 2)) / mass
    assert abs(x.mean()) < 0.5
    assert abs(y.mean()) < 0.5
    assert x.std() > 1
    assert y.std() > 3
    centred = torch.stack([line.expand(32, 32), line[:, None].expand(32, 32)])
    offset = centred - torch.stack([x, y], 1)[:, :, None, None]
    moments = torch.einsum("nhw,nahw,nbhw->nab", ink, offset, offset)
    slant = torch.rad2deg(
        torch.atan2(2 * moments[:, 0, 1], moments[:, 0, 0] - moments[:, 1, 1]) / 2
    )
    assert abs(slant.mean()) < 1
    assert ROTATION * 0.9 < slant.abs().quantile(0.99) < ROTATION * 1.2


def test_all_faces_weights_and_backgrounds_occur(sans: tuple[Face, ...]) -> None:
    fonts = {face: open_face(face) for face in sans}
    drawn, chance = glyph_images._prepare("R", sans, fonts, 600, 32, 0)
    assert len(drawn) == len(sans) * len(glyph_images.WEIGHTS)
    counts = torch.bincount(chance.template, minlength=len(drawn))
    assert counts.min() > 0.4 * counts.float().mean()
    pattern = glyph_images._pattern(chance, 32)
    assert pattern.min() >= 0
    assert pattern.max() <= 1
    plain = (pattern == 0).flatten(1).all(1)
    assert 0.25 < plain.float().mean() < 0.42
    bent = pattern[:, 0, :, 2:] + pattern[:, 0, :, :-2] - 2 * pattern[:, 0, :, 1:-1]
    straight = bent.abs().amax((1, 2)) < 1e-5
    assert 0.25 < (straight & ~plain).float().mean() < 0.42


def test_the_classes_can_be_learned(sans: tuple[Face, ...]) -> None:
    """Nearest class mean of the ink, free of colour: far above chance, far from perfect."""
    characters = "ADKRSXZ2"
    ink = torch.stack([_ink(character, sans, 400).flatten(1) for character in characters])
    ink = ink - ink.mean(2, keepdim=True)
    means = torch.nn.functional.normalize(ink[:, :200].mean(1), dim=1)
    found = (ink[:, 200:] @ means.T).argmax(2)
    right = (found == torch.arange(len(characters))[:, None]).float().mean()
    assert 3 / len(characters) < right < 0.99


def test_progress_is_told(sans: tuple[Face, ...]) -> None:
    told: list[tuple[int, int]] = []
    render("AB", [sans] * 2, 4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 8), (8, 8)]


def test_loaded_twice_rendered_once(
    sans: tuple[Face, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = render("AB", [sans] * 2, 6, seed=2)
    first = load(tmp_path, "AB", [sans] * 2, 6, seed=2)
    monkeypatch.setattr(glyph_images, "render", None)
    again = load(tmp_path, "AB", [sans] * 2, 6, seed=2)
    for found in (first, again):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    with pytest.raises(TypeError):
        load(tmp_path, "AB", [sans] * 2, 6, seed=3)


def test_mistakes_are_told(sans: tuple[Face, ...]) -> None:
    with pytest.raises(UserError, match="2 characters, but faces for 1"):
        render("AB", [sans], 1)
    with pytest.raises(UserError, match="No face is given to draw 'B'"):
        render("AB", [sans, ()], 1)
    with pytest.raises(UserError, match=r"'A'.*given twice"):
        render("AA", [sans] * 2, 1)
    with pytest.raises(UserError, match="draws nothing for ' '"):
        render(" ", [sans], 1)
    with pytest.raises(UserError, match="n_per_class=0"):
        render("A", [sans], 0)
    with pytest.raises(UserError, match="size=4"):
        render("A", [sans], 1, size=4)
    with pytest.raises(UserError, match="seed=-1"):
        render("A", [sans], 1, seed=-1)
