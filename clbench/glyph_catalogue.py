"""Which characters the font files that ship with matplotlib can draw, and who may use them.

A character becomes a class if a person can read it at 32x32 pixels and tell it from all others
whatever its size and slant. All decisions are arithmetic on integers over images that FreeType
and Pillow drew, so the same versions of these and of the font files give the same catalogue.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clbench import cache
from clbench.errors import UserError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FAMILIES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
"""Text families with Unicode character maps. The others hold pieces of formulas, private code
points, TeX's own encodings, or (Last Resort) a frame for every code point."""

ROTATION = 15.0
"""Degrees by which `glyph_images.render` turns a character either way."""

SOLID = 0.75
"""Largest inked part of the bounding box. Above it lie bars and blobs, from l, I, i, | and - to
full stops and squares: once size and slant vary, nothing tells them apart. A disc has 0.785."""

LEGIBLE = 0.85
"""Least correlation of a character with itself after a reduction to 16x16 pixels. Below it lie
playing cards, faces and hairline drawings."""

ALIKE = 0.90
"""Correlation of two characters, both scaled to the same size, at the worst slant, from which
they count as one. One character in two upright faces has a median of 0.88 to 0.98, so characters
above this differ no more than faces do: c and C, A and Α (Greek) and А (Cyrillic), but also
1 and l, ❷ and ❿."""

PROPORTIONS = 1.5
"""Factor between the proportions (width by height) of two characters up to which they are also
compared stretched to one square, which makes 0, O and o one. Between two upright faces, one
character's proportions differ by more than this in one case of twenty."""

_VERSION = 1
_EM = 160
_CANVAS = 64
_DETAIL = 24
_LEVELS = 127

Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Pool(Enum):
    """The three uses of characters. A character belongs to one of them for ever."""

    PRETRAINING = "pretraining"
    TUNING = "tuning"
    EVALUATION = "evaluation"


_SHARES = ((Pool.EVALUATION, 0.6), (Pool.PRETRAINING, 0.85), (Pool.TUNING, 1.0))


@dataclass(frozen=True)
class Face:
    """One font file.

    Attributes:
        name: The file's name without its ending, such as `DejaVuSans-BoldOblique`.
        family: One of `FAMILIES`.
        path: Where the file lies.
        digest: SHA-256 of its bytes, for cache keys.
    """

    name: str
    family: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Catalogue:
    """The characters that can be classes, and the faces that draw them.

    Attributes:
        characters: The classes on offer, in the order of their code points.
        faces: The faces, by name.
        drawable: `[characters, faces]`: which face draws which character.
    """

    characters: str
    faces: tuple[Face, ...]
    drawable: Bools

    def pool(self, pool: Pool, minimum_faces: int = 1, common: Sequence[str] = ()) -> str:
        """The characters of one pool in a fixed shuffled order: any prefix mixes the scripts.

        Args:
            pool: Which of the three disjoint pools.
            minimum_faces: How many faces at least must draw a character.
            common: Names of faces each of which must draw it (for fonts as domains).

        Returns:
            The characters, as one string.

        Raises:
            UserError: `common` names an unknown face.
        """
        index = {face.name: column for column, face in enumerate(self.faces)}
        unknown = [name for name in common if name not in index]
        if unknown:
            raise UserError(f"No face is called {unknown[0]}. Available: {', '.join(index)}.")
        enough = self.drawable.sum(axis=1) >= minimum_faces
        enough &= self.drawable[:, [index[name] for name in common]].all(axis=1)
        members = [c for c, ok in zip(self.characters, enough, strict=True) if ok]
        return "".join(sorted((c for c in members if pool_of(c) is pool), key=_draw_of_lots))

    def faces_of(self, characters: str) -> list[tuple[Face, ...]]:
        """For each character the faces that draw it.

        Raises:
            UserError: A character is not in the catalogue.
        """
        row = {character: index for index, character in enumerate(self.characters)}
        missing = [character for character in characters if character not in row]
        if missing:
            raise UserError(
                f"The character {missing[0]!r} (U+{ord(missing[0]):04X}) is not in the catalogue "
                "of glyphs. Take characters from Catalogue.pool."
            )
        return [
            tuple(f for f, ok in zip(self.faces, self.drawable[row[c]], strict=True) if ok)
            for c in characters
        ]


def pool_of(character: str) -> Pool:
    """The pool of a character: 60 % go to evaluation, 25 % to pre-training, 15 % to tuning.

    It hangs on a hash of the code point alone, so it never changes, whatever fonts are installed
    and whatever other characters exist, and every larger script occurs in every pool.
    """
    lot = _draw_of_lots(character)
    return next(pool for pool, below in _SHARES if lot < below)


def _draw_of_lots(character: str) -> float:
    digest = hashlib.sha256(f"clbench glyph U+{ord(character):04X}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def faces() -> tuple[Face, ...]:
    """The text faces among matplotlib's font files, by name.

    Raises:
        UserError: matplotlib's font files are not there.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = []
    for path in sorted(folder.glob("*.ttf")):
        family = "STIXGeneral" if path.stem.startswith("STIXGeneral") else path.stem.split("-")[0]
        if family in FAMILIES:
            found.append(Face(path.stem, family, path, _digest(path)))
    if not {face.name for face in found}.issuperset(FAMILIES):
        raise UserError(
            f"The folder {folder} lacks some of the font files {', '.join(FAMILIES)} that "
            "matplotlib ships. Install matplotlib again from its own wheel."
        )
    return tuple(found)


def catalogue(folder: Path) -> Catalogue:
    """The catalogue of the installed font files: made once in a few seconds, then read.

    Args:
        folder: The cache folder.

    Returns:
        About two thousand characters with DejaVu 2.37 and STIX 1.1.1, matplotlib's for years.
    """
    from PIL import __version__ as pillow
    from PIL import features

    found = faces()
    key = {
        "version": _VERSION,
        "faces": {face.name: face.digest for face in found},
        "pillow": pillow,
        "freetype": features.version("freetype2"),
        "limits": [ROTATION, SOLID, LEGIBLE, ALIKE, PROPORTIONS],
    }
    stored = cache.arrays(folder, "glyph_catalogue", key, lambda: _choose(found))
    characters = "".join(map(chr, stored["codepoints"].tolist()))
    return Catalogue(characters, found, stored["drawable"].astype(np.bool_))


def open_face(face: Face) -> ImageFont.FreeTypeFont:
    """The face at the size at which characters are drawn before they are reduced."""
    from PIL import ImageFont

    return ImageFont.truetype(str(face.path), _EM, layout_engine=ImageFont.Layout.BASIC)


def draw(
    font: ImageFont.FreeTypeFont, character: str, longest: int, canvas: int, weight: float = 0.0
) -> Bytes | None:
    """A character in grey, scaled so that its ink spans `longest` pixels and centred.

    Args:
        font: From `open_face`.
        character: One character.
        longest: Pixels of the longer side of its ink.
        canvas: Side of the square image in pixels.
        weight: Pixels (of the result) by which the outline grows on either side.

    Returns:
        uint8 `[canvas, canvas]`, ink 255; None when the face draws nothing.
    """
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top:
        return None
    stroke = round(weight * max(right - left, bottom - top) / longest)
    size = (int(right - left) + 2 * stroke, int(bottom - top) + 2 * stroke)
    image = Image.new("L", size)
    origin = (stroke - left, stroke - top)
    ImageDraw.Draw(image).text(origin, character, fill=255, font=font, stroke_width=stroke)
    box = image.getbbox()
    if box is None:
        return None
    scale = longest / max(box[2] - box[0], box[3] - box[1])
    size = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
    ink = image.resize(size, Image.Resampling.BILINEAR, box=box)
    result = np.zeros((canvas, canvas), np.uint8)
    y, x = (canvas - size[1]) // 2, (canvas - size[0]) // 2
    result[y : y + size[1], x : x + size[0]] = np.asarray(ink)
    return result


def _choose(found: Sequence[Face]) -> dict[str, npt.NDArray[Any]]:
    """The code points that become classes, and which faces draw them."""
    drawn = [_drawn_by(face) for face in found]
    references = [
        _references(face, codepoints)
        for face, codepoints in zip(found, drawn, strict=True)
        if face.name in FAMILIES
    ]
    judged = {c: True for reference in references for c in reference}
    for reference in references:
        for codepoint, image in reference.items():
            judged[codepoint] &= _readable(image)
    count = {c: sum(c in face for face in drawn) for c, good in judged.items() if good}
    candidates = sorted(count, key=lambda c: (-count[c], c))
    kept = sorted(_distinct(candidates, references))
    drawable = np.array([[c in face for face in drawn] for c in kept], np.bool_)
    return {"codepoints": np.array(kept, np.int32), "drawable": drawable}


def _drawn_by(face: Face) -> set[int]:
    """The code points for which a face has ink and which stand for themselves.

    Letters, numbers, signs and punctuation; no marks that combine, no modifiers. No character
    that Unicode decomposes into others (é, ½, ①, ﬁ, 𝔸): those are variants of a class. No Braille:
    where the dots stand in their cell is the message, and place says nothing here.
    """
    from matplotlib.ft2font import FT2Font

    mapped = sorted(FT2Font(str(face.path)).get_charmap())
    font = open_face(face)
    result = set()
    for codepoint in mapped:
        character = chr(codepoint)
        category = unicodedata.category(character)
        if category[0] not in "LNSP" or category in ("Lm", "Sk"):
            continue
        braille = unicodedata.name(character, "").startswith("BRAILLE")
        if braille or unicodedata.decomposition(character):
            continue
        _, top, _, bottom = font.getbbox(character)
        if bottom > top:
            result.add(codepoint)
    return result


def _references(face: Face, codepoints: set[int]) -> dict[int, Image.Image]:
    """Reference images, small enough in their canvas to turn without losing a corner."""
    from PIL import Image

    font = open_face(face)
    longest = int(_CANVAS / 2**0.5)
    images = ((c, draw(font, chr(c), longest, _CANVAS)) for c in sorted(codepoints))
    return {c: Image.fromarray(image) for c, image in images if image is not None}


def _readable(image: Image.Image) -> bool:
    """Whether a reference is more than a bar or blob and survives a reduction."""
    from PIL import Image

    crop = image.crop(image.getbbox())
    grey = np.asarray(crop, np.int64)
    if grey.sum() > SOLID * 255 * grey.size:
        return False
    longest = max(crop.size)
    square = Image.new("L", (longest, longest))
    square.paste(crop, ((longest - crop.width) // 2, (longest - crop.height) // 2))
    small = square.resize((16, 16), Image.Resampling.BOX)
    back = small.resize(square.size, Image.Resampling.BICUBIC)
    pair = [np.asarray(x, np.int64).reshape(1, -1) for x in (square, back)]
    return bool(_correlations(*pair).item() >= LEGIBLE)


def _distinct(
    candidates: Sequence[int], references: Sequence[Mapping[int, Image.Image]]
) -> list[int]:
    """Candidates in order, without those too like one that was kept, in any reference face."""
    alike = np.zeros((len(candidates), len(candidates)), np.bool_)
    for reference in references:
        rows = np.array([row for row, c in enumerate(candidates) if c in reference])
        alike[np.ix_(rows, rows)] |= _alike([reference[candidates[row]] for row in rows])
    kept: list[int] = []
    for row in range(len(candidates)):
        if not alike[row, kept].any():
            kept.append(row)
    return [candidates[row] for row in kept]


def _alike(images: Sequence[Image.Image]) -> Bools:
    """Which references `[images, images]` a person could take for each other."""
    squares = [_stretched(image) for image in images]
    boxes = np.array([image.getbbox() for image in images], np.float64)
    slim = np.log((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]))
    square, upright = _descriptors(squares, 0.0), _descriptors(images, 0.0)
    found: Bools = np.abs(np.subtract.outer(slim, slim)) <= np.log(PROPORTIONS)
    found &= _correlations(square, square) > ALIKE
    for angle in np.linspace(0.0, 2 * ROTATION, 4):
        found |= _correlations(upright, _descriptors(images, float(angle))) > ALIKE
    return np.logical_or(found, found.T)


def _stretched(image: Image.Image) -> Image.Image:
    """The ink of a reference, stretched to the square that it would fill at most."""
    from PIL import Image

    longest = int(_CANVAS / 2**0.5)
    margin = (_CANVAS - longest) // 2
    square = Image.new("L", image.size)
    ink = image.resize((longest, longest), Image.Resampling.BICUBIC, box=image.getbbox())
    square.paste(ink, (margin, margin))
    return square


def _descriptors(images: Sequence[Image.Image], angle: float) -> Floats:
    """Turned, blurred and reduced images as whole numbers `[images, pixels]`.

    The numbers are so small that sums of products of them are exact in float32 in any order.
    """
    from PIL import Image, ImageFilter

    blur = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1))
    reduced = []
    for image in images:
        turned = image.rotate(angle, Image.Resampling.BILINEAR)
        small = turned.resize((_DETAIL, _DETAIL), Image.Resampling.BOX).filter(blur)
        reduced.append(np.asarray(small).ravel() >> 1)
    return np.array(reduced, np.float32)


def _correlations(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Pearson correlations `[left, right]` of whole numbers, exact up to the last division.

    Args:
        left: `[left, pixels]`, products and their sums exact in its own type.
        right: `[right, pixels]`, likewise.
    """
    pixels = left.shape[1]
    result: npt.NDArray[np.float64] = (left @ right.T).astype(np.float64)
    sums, scales = [], []
    for side in (left, right):
        whole = side.astype(np.int64)
        sums.append(whole.sum(1))
        spread = pixels * (whole * whole).sum(1) - sums[-1] ** 2
        scales.append(np.sqrt(np.maximum(spread, 1)))
    result *= pixels
    result -= np.multiply.outer(*sums)
    result /= np.multiply.outer(*scales)
    return result


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
