"""Noise: standard normal, never the same twice, and all of it from the generator it is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clbench.nn import noise
from clbench.nn.noise import GaussianNoise


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def drawn(source: GaussianNoise, count: int) -> Tensor:
    values = torch.zeros(count, device=source.generator.device)
    source.add([values], [torch.ones_like(values)])
    return values


GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
)
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


@DEVICES
def test_weights_move_by_their_scales_times_new_numbers(device: str) -> None:
    shapes, count = [(3, 4), (5,), ()], 18
    weights = [torch.full(shape, 7.0, device=device) for shape in shapes]
    scales = [torch.full(shape, float(i), device=device) for i, shape in enumerate(shapes)]
    GaussianNoise(count, generator(device=device)).add(weights, scales)
    numbers = drawn(GaussianNoise(count, generator(device=device)), count)
    for weight, scale, part in zip(weights, scales, numbers.split([12, 5, 1]), strict=True):
        torch.testing.assert_close(weight, 7 + scale * part.view(scale.shape))


@DEVICES
def test_one_draw_is_normal(device: str) -> None:
    """Moments, and the share beyond 1, 2 and 3, each within four standard errors."""
    count = 400_000
    x = drawn(GaussianNoise(count, generator(device=device)), count).double().cpu()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (variance / count) ** 0.5
        assert abs(float((x**power).mean()) - moment) < 4 * error, power
    for beyond in (1.0, 2.0, 3.0):
        share = 1 - torch.erf(torch.tensor(beyond / 2**0.5)).item()
        assert abs(float((x.abs() > beyond).double().mean()) - share) < 4 * (share / count) ** 0.5


@DEVICES
def test_draws_of_one_weight_are_normal_and_unrelated(device: str) -> None:
    """Of a weight, in time: mean, variance, and its product with the next draw; with a neighbour
    at the same time and a step later. The pool's own error is added to that of the sample."""
    source, count = GaussianNoise(2, generator(1, device)), 20_000
    x = torch.stack([drawn(source, 2) for _ in range(count)]).double().cpu()
    error = (1 / count + 1 / noise.PLACES) ** 0.5
    assert abs(float(x.mean(0)[0])) < 4 * error
    assert abs(float(x[:, 0].square().mean()) - 1) < 4 * error * 2**0.5
    pairs = {
        "in time": x[1:, 0] * x[:-1, 0],
        "neighbours": x[:, 0] * x[:, 1],
        "neighbours in time": x[1:, 0] * x[:-1, 1],
    }
    for name, products in pairs.items():
        assert abs(float(products.mean())) < 4 * error, name


def test_signs_are_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a pool of one place, the draws are that number or its opposite."""
    monkeypatch.setattr(noise, "PLACES", 1)
    source = GaussianNoise(1, generator())
    values = [float(drawn(source, 1)) for _ in range(1000)]
    assert len({abs(v) for v in values}) == 1
    assert sum(v > 0 for v in values) == pytest.approx(500, abs=4 * 250**0.5)


def test_every_place_can_come_the_last_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "PLACES", 3)
    source = GaussianNoise(4, generator())
    windows = {tuple(drawn(source, 4).abs().tolist()) for _ in range(200)}
    assert len(windows) == 3


@DEVICES
def test_the_generator_decides(device: str) -> None:
    one, two = (GaussianNoise(10, generator(3, device)) for _ in range(2))
    before = [drawn(one, 10) for _ in range(3)]
    assert all(torch.equal(a, drawn(two, 10)) for a in before)
    state = one.generator.get_state()
    after = drawn(one, 10)
    assert not any(torch.equal(after, a) for a in before)
    one.generator.set_state(state)
    assert torch.equal(after, drawn(one, 10))


@DEVICES
def test_global_random_numbers_are_left_alone(device: str) -> None:
    before = torch.get_rng_state()
    drawn(GaussianNoise(10, generator(device=device)), 10)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_that_require_gradients_can_be_moved() -> None:
    weight = torch.zeros(3, requires_grad=True)
    GaussianNoise(3, generator()).add([weight], [torch.ones(3)])
    assert weight.all()
    assert weight.is_leaf
