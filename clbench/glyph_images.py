"""Small colour images of characters: each another face, place, slant, size, weight and colours.

Every character is drawn once per face and weight, large and grey; samples are then warped and
coloured hundreds at a time. The images of a character depend on the seed, its faces and that
character alone, not on which others are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clbench import cache
from clbench.errors import UserError
from clbench.glyph_catalogue import ROTATION, Face, draw, open_face

if TYPE_CHECKING:
    from PIL import ImageFont

CONTRAST = 0.35
"""Least difference of luma (0.299 R + 0.587 G + 0.114 B, of 1) between ink and any background
pixel, before noise."""

NOISE = 0.04
"""Largest amplitude of the uniform noise that is added to each value, of 1."""

WEIGHTS = (0.0, 0.5, 1.0, 1.5)
"""By how much the outline grows on either side: in 1/64 of the drawn character's longer side."""

SIZES = (0.6, 0.95)
"""Longer side of the character in the image, as a part of the image's side. A slanted character
that would not fit is reduced until it does."""

_VERSION = 1
_CANVAS = 64
_LONGEST = 60
_CHUNK = 256
_LUMA = (0.299, 0.587, 0.114)
_SCALARS = 21


@dataclass(frozen=True)
class _Chance:
    """What decides some samples, all of it uniform.

    Attributes:
        template: int64 `[samples]`, which of the drawn images.
        scalars: `[samples, 21]` in [0, 1).
        texture: `[samples, 1, 5, 5]` in [0, 1).
        noise: uint8 `[samples, 3, size, size]`.
    """

    template: Tensor
    scalars: Tensor
    texture: Tensor
    noise: Tensor

    def parts(self) -> Iterator[_Chance]:
        fields = (self.template, self.scalars, self.texture, self.noise)
        for part in zip(*(field.split(_CHUNK) for field in fields), strict=True):
            yield _Chance(*part)


def load(
    folder: Path,
    characters: str,
    faces: Sequence[Sequence[Face]],
    n_per_class: int,
    size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The arrays of `render`, made once and then mapped from the cache folder."""

    def make() -> dict[str, npt.NDArray[np.generic]]:
        images, labels = render(characters, faces, n_per_class, size, seed, progress)
        return {"images": images, "labels": labels}

    from PIL import __version__ as pillow
    from PIL import features

    key = {
        "version": _VERSION,
        "characters": characters,
        "faces": [[face.name for face in usable] for usable in faces],
        "fonts": {face.name: face.digest for usable in faces for face in usable},
        "n_per_class": n_per_class,
        "size": size,
        "seed": seed,
        "look": [ROTATION, CONTRAST, NOISE, WEIGHTS, SIZES],
        "pillow": pillow,
        "freetype": features.version("freetype2"),
    }
    stored = cache.arrays(folder, "glyph_images", key, make)
    return stored["images"], stored["labels"]


def render(
    characters: str,
    faces: Sequence[Sequence[Face]],
    n_per_class: int,
    size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images of characters, the same number of each.

    Args:
        characters: The classes, in the order of their labels; see `Catalogue.pool`.
        faces: For each character the faces to draw it with, each equally likely; see
            `Catalogue.faces_of`.
        n_per_class: Images of each character.
        size: Side of the images in pixels.
        seed: Decides the images; not negative.
        progress: Called with the images made and the images wanted.

    Returns:
        Images uint8 `[samples, 3, size, size]`, RGB, all of one character together, and labels
        int64 `[samples]`.

    Raises:
        UserError: A character without a face, one given twice, a face that draws nothing for
            its character, or a number out of range.
    """
    _check(characters, faces, n_per_class, size, seed)
    fonts = {face: open_face(face) for usable in faces for face in usable}
    images = np.empty((len(characters) * n_per_class, 3, size, size), np.uint8)
    done = 0
    for character, usable in zip(characters, faces, strict=True):
        templates, chance = _prepare(character, usable, fonts, n_per_class, size, seed)
        for part in chance.parts():
            made = _colour(_warp(templates[part.template], part, size), part)
            images[done : done + len(made)] = made.numpy()
            done += len(made)
        if progress is not None:
            progress(done, len(images))
    return images, np.repeat(np.arange(len(characters)), n_per_class)


def _check(
    characters: str, faces: Sequence[Sequence[Face]], n_per_class: int, size: int, seed: int
) -> None:
    if len(faces) != len(characters):
        raise UserError(
            f"{len(characters)} characters, but faces for {len(faces)}: give one sequence each."
        )
    for index, (character, usable) in enumerate(zip(characters, faces, strict=True)):
        if not usable:
            raise UserError(f"No face is given to draw {_name(character)} with.")
        if character in characters[:index]:
            raise UserError(f"{_name(character)} is given twice; a class is one character.")
    for name, value, least in (
        ("n_per_class", n_per_class, 1),
        ("size", size, 8),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"{name}={value} is too small: at least {least}.")


def _name(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def _prepare(
    character: str,
    usable: Sequence[Face],
    fonts: Mapping[Face, ImageFont.FreeTypeFont],
    n: int,
    size: int,
    seed: int,
) -> tuple[Tensor, _Chance]:
    """The drawn images `[templates, 64, 64]` in [0, 1] that n samples need, and their chances."""
    generator = np.random.default_rng([seed, ord(character)])
    pick = generator.integers(len(usable) * len(WEIGHTS), size=n)
    chance = (
        generator.random((n, _SCALARS), dtype=np.float32),
        generator.random((n, 1, 5, 5), dtype=np.float32),
        generator.integers(0, 256, (n, 3, size, size), dtype=np.uint8),
    )
    needed, template = np.unique(pick, return_inverse=True)
    drawn = []
    for which in needed.tolist():
        face, weight = usable[which // len(WEIGHTS)], WEIGHTS[which % len(WEIGHTS)]
        image = draw(fonts[face], character, _LONGEST, _CANVAS, weight)
        if image is None:
            raise UserError(f"The face {face.name} draws nothing for {_name(character)}.")
        drawn.append(image)
    templates = torch.from_numpy(np.stack(drawn)).float() / 255
    tensors = (torch.from_numpy(array) for array in chance)
    return templates, _Chance(torch.from_numpy(template), *tensors)


def _warp(templates: Tensor, chance: _Chance, size: int) -> Tensor:
    """Turned, scaled, moved and slightly blurred ink `[samples, 1, size, size]`, each up to 1.

    The ink's bounding box after the turn decides how far it may move, so none is cut off.
    """
    turn, grow, right, down, blur = chance.scalars[:, :5].unbind(1)
    angle = torch.deg2rad((2 * turn - 1) * ROTATION)
    cos, sin = angle.cos(), angle.sin()
    ink = templates > 0
    wide, high = ((_CANVAS - 2 * ink.any(side).float().argmax(1)) / _LONGEST for side in (1, 2))
    reach_x, reach_y = cos * wide + sin.abs() * high, sin.abs() * wide + cos * high
    limit = SIZES[1]
    scale = SIZES[0] + grow * (SIZES[1] - SIZES[0])
    scale = torch.minimum(scale, limit / torch.maximum(reach_x, reach_y))
    x = (2 * right - 1) * (limit - scale * reach_x).clamp_min(0)
    y = (2 * down - 1) * (limit - scale * reach_y).clamp_min(0)
    zoom = _LONGEST / _CANVAS / scale
    line = (torch.arange(2 * size) + 0.5) / size - 1
    from_x, from_y = line - x.unsqueeze(1), line - y.unsqueeze(1)
    across, along = (zoom * cos).unsqueeze(1), (zoom * sin).unsqueeze(1)
    grid_x = (across * from_x).unsqueeze(1) + (along * from_y).unsqueeze(2)
    grid_y = (across * from_y).unsqueeze(2) - (along * from_x).unsqueeze(1)
    grid = torch.stack([grid_x, grid_y], 3)
    fine = F.grid_sample(templates.unsqueeze(1), grid, align_corners=False)
    image = _blur(F.avg_pool2d(fine, 2), 0.25 * blur.view(-1, 1, 1, 1))
    return image / image.amax((1, 2, 3), keepdim=True)


def _blur(images: Tensor, side: Tensor) -> Tensor:
    """Three taps in each direction: `side`, 1 - 2 `side`, `side`."""
    padded = F.pad(images, (1, 1, 0, 0))
    images = images + side * (padded[..., :-2] + padded[..., 2:] - 2 * images)
    padded = F.pad(images, (0, 0, 1, 1))
    return images + side * (padded[..., :-2, :] + padded[..., 2:, :] - 2 * images)


def _colour(ink: Tensor, chance: _Chance) -> Tensor:
    """Coloured ink on a coloured background with a little noise: uint8 `[samples, 3, H, W]`."""
    inked, first, second = _colours(chance.scalars[:, 5:18])
    ground = torch.lerp(first, second, _pattern(chance, ink.shape[-1]))
    image = torch.lerp(ground, inked, ink)
    amplitude = NOISE * chance.scalars[:, 18].view(-1, 1, 1, 1)
    image += (chance.noise * (2 / 255) - 1) * amplitude
    return (image * 255).round_().clamp_(0, 255).to(torch.uint8)


def _colours(chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ink and the two ends of the background, `[samples, 3, 1, 1]` in [0, 1].

    Both ends are at least `CONTRAST` lighter than the ink, or both darker; so is every mixture.

    Args:
        chance: `[samples, 13]` in [0, 1).
    """
    flip, dark, *light = chance[:, :4].unbind(1)
    low = dark * (1 - CONTRAST)
    lumas = torch.stack([low, *(low + CONTRAST + u * (1 - CONTRAST - low) for u in light)], 1)
    lumas = torch.where(flip.unsqueeze(1) < 0.5, lumas, 1 - lumas).unsqueeze(2)
    colour = chance[:, 4:].view(-1, 3, 3)
    tint = colour - (colour * torch.tensor(_LUMA)).sum(2, keepdim=True)
    room = torch.where(tint > 0, 1 - lumas, lumas) / tint.abs().clamp_min(1e-6)
    made = lumas + tint * room.amin(2, keepdim=True).clamp_max(1)
    inked, first, second = made.unsqueeze(3).unsqueeze(4).unbind(1)
    return inked, first, second


def _pattern(chance: _Chance, size: int) -> Tensor:
    """How the background passes from one colour to the other, `[samples, 1, size, size]` in [0, 1].

    A third is plain, a third runs in one direction, a third is a coarse texture.
    """
    kind, direction = chance.scalars[:, 19:21, None, None, None].unbind(1)
    angle = 2 * torch.pi * direction
    line = torch.linspace(-1, 1, size)
    cos, sin = angle.cos(), angle.sin()
    ramp = (line * cos + line.unsqueeze(1) * sin) / (cos.abs() + sin.abs())
    texture = F.interpolate(chance.texture, (size, size), mode="bicubic", align_corners=True)
    chosen = torch.where(kind < 2 / 3, (ramp + 1) / 2, texture)
    return torch.where(kind < 1 / 3, 0.0, chosen).clamp(0, 1)
