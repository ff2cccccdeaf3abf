"""Rotated images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clbench import datasets
from clbench.division import divide
from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.samples import Samples
from clbench.testing import check_scenario
from clbench.types import Split
from scenarios.rotated import Rotated, rotation


def scenario(n_experiences: int = 4, max_angle: float = 180.0) -> Rotated:
    return Rotated(backbone=MLP(hidden=(8,)), n_experiences=n_experiences, max_angle=max_angle)


def raw(samples: Samples | None) -> Tensor:
    assert samples is not None
    return samples.take(torch.arange(len(samples))).raw


def noise(n: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)


def test_conforms() -> None:
    check_scenario(scenario())


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_are_exact_and_counter_clockwise(size: int, quarters: int) -> None:
    images = noise(5, 3, size, size)
    turned = rotation(90.0 * quarters, size, size)(images)
    assert torch.equal(turned, torch.rot90(images, quarters, (2, 3)))


def test_half_a_turn_of_an_oblong_image() -> None:
    images = noise(5, 1, 4, 6)
    assert torch.equal(rotation(180, 4, 6)(images), images.flip(2, 3))


def test_a_turn_keeps_proportions_in_an_oblong_image() -> None:
    """A quarter turn of a square in the middle of an oblong turns that square."""
    images = torch.zeros(1, 1, 6, 12, dtype=torch.uint8)
    square = noise(1, 1, 6, 6)
    images[..., 3:9] = square
    assert torch.equal(rotation(90, 6, 12)(images)[..., 3:9], torch.rot90(square, 1, (2, 3)))


def test_agrees_with_another_rotation() -> None:
    """Pillow's bilinear rotation, away from the border, where the two treat the outside alike."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:33, :33] / 32
    smooth = (255 * (0.5 + 0.25 * np.sin(6 * x) + 0.25 * np.cos(5 * y))).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(smooth).rotate(37, Image.Resampling.BILINEAR)).astype(int)
    found = rotation(37, 33, 33)(torch.from_numpy(smooth)[None, None])[0, 0].numpy().astype(int)
    assert np.abs(found - wanted)[8:-8, 8:-8].max() <= 1


def test_outside_is_black() -> None:
    turned = rotation(45, 9, 9)(torch.full((1, 1, 9, 9), 200, dtype=torch.uint8))
    assert turned[0, 0, 0, 0] == turned[0, 0, 8, 8] == 0
    assert turned[0, 0, 4, 4] == 200


def angles(split: Split, seed: int = 0, **options: float) -> list[float]:
    stream = scenario(**options).stream(split, seed)  # type: ignore[arg-type]
    return [float(e.name.rstrip("°")) for e in stream.experiences]


def test_angles_are_even_and_tuning_has_those_between() -> None:
    assert sorted(angles(Split.EVALUATE)) == [0, 45, 90, 135]
    assert sorted(angles(Split.TUNE)) == [22.5, 67.5, 112.5, 157.5]
    assert sorted(angles(Split.EVALUATE, n_experiences=3, max_angle=90.0)) == [0, 30, 60]
    orders = {tuple(angles(Split.EVALUATE, seed)) for seed in range(6)}
    assert len(orders) > 1


def test_images_are_turned_by_the_angle_they_are_named_after() -> None:
    stream = scenario().stream(Split.EVALUATE, 0)
    images = divide(datasets.load("digits", Path()), Split.EVALUATE, 0, 0.2)
    for experience, test in zip(stream.experiences, stream.tests, strict=True):
        turn = rotation(float(experience.name.rstrip("°")), 8, 8)
        for samples, source in ((experience.train, images.train), (test, images.test)):
            assert torch.equal(raw(samples), turn(source.gather(torch.arange(len(source)))))
            assert samples is not None
            assert torch.equal(samples.targets, source.targets)


@pytest.mark.parametrize("max_angle", [0.0, -1.0, 361.0, float("nan")])
def test_angles_out_of_range_are_refused(max_angle: float) -> None:
    with pytest.raises(UserError, match="max_angle"):
        scenario(max_angle=max_angle)
