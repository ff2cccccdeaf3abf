"""Small image files for the tests of scenarios that read folders."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

#: Real data, beside the checkout; a test that needs some is skipped where they are absent.
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def draw(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """Writes a noisy picture of this (width, height) that follows from its path's last parts."""
    generator = np.random.default_rng(zlib.crc32("/".join(path.parts[-4:]).encode()))
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)


def draw_folder(
    root: Path, classes: Iterable[str], train: int, test: int, suffix: str = ".png"
) -> Path:
    """root/{train,test}/<class>/<number>; returns root."""
    for name in classes:
        for part, count in (("train", train), ("test", test)):
            for i in range(count):
                draw(root / part / name / f"{i:03}{suffix}")
    return root
