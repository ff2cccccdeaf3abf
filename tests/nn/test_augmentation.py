"""Batched augmentation against torchvision's, image by image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    InterpolationMode,
    RandAugment,
    autoaugment,
)

from clbench.nn import augmentation as ours

EITHER = pytest.mark.parametrize("augment", [ours.autoaugment, ours.randaugment])
Augment = Callable[[Tensor, torch.Generator], Tensor]
FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")


def pictures(n: int, height: int = 24, width: int = 32, channels: int = 3) -> Tensor:
    """Half of them smooth, half of them noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (n, channels, 6, 8), generator=generator).float()
    smooth = F.interpolate(coarse, (height, width), mode="bilinear").byte()
    noise = torch.randint(256, smooth.shape, generator=generator).byte()
    return torch.cat((smooth[: n // 2], noise[n // 2 :]))


@pytest.mark.parametrize("name", ours.OPERATIONS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_are_torchvision_s(name: str, sign: int) -> None:
    """Another value for each image. Where torchvision rounds twice, it is off by one level."""
    images = pictures(20)
    operation, value = ours.OPERATIONS[name]
    # Not of even spacing: where two pixels are equally near, which is taken is left open.
    level = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = value(level, torch.full((20,), sign), (24, 32)).float()
    found = operation(images, values.view(-1, 1, 1, 1))
    for image, v, result in zip(images, values.tolist(), found, strict=True):
        magnitude = v - 1 if name in FACTORS else int(v) if name == "Posterize" else v
        expected = autoaugment._apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
        tolerance = 1 if name in ("Color", "Sharpness") else 0
        assert (result.int() - expected.int()).abs().max() <= tolerance
    assert not torch.equal(found, images)


@pytest.mark.parametrize(
    ("theirs", "bins"),
    [(AutoAugment(AutoAugmentPolicy.CIFAR10), 10), (RandAugment(), 31)],
    ids=["autoaugment", "randaugment"],
)
def test_strengths_are_torchvision_s(theirs: AutoAugment | RandAugment, bins: int) -> None:
    level = torch.arange(bins, dtype=torch.float64) / (bins - 1)
    for name, (magnitudes, _) in theirs._augmentation_space(bins, (24, 32)).items():
        if name == "Identity" or not magnitudes.ndim:
            continue
        found = ours.OPERATIONS[name][1](level, torch.ones(bins), (24, 32))
        if name in FACTORS:
            found = found - 1
        if name.startswith("Translate"):
            magnitudes = magnitudes.trunc()  # torchvision does it when it applies them
        torch.testing.assert_close(found.double(), magnitudes.double(), atol=1e-4, rtol=0)


def applied(
    monkeypatch: pytest.MonkeyPatch, augment: Augment, n: int
) -> list[list[tuple[str, float]]]:
    """Which operations each of n images got, with their values."""
    log: list[list[tuple[str, float]]] = [[] for _ in range(n)]

    def noted(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def operation(images: Tensor, values: Tensor) -> Tensor:
            for image, value in zip(images[:, 0, 0], values.flatten().tolist(), strict=True):
                number = int(image[0]) * 256 + int(image[1])
                log[number].append((name, value))
            return images

        return operation

    spied = {name: (noted(name), value) for name, (_, value) in ours.OPERATIONS.items()}
    ours._cifar10_policies()
    monkeypatch.setattr(ours, "OPERATIONS", spied)
    numbered = torch.zeros(n, 1, 2, 2, dtype=torch.uint8)
    numbered[:, 0, 0, 0] = (torch.arange(n) // 256).byte()
    numbered[:, 0, 0, 1] = (torch.arange(n) % 256).byte()
    augment(numbered, torch.Generator().manual_seed(0))
    return log


def close(count: int, n: int, p: float) -> bool:
    return bool(abs(count - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5 + 1)


def test_autoaugment_draws_a_policy_for_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 20000
    log = applied(monkeypatch, ours.autoaugment, n)
    policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    allowed = {(a[0], b[0]) for a, b in policies}
    pairs = [tuple(name for name, _ in one) for one in log if len(one) == 2]
    assert set(pairs) <= allowed
    assert close(len(pairs), n, sum(a[1] * b[1] for a, b in policies) / 25)
    for name in {name for pair in allowed for name in pair}:
        times = sum(one[0] == name for policy in policies for one in policy)
        share = sum(one[1] for policy in policies for one in policy if one[0] == name) / 25
        found = sum(operation == name for one in log for operation, _ in one)
        assert abs(found - n * share) < 4.5 * (n * times / 25) ** 0.5, name


def test_randaugment_draws_two_of_fourteen(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 20000
    log = applied(monkeypatch, ours.randaugment, n)
    names = set(RandAugment()._augmentation_space(31, (24, 32))) - {"Identity"}
    assert {name for one in log for name, _ in one} == names
    assert close(sum(not one for one in log), n, 1 / 14**2)
    for name in names:
        assert close(sum(one[:1] != [] and one[0][0] == name for one in log), n, 1 / 14 + 1 / 14**2)
    angles = [value for one in log for name, value in one if name == "Rotate"]
    assert set(angles) == {-9.0, 9.0}
    assert close(angles.count(9.0), len(angles), 0.5)


@EITHER
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_type_and_source_stay(augment: Augment, channels: int) -> None:
    images = pictures(60, channels=channels)
    before = images.clone()
    found = augment(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    assert torch.equal(images, before)
    changed = (found != images).flatten(1).any(1)
    assert changed.sum() > 30


@EITHER
def test_the_generator_decides(augment: Augment) -> None:
    images = pictures(30)
    one, again, other = (augment(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@EITHER
def test_no_images(augment: Augment) -> None:
    assert augment(pictures(2)[:0], torch.Generator()).shape == (0, 3, 24, 32)
