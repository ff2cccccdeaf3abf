"""Weak and strong views against Pillow's and SciPy's operations and their probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torchvision.transforms import functional as theirs

from clbench.classification import Classification
from clbench.errors import UserError
from clbench.nn.contrastive_views import JITTERS, MoCoViews, blur
from clbench.nn.transforms import Identity, ImageTransform, Transform
from clbench.testing import ToyScenario
from clbench.types import Context


def views(transform: Transform | None = None) -> MoCoViews:
    context = Context(
        device=torch.device("cpu"),
        seed=0,
        scenario=ToyScenario(),
        objective=Classification(task_aware=False),
        transform=transform or ImageTransform((0.0,) * 3, (1.0,) * 3),
        n_outputs=2,
    )
    return MoCoViews(context)


def images(n: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, 9, 8), dtype=torch.uint8, generator=generator)


def binomial(count: int, n: int, probability: float) -> bool:
    """Within four deviations of what is expected."""
    return abs(count - n * probability) < 4 * (n * probability * (1 - probability)) ** 0.5


def test_weak_views_are_mirror_images_half_of_the_time() -> None:
    raw = images(400)
    kept = raw.clone()
    seen = (views().weak(raw) * 255).round().to(torch.uint8)
    same, mirrored = ((seen == x).flatten(1).all(1) for x in (raw, raw.flip(3)))
    assert (same ^ mirrored).all()
    assert binomial(int(mirrored.sum()), 400, 0.5)
    assert torch.equal(raw, kept)


def test_views_are_normalised() -> None:
    raw = images(50)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    for kind in ("weak", "strong"):
        one = getattr(views(), kind)(raw)
        two = getattr(views(ImageTransform(mean, std)), kind)(raw)
        shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        torch.testing.assert_close(two, (one - shift) / scale, rtol=1e-4, atol=1e-5)


def test_a_strong_view_changes_as_often_as_it_says() -> None:
    """A view is untouched or only mirrored with 0.2 · 0.8 · 0.5, grey with 0.2 of all."""
    raw, n = images(3000), 3000
    kept = raw.clone()
    seen = views().strong(raw)
    assert torch.equal(raw, kept)
    assert seen.min() >= 0
    assert seen.max() <= 1 + 1e-6
    grey = (seen.amax(1) - seen.amin(1)).flatten(1).amax(1) < 1e-5
    assert binomial(int(grey.sum()), n, 0.2)
    pixels = raw.float() / 255
    untouched = sum(
        ((seen - x).abs().flatten(1).amax(1) < 1e-5).int() for x in (pixels, pixels.flip(3))
    )
    assert binomial(int(torch.as_tensor(untouched).sum()), n, 0.2 * 0.8 * 0.5)


def test_each_image_is_jittered_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that write down their number: of those chosen all 24 orders occur."""

    def note(number: int) -> object:
        return lambda pixels, factor: pixels * 10 + number + 0 * factor

    noted = {
        name: (note(i + 1), middle, reach)
        for i, (name, (_, middle, reach)) in enumerate(JITTERS.items())
    }
    monkeypatch.setattr("clbench.nn.contrastive_views.JITTERS", noted)
    found = views()._jittered(torch.zeros(2000, 1, 1, 1)).flatten().int().tolist()
    chosen = [code for code in found if code]
    assert binomial(len(chosen), 2000, 0.8)
    assert all(sorted(str(code)) == ["1", "2", "3", "4"] for code in chosen)
    assert len(set(chosen)) == 24


def test_the_factors_lie_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (_, middle, reach) in JITTERS.items():
        only = {name: (lambda pixels, factor: pixels + factor, middle, reach)}
        monkeypatch.setattr("clbench.nn.contrastive_views.JITTERS", only)
        found = views()._jittered(torch.zeros(2000, 1, 1, 1)).flatten()
        found = found[found != 0]
        assert middle - reach <= found.min() < middle - 0.95 * reach
        assert middle + 0.95 * reach < found.max() <= middle + reach


@pytest.mark.parametrize("name", JITTERS)
def test_operations_are_torchvision_s(name: str) -> None:
    pixels = images(4).float() / 255
    operation, middle, reach = JITTERS[name]
    for factor in (middle - reach, middle, middle + reach / 2):
        expected = getattr(theirs, f"adjust_{name}")(pixels, factor)
        ours = operation(pixels.clone(), torch.full((4, 1, 1, 1), factor))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_a_blur_is_scipy_s(sigma: float) -> None:
    pixels = images(2).float() / 255
    expected = gaussian_filter(
        pixels.double().numpy(), (0, 0, sigma, sigma), mode="nearest", radius=(0, 0, 6, 6)
    )
    ours = blur(pixels, torch.full((2,), sigma))
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_each_image_has_a_blur_of_its_own() -> None:
    pixels, sigma = images(3).float() / 255, torch.tensor([0.1, 1.0, 2.0])
    together = blur(pixels, sigma)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], blur(pixels[i : i + 1], sigma[i : i + 1]))
    assert not torch.allclose(together[1], pixels[1])


@pytest.mark.parametrize("n", [1, 0])
def test_few_and_grey_images_are_no_obstacle(n: int) -> None:
    source = views(ImageTransform((0.5,), (0.5,)))
    for _ in range(20):
        assert source.strong(images(n, 1)).shape == (n, 1, 9, 8)
        assert source.weak(images(n, 1)).isfinite().all()


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"images stored as bytes.*float32 \[4\]"):
        views(Identity()).weak(torch.zeros(2, 4))
