"""Views of batches against torchvision's, AugMix against Pillow's, image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from clbench.errors import UserError
from clbench.nn import test_time_augmentation as ours
from clbench.nn.test_time_augmentation import AUGMIX, JITTERS, AugMixViews, CoTTAViews, Draw
from clbench.nn.transforms import Identity, ImageTransform, Transform
from clbench.testing import ToyScenario
from clbench.types import Context

MEAN, STD = (0.4, 0.5, 0.45), (0.2, 0.25, 0.3)


def pictures(n: int, height: int = 24, width: int = 32, channels: int = 3) -> Tensor:
    """Half of them smooth, half of them noise; uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (n, channels, 6, 8), generator=generator).float()
    smooth = F.interpolate(coarse, (height, width), mode="bilinear").byte()
    noise = torch.randint(256, smooth.shape, generator=generator).byte()
    return torch.cat((smooth[: n // 2], noise[n // 2 :]))


def context(transform: Transform | None = None) -> Context:
    scenario = ToyScenario()
    return Context(
        device=torch.device("cpu"),
        seed=0,
        scenario=scenario,
        objective=scenario.objective(),
        transform=transform or ImageTransform(MEAN, STD),
        n_outputs=6,
    )


def jittered(image: Tensor, order: list[int], factors: list[float]) -> Tensor:
    """The published code's colours, one operation of torchvision's after another."""
    steps: list[Callable[[Tensor, float], Tensor]] = [
        T.adjust_brightness,
        T.adjust_contrast,
        T.adjust_saturation,
        T.adjust_hue,
        lambda x, value: T.adjust_gamma(x.clamp(1e-8, 1.0), value),
    ]
    for number in order:
        image = steps[number](image, factors[number])
    return image


def published_view(images: Tensor, draw: Draw, view: int) -> Tensor:
    """One view of a batch by torchvision, as CoTTA's code composes it, without the noise."""
    values = {name: value[view].tolist() for name, value in vars(draw).items()}
    height, width = images.shape[-2:]
    x = jittered(images.clamp(0, 1), values["order"], values["factors"])
    x = T.pad(x, [width // 2, height // 2], padding_mode="edge")
    x = T.affine(
        x,
        values["angle"],
        [int(v) for v in values["shift"]],
        values["scale"],
        [0.0, 0.0],
        InterpolationMode.BILINEAR,
    )
    x = T.gaussian_blur(x, [5, 5], [values["sigma"]] * 2)
    x = T.center_crop(x, [height, width])
    mirrored: Tensor = T.hflip(x)
    return mirrored if values["mirrored"] else x


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_those_of_the_published_code(channels: int) -> None:
    images = pictures(6, channels=channels).float() / 255
    draw = Draw.random(20, (24, 32), torch.Generator().manual_seed(1))
    found = draw.apply(images)
    assert draw.mirrored.any()
    assert not draw.mirrored.all()
    for view in range(20):
        expected = published_view(images, draw, view)
        torch.testing.assert_close(found[view], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("number", range(5))
def test_colours_are_torchvision_s(number: int) -> None:
    images = pictures(8).float() / 255
    images[0] = images[0, :1]  # grey, where no hue is
    images[1] = 0
    operation, (low, high) = list(JITTERS.values())[number]
    for factor in (low, 0.3 * low + 0.7 * high, high):
        expected = jittered(images, [number], [factor] * 5)
        found = operation(images, torch.tensor(factor).view(1, 1, 1, 1))
        torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


def test_draws_fill_the_published_ranges() -> None:
    draw = Draw.random(20000, (32, 64), torch.Generator().manual_seed(0))
    limits = {
        "angle": (-15, 15),
        "scale": (0.9, 1.1),
        "sigma": (0.001, 0.5),
    }
    for name, (low, high) in limits.items():
        _is_uniform(getattr(draw, name), low, high)
    for column, (_, (low, high)) in zip(draw.factors.unbind(1), JITTERS.values(), strict=True):
        _is_uniform(column, low, high)
    # Padding doubles the side, and it shifts by up to 1/16 of that, rounded.
    assert draw.shift[:, 0].unique().tolist() == list(range(-8, 9))
    assert draw.shift[:, 1].unique().tolist() == list(range(-4, 5))
    assert torch.equal(draw.order.sort(1).values, torch.arange(5).expand(20000, 5))
    assert len(draw.order.unique(dim=0)) == 120
    assert abs(draw.mirrored.double().mean() - 0.5) < 4.5 * 0.5 / 20000**0.5


def _is_uniform(values: Tensor, low: float, high: float) -> None:
    """Kolmogorov and Smirnov's distance, which exceeds 2/√n once in 1500 times."""
    n = len(values)
    shares = (values.sort().values - low) / (high - low)
    assert shares[0] >= 0
    assert shares[-1] <= 1
    assert (shares - torch.arange(n) / n).abs().max() < 2 / n**0.5


def test_views_differ_from_each_other_by_draw_and_noise_only() -> None:
    """All images of a view share the draw; each pixel has a noise of its own."""
    inputs = ImageTransform(MEAN, STD).test(pictures(1).expand(50, -1, -1, -1))
    views = torch.stack([*CoTTAViews(context())(inputs, 4)])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    pixels = views * std + mean
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6
    inner = (pixels > 0.05) & (pixels < 0.95)  # not clipped
    centre = pixels.mean(1, keepdim=True)
    spread = ((pixels - centre)[inner].square().mean() * 50 / 49).sqrt()
    assert abs(spread / 0.005 - 1) < 0.02
    assert (centre[0] - centre[1]).abs().max() > 0.02


def test_chunks_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise apart, views do not depend on how many are made together."""
    inputs = ImageTransform(MEAN, STD).test(pictures(4))
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    whole = torch.stack([*CoTTAViews(context())(inputs, 7)])
    monkeypatch.setattr(ours, "_CPU_CHUNK", 2 * inputs.numel())
    parts = torch.stack([*CoTTAViews(context())(inputs, 7)])
    assert torch.equal(whole, parts)


def test_average_is_over_views_one_at_a_time() -> None:
    inputs = ImageTransform(MEAN, STD).test(pictures(4))
    views = [*CoTTAViews(context())(inputs, 3)]
    shapes = []

    def model(images: Tensor) -> Tensor:
        shapes.append(images.shape)
        return images.mean((2, 3)) - images.mean((0, 2, 3))  # depends on who else is there

    found = CoTTAViews(context()).average(model, inputs, 3)
    assert shapes == [inputs.shape] * 3
    torch.testing.assert_close(found, torch.stack([model(view) for view in views]).mean(0))


def test_views_of_what_is_no_image_are_refused() -> None:
    with pytest.raises(UserError, match="scenario of images"):
        CoTTAViews(context(Identity()))
    with pytest.raises(UserError, match="scenario of images"):
        AugMixViews(context(Identity()))


GREY = (128, 128, 128)


def pillow(image: Image.Image, name: str, value: float) -> Image.Image:
    """The operations of MEMO's code, with the fill that it means."""

    def affine(*matrix: float) -> Image.Image:
        transform = Image.Transform.AFFINE
        return image.transform(image.size, transform, matrix, Image.Resampling.BILINEAR, 1, GREY)

    operations: dict[str, Callable[[], Image.Image]] = {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "rotate": lambda: image.rotate(value, Image.Resampling.BILINEAR, fillcolor=GREY),
        "solarize": lambda: ImageOps.solarize(image, int(value)),
        "shear_x": lambda: affine(1, value, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, value, 1, 0),
        "translate_x": lambda: affine(1, 0, value, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, value),
        "posterize": lambda: ImageOps.posterize(image, int(value)),
    }
    return operations[name]()


@pytest.mark.parametrize("name", AUGMIX)
@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_are_pillow_s(name: str, sign: int) -> None:
    """Another value for each image. Pillow computes in other precisions: off by one level."""
    images = pictures(20)
    operation, value = AUGMIX[name]
    level = 0.1 + 0.9 * torch.rand(20, dtype=torch.float64, generator=_seeded(1))
    values = value(level, torch.full((20,), sign), (24, 32))
    found = operation(images, values.float().view(-1, 1, 1, 1))
    expected = torch.stack(
        [
            _tensor(pillow(Image.fromarray(image.permute(1, 2, 0).numpy()), name, v))
            for image, v in zip(images, values.tolist(), strict=True)
        ]
    )
    off = (found.int() - expected.int()).abs()
    assert off.max() <= 1
    # Autocontrast's table is a product in floats, which torchvision rounds otherwise.
    assert (off > 0).float().mean() < (0.15 if name == "autocontrast" else 0.01)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_strengths_are_the_published_code_s() -> None:
    """int_parameter and float_parameter at level 1 of 10, for images of 32 pixels."""
    level = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    one = torch.ones(50)

    def whole(largest: float) -> list[int]:
        return [int(v * largest / 10) for v in level.tolist()]

    expected: dict[str, Any] = {
        "rotate": whole(30),
        "solarize": [256 - v for v in whole(256)],
        "shear_x": [v * 0.3 / 10 for v in level.tolist()],
        "translate_x": whole(32 / 3),
        "posterize": [4 - v for v in whole(4)],
    }
    for name, values in expected.items():
        found = AUGMIX[name][1](level, one, (48, 32))
        assert found.tolist() == pytest.approx(values, abs=1e-12)
    assert AUGMIX["translate_y"][1](level, one, (48, 32)).tolist() == whole(48 / 3)


def test_copies_mix_chains_of_one_to_three_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that add up what they are worth show who got what, and with which weight."""
    n = 6000
    worth = (lambda images, _: images + 1, lambda level, *_: level)
    monkeypatch.setattr(ours, "AUGMIX", {"one": worth})
    flat = ImageTransform((0.0,), (1 / 255,))  # inputs are grey levels
    views = AugMixViews(context(flat))(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), 1)
    found = views.flatten().double()
    # Each chain is worth its length, of mean 2 and variance 2/3; weights are those of the class.
    # E[1 - m] = 1/2, E[(1 - m)^2] = 1/3, E[Σ w²] = 1/2: variance 1/3 (4 + 2/3 · 1/2) - 1.
    assert abs(found.mean() - 1) < 4.5 * (4 / 9 / n) ** 0.5
    assert abs(found.var() - 4 / 9) < 0.03
    assert found.max() < 3


def test_copies_of_a_flat_image_are_flat() -> None:
    """Mixtures of levels are levels; the levels are what operations make of 64, 0 and 128."""
    raw = torch.full((5, 3, 16, 16), 64, dtype=torch.uint8)
    views = AugMixViews(context(ImageTransform((0.0,) * 3, (1 / 255,) * 3)))(raw, 8)
    assert views.shape == (5, 8, 3, 16, 16)
    assert views.min() > -1e-3
    assert views.max() < 255.001
    assert len(views.flatten(0, 1).flatten(1).unique(dim=0)) > 30


def test_normalisation_is_the_test_transform_s() -> None:
    """Without operations a copy is a crop or mirror image, as the transform would give it."""
    raw = pictures(3)
    transform = ImageTransform(MEAN, STD)
    views = AugMixViews(context(transform))
    whole = views._normalised(raw.float())
    torch.testing.assert_close(whole, transform.test(raw))


def test_resized_crops_are_torchvision_s() -> None:
    """Their areas and sides are distributed alike; a crop of a gradient is a gradient."""
    n, height, width = 4000, 24, 32
    x = torch.arange(width).expand(height, width)
    y = 2 * torch.arange(height)[:, None].expand(height, width)
    ramp = (torch.stack((x, y)) * 3).byte().expand(n, 2, height, width)
    found = ours.resized_crop(ramp, _seeded(0), _seeded(1)).float() / 3
    across, down = found[:, 0].mean(1), found[:, 1].mean(2) / 2
    wide = (across[:, -5] - across[:, 4]).abs() * width / (width - 9)
    high = (down[:, -5] - down[:, 4]) * height / (height - 9)
    expected = _torchvision_sides(n, height, width)
    for sides, theirs in zip((high, wide), expected, strict=True):
        error = (sides.std() ** 2 + theirs.std() ** 2).sqrt() / n**0.5
        assert abs(sides.mean() - theirs.mean()) < 4.5 * error + 0.1
        assert abs(sides.std() / theirs.std() - 1) < 0.06
    assert abs((across[:, -1] < across[:, 0]).float().mean() - 0.5) < 4.5 * 0.5 / n**0.5


def _torchvision_sides(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Heights and widths of torchvision's crops."""
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    sides = torch.tensor(drawn, dtype=torch.float)
    return sides[:, 2], sides[:, 3]
