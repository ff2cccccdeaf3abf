"""Augmentation against crops and mirror images made one at a time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.nn.transforms import ImageTransform


def test_normalises_each_channel() -> None:
    raw = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    inputs = ImageTransform([0.2, 0.5], [0.1, 0.5]).test(raw)
    expected = torch.tensor([[-2.0, -1.0], [0.0, -0.6], [8.0, 1.0]])
    torch.testing.assert_close(inputs, expected[:, :, None, None].expand(3, 2, 4, 4))


def test_without_augmentation_training_inputs_are_test_inputs() -> None:
    raw = _images(4)
    transform = ImageTransform([0.5] * 3, [0.25] * 3)
    assert torch.equal(transform.train(raw, torch.Generator()), transform.test(raw))


@pytest.mark.parametrize(("padding", "flip"), [(2, False), (0, True), (2, True)])
def test_every_view_occurs_equally_often_and_nothing_else(padding: int, flip: bool) -> None:
    image = _images(1)
    n_views = (2 * padding + 1) ** 2 * (1 + flip)
    views = {tuple(v.flatten().tolist()): i for i, v in enumerate(_views(image[0], padding, flip))}
    assert len(views) == n_views
    draws = 200 * n_views
    transform = ImageTransform([0.5] * 3, [0.25] * 3, padding, flip)
    raw = image.expand(draws, -1, -1, -1)
    augmented = transform.augment(raw, torch.Generator().manual_seed(0))
    assert augmented.dtype == torch.uint8
    assert augmented.shape == raw.shape
    counts = Counter(views[tuple(v.flatten().tolist())] for v in augmented)
    assert len(counts) == n_views
    # Pearson's statistic has mean n - 1 and variance 2 (n - 1): six standard deviations.
    statistic = sum((c - 200) ** 2 / 200 for c in counts.values())
    assert statistic < n_views - 1 + 6 * (2 * (n_views - 1)) ** 0.5


def test_each_image_is_a_view_of_itself() -> None:
    raw = _images(30)
    transform = ImageTransform([0.5] * 3, [0.25] * 3, 2, True)
    augmented = transform.augment(raw, torch.Generator().manual_seed(0))
    for image, result in zip(raw, augmented, strict=True):
        assert any(torch.equal(result, view) for view in _views(image, 2, True))


def _images(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, 256, (n, 3, 5, 7), generator=generator, dtype=torch.uint8)


def _views(image: Tensor, padding: int, flip: bool) -> list[Tensor]:
    _, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return crops + [crop.flip(2) for crop in crops if flip]
