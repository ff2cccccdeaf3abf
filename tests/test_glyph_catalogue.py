"""Which characters become glyph classes, and that their three pools never meet."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from clbench import glyph_catalogue
from clbench.errors import UserError
from clbench.glyph_catalogue import FAMILIES, Catalogue, Pool, catalogue, draw, open_face, pool_of


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return catalogue(tmp_path_factory.mktemp("cache"))


def test_the_pools_part_the_catalogue(glyphs: Catalogue) -> None:
    pools = [glyphs.pool(pool) for pool in Pool]
    assert sum(map(len, pools)) == len(glyphs.characters) == len(set(glyphs.characters))
    assert set().union(*pools) == set(glyphs.characters)


def test_the_pools_are_large(glyphs: Catalogue) -> None:
    assert len(glyphs.pool(Pool.EVALUATION)) >= 1000
    assert len(glyphs.pool(Pool.TUNING)) >= 200
    assert len(glyphs.pool(Pool.PRETRAINING)) >= 400
    assert len(glyphs.pool(Pool.EVALUATION, common=FAMILIES)) >= 100


def test_a_characters_pool_never_changes() -> None:
    """The promise holds across versions, so these letters are pinned."""
    pools = "".join(pool_of(character).value[0] for character in "ABCDEFGHIJΓΔΘΛΞБДЖЗИ←↑→↓∀∃∈")
    assert pools == "tepteepeteeeepeepteeeeepept"


@pytest.mark.parametrize("script", ["LATIN", "GREEK", "CYRILLIC", "ARABIC", "HEBREW", "GEORGIAN"])
@pytest.mark.parametrize("pool", Pool)
def test_scripts_occur_in_every_pool(glyphs: Catalogue, pool: Pool, script: str) -> None:
    members = glyphs.pool(pool)
    assert any(unicodedata.name(character, "").startswith(script) for character in members)


def test_a_prefix_of_a_pool_mixes_the_scripts(glyphs: Catalogue) -> None:
    first = [unicodedata.name(c, "?").split()[0] for c in glyphs.pool(Pool.EVALUATION)[:100]]
    assert len(set(first)) >= 20
    assert max(map(first.count, first)) <= 40


def test_chosen_twice_the_same_characters_stay() -> None:
    stix = [face for face in glyph_catalogue.faces() if face.family == "STIXGeneral"]
    first, again = glyph_catalogue._choose(stix), glyph_catalogue._choose(stix)
    for part, array in first.items():
        np.testing.assert_array_equal(array, again[part])


@pytest.mark.parametrize(
    "alike",
    ["AΑА", "BΒВ", "0OΟОoοо", "Cc", "Ss", "Vv", "Ww", "Xx", "Zz", "Il1|", "MΜМ", "Pp", "→⟶"],
)
def test_of_characters_that_look_alike_at_most_one_stays(glyphs: Catalogue, alike: str) -> None:
    assert sum(character in glyphs.characters for character in alike) <= 1


@pytest.mark.parametrize("different", ["A4", "ДЖ", "23", "ΔΨ", "<>", "KR", "ЮЯ", "+=", "אד"])
def test_characters_that_differ_both_stay(glyphs: Catalogue, different: str) -> None:
    assert all(character in glyphs.characters for character in different)


@pytest.mark.parametrize(
    "unreadable", [" ", "\u0301", "-", "–", "|", ".", "·", "■", "ˆ", "é", "½", "⠇"]
)
def test_what_nobody_could_read_or_name_is_left_out(glyphs: Catalogue, unreadable: str) -> None:
    assert unreadable not in glyphs.characters


def test_faces_draw_what_they_claim(glyphs: Catalogue) -> None:
    characters = glyphs.characters[::40]
    fonts = {face: open_face(face) for face in glyphs.faces}
    for character, usable in zip(characters, glyphs.faces_of(characters), strict=True):
        assert usable
        for face in usable:
            image = draw(fonts[face], character, 60, 64)
            assert image is not None
            assert image.max() > 200


def test_faces_can_be_demanded(glyphs: Catalogue) -> None:
    for characters in (glyphs.pool(Pool.TUNING, 8), glyphs.pool(Pool.TUNING, common=FAMILIES)):
        assert 0 < len(characters) < len(glyphs.pool(Pool.TUNING))
    for usable in glyphs.faces_of(glyphs.pool(Pool.TUNING, 8)):
        assert len(usable) >= 8
    for usable in glyphs.faces_of(glyphs.pool(Pool.TUNING, common=FAMILIES)):
        assert {face.name for face in usable}.issuperset(FAMILIES)


def test_unknown_faces_and_characters_are_named(glyphs: Catalogue) -> None:
    with pytest.raises(UserError, match=r"No face is called Arial\. Available: DejaVuSans"):
        glyphs.pool(Pool.TUNING, common=["Arial"])
    with pytest.raises(UserError, match=r"U\+2014.*Catalogue\.pool"):
        glyphs.faces_of("—")


def test_missing_font_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match="Install matplotlib again"):
        glyph_catalogue.faces()


def test_a_drawn_character_fills_its_box_and_grows_with_its_weight(glyphs: Catalogue) -> None:
    (face,) = [face for face in glyphs.faces if face.name == "DejaVuSans"]
    font = open_face(face)
    ink = []
    for weight in (0.0, 1.0, 2.0):
        image = draw(font, "H", 48, 64, weight)
        assert image is not None
        rows = np.flatnonzero(image.any(1))
        assert (rows[0], rows[-1]) == (8, 55)
        ink.append(image.sum(dtype=np.int64))
    assert ink[0] < ink[1] < ink[2]
    assert draw(font, " ", 48, 64) is None


def test_correlation_is_pearsons() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 128, (2, 6, 576)).astype(np.float32)
    found = glyph_catalogue._correlations(left, right)
    np.testing.assert_allclose(found, np.corrcoef(left, right)[:6, 6:], atol=1e-12)


def test_sums_of_descriptors_are_exact_in_any_order() -> None:
    """Otherwise two machines could disagree about a pair at the threshold."""
    (face,) = [face for face in glyph_catalogue.faces() if face.name == "STIXGeneral"]
    images = list(glyph_catalogue._references(face, set(map(ord, "ABC■W@"))).values())
    found = glyph_catalogue._descriptors(images, 10.0)
    np.testing.assert_array_equal(found, found.round())
    assert found.shape[1] * int(found.max()) ** 2 < 2**24
    assert found.max() > 100
