"""Frost: ice laid over the image, from the published photos or from a texture made here."""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from clbench.corruptions.draws import Draws, Floats
from clbench.corruptions.images import Images, luma
from clbench.corruptions.weather import plasma
from clbench.errors import UserError

_PHOTOS = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
_SIDE = 640
_CRYSTALS = 2600
_RIBS = 14
_RIB_ANGLE = np.pi / 3
# Mean and standard deviation of the red, green and blue levels of each photo.
_LEVELS = (
    ((77.7, 149.1, 165.7), (26.9, 16.5, 15.3)),
    ((200.8, 205.4, 214.5), (21.4, 22.1, 22.6)),
    ((200.8, 205.4, 214.5), (21.4, 22.1, 22.6)),
    ((137.6, 152.8, 165.2), (28.5, 28.5, 29.9)),
    ((112.4, 123.4, 134.8), (44.4, 43.3, 41.7)),
)


def frost_source(frost_folder: Path | None) -> Literal["published photos", "procedural texture"]:
    """What `corrupt` lays over images with this folder; to be told beside every result."""
    return "procedural texture" if frost_folder is None else "published photos"


def frost(
    images: Images, draws: Draws, image: float, ice: float, stride: int, folder: Path | None
) -> Images:
    """image x + ice (a random crop of one of five photos), in levels, cut off to 0 ... 255.

    **Differs from the source** without a folder: five textures stand in for the photos. Each has
    the mean and standard deviation of a photo's channels, and feathers of ice and shading whose
    differences between near pixels are about those of the photos.

    Args:
        images: [N, C, H, W].
        draws: Chooses photos and crops.
        image: Factor of the image.
        ice: Factor of the ice.
        stride: Every how manieth pixel of a photo is used: 5 is OpenCV's scaling by 0.2.
        folder: Of frost1.png to frost5.jpg. The source has six, and never uses the last.

    Raises:
        UserError: If a photo is missing, unreadable or not larger than the images.
    """
    height, width = images.shape[2:]
    which = draws.integers("photo", len(_PHOTOS))
    place = draws.uniform("crop", 2)
    result = np.empty_like(images)
    for index in np.unique(which):
        sheet = _texture(int(index)) if folder is None else _photo(folder / _PHOTOS[index])
        sheet = sheet[:, stride // 2 :: stride, stride // 2 :: stride]
        if images.shape[1] == 1:
            sheet = luma(sheet)
        spare = np.array(sheet.shape[1:]) - (height, width)
        if spare.min() < 1:
            raise UserError(
                f"Frost needs images smaller than {sheet.shape[1]}x{sheet.shape[2]} pixels with "
                f"these constants, not {height}x{width}. Leave out this corruption."
            )
        windows = np.lib.stride_tricks.sliding_window_view(sheet, (height, width), (1, 2))
        chosen = which == index
        top, left = (place[chosen] * spare).astype(np.int64).T
        layer = windows[:, top, left].swapaxes(0, 1)
        result[chosen] = np.clip(image * images[chosen] + ice * layer, 0, 255).astype(np.uint8)
    return result


@lru_cache(maxsize=len(_PHOTOS))
def _photo(path: Path) -> Floats:
    """[3, H, W] levels."""
    try:
        with Image.open(path) as photo:
            return np.asarray(photo.convert("RGB"), np.float64).transpose(2, 0, 1)
    except OSError as error:
        raise UserError(
            f"The photo {path} can't be read: {error}. Give a folder with {', '.join(_PHOTOS)}, "
            "or none, for procedural textures."
        ) from error


@lru_cache(maxsize=len(_PHOTOS))
def _texture(index: int) -> Floats:
    """[3, side, side] levels that stand in for photo `index`, always the same."""
    draws = Draws((index,), "frost texture", 0, 1)
    crystals = _standardised(_crystals(draws))
    shading = _standardised(plasma(draws, 1 << (_SIDE - 1).bit_length(), 1.7)[0, :_SIDE, :_SIDE])
    ice = _standardised(crystals + shading)
    mean, std = (np.array(row).reshape(3, 1, 1) for row in _LEVELS[index])
    return np.clip(mean + std * ice, 0, 255)


def _crystals(draws: Draws) -> Floats:
    """[side, side]: feathers of ice, a spine with ribs at 60 degrees, later ones on top."""
    canvas = Image.new("L", (2 * _SIDE, 2 * _SIDE), 128)
    pen = ImageDraw.Draw(canvas)
    along = np.linspace(0.1, 1, _RIBS)
    for column, row, angle, size, light in draws.uniform("crystals", _CRYSTALS, 5)[0]:
        root = 2 * _SIDE * (1.2 * np.array([column, row]) - 0.1)
        length = 40 * 6**size
        spine = root + length * along[:, None] * _direction(2 * np.pi * angle)
        ribs = 0.45 * length * (1 - along)[:, None]
        for side in (-1, 1):
            tips = spine + ribs * _direction(2 * np.pi * angle + side * _RIB_ANGLE)
            for start, end in zip(spine, tips, strict=True):
                pen.line([*start, *end], fill=int(40 + 215 * light), width=3)
        pen.line([*root, *spine[-1]], fill=int(90 + 165 * light), width=4)
    return np.asarray(canvas.reduce(2), np.float64)


def _direction(angle: float) -> Floats:
    return np.array([np.cos(angle), np.sin(angle)])


def _standardised(values: Floats) -> Floats:
    return np.asarray((values - values.mean()) / values.std())
