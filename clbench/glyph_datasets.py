"""Datasets of rendered characters: as large as asked for, made anywhere, nothing to fetch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench import cache, glyph_images
from clbench.classification import Images
from clbench.errors import UserError
from clbench.glyph_catalogue import Catalogue, Face, Pool, catalogue, faces
from clbench.image_files import statistics
from clbench.progress import counting
from clbench.samples import TensorSource

#: Faces at least that draw each character, so that no class is a single shape.
MINIMUM_FACES = 4


def known(cache_dir: Path | None) -> Catalogue:
    """The characters on offer; made once, then read from the cache folder (None: the user's)."""
    return catalogue(cache_dir or cache.default_folder())


def chosen(available: Catalogue, pool: Pool, n_classes: int, common: Sequence[Face] = ()) -> str:
    """The first characters of a pool.

    Args:
        available: The characters on offer.
        pool: Which of the three, which have no character in common.
        n_classes: How many; 0: all.
        common: Faces that must all draw each of them; none: any `MINIMUM_FACES`.

    Raises:
        UserError: If there are not so many.
    """
    characters = available.pool(pool, MINIMUM_FACES, [face.name for face in common])
    if n_classes > len(characters):
        raise UserError(
            f"scenario.n_classes={n_classes}, but the {pool.value} pool has {len(characters)} "
            "characters that enough of the installed fonts can draw. Ask for at most that many."
        )
    return characters[:n_classes] if n_classes else characters


def made(
    characters: str,
    drawn_by: Sequence[Sequence[Face]],
    per_class: tuple[int, int],
    image_size: int,
    cache_dir: Path | None,
    seed: int = 0,
) -> Images:
    """Images of some characters, drawn at the first call and then read from the cache folder.

    Args:
        characters: The classes.
        drawn_by: For each character the faces it is drawn with.
        per_class: Training and test images of each.
        image_size: Side in pixels.
        cache_dir: The cache folder; None: the user's.
        seed: Decides the images.
    """
    train, test = per_class
    folder = cache_dir or cache.default_folder()
    with counting("drawing characters", "images") as tell:
        pixels, labels = glyph_images.load(
            folder, characters, drawn_by, train + test, image_size, seed, tell
        )
    testing = np.arange(len(labels)) % (train + test) >= train
    mean, std = statistics(pixels, (~testing).nonzero()[0])
    parts = [
        TensorSource(torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows]))
        for rows in (~testing, testing)
    ]
    return Images(parts[0], parts[1], list(characters), mean.tolist(), std.tolist())


def joined(parts: Sequence[Images]) -> Images:
    """Datasets with the same classes as one, one after another, with one normalisation."""
    train, test = (
        TensorSource(
            torch.cat([source.gather(torch.arange(len(source))) for source in sources]),
            torch.cat([source.targets for source in sources]),
        )
        for sources in ([part.train for part in parts], [part.test for part in parts])
    )
    mean, std = statistics(train.inputs.numpy(), np.arange(len(train)))
    return Images(train, test, parts[0].class_names, mean.tolist(), std.tolist())


def fingerprint() -> dict[str, Any]:
    """What decides the images besides the options: the fonts, and the program that draws them."""
    from PIL import features

    fonts = "".join(face.digest for face in faces())
    digest = hashlib.sha256(fonts.encode()).hexdigest()
    return {"fonts": digest, "freetype": features.version("freetype2")}
