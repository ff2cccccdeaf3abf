"""Batch norms that divide by the batch's, by mixed and by moving statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.batch_statistics import (
    MixedBatchNorm,
    MovingBatchNorm,
    affine_parameters,
    batch_norms,
    normalise_by_batch,
    replace_batch_norms,
    train_only,
)

EPS = 0.01


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = 3 + 2 * drawn(1, 5, 3, 4, 6)


@pytest.fixture
def norm() -> nn.BatchNorm2d:
    """With statistics, scales and shifts that are not those of a new layer."""
    layer = nn.BatchNorm2d(3, eps=EPS).eval()
    with torch.no_grad():
        for seed, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            value = drawn(seed, 3)
            layer.state_dict()[name].copy_(value.exp() if name == "running_var" else value)
    return layer


def stored(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.clone(), norm.running_var.clone()


def of_batch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean squared deviation of each channel, written out."""
    columns = x.transpose(0, 1).flatten(1)
    mean = columns.mean(1)
    return mean, (columns - mean[:, None]).square().mean(1)


def by_hand(norm: nn.BatchNorm2d, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(x − μ) / √(σ² + ε) · weight + bias."""
    m, v, w, b = (t.view(1, 3, 1, 1) for t in (mean, variance, norm.weight, norm.bias))
    return (x - m) / (v + EPS).sqrt() * w + b


def test_mixed_statistics_are_between_the_stored_and_the_batch_s(norm: nn.BatchNorm2d) -> None:
    (m, v), (bm, bv) = stored(norm), of_batch(IMAGES)
    expected = by_hand(norm, IMAGES, 0.7 * m + 0.3 * bm, 0.7 * v + 0.3 * bv)
    torch.testing.assert_close(MixedBatchNorm(norm, alpha=0.3)(IMAGES), expected)


def test_a_prior_counts_like_so_many_samples(norm: nn.BatchNorm2d) -> None:
    prior, alpha = (
        MixedBatchNorm(copy.deepcopy(norm), prior=16),
        MixedBatchNorm(copy.deepcopy(norm), alpha=5 / 21),
    )
    assert torch.equal(prior(IMAGES), alpha(IMAGES))
    one = MixedBatchNorm(copy.deepcopy(norm), alpha=1 / 17)
    assert torch.equal(prior(IMAGES[:1]), one(IMAGES[:1]))


def test_the_ends_of_the_mixture(norm: nn.BatchNorm2d) -> None:
    source = norm(IMAGES)
    torch.testing.assert_close(MixedBatchNorm(copy.deepcopy(norm), alpha=0)(IMAGES), source)
    batch = F.batch_norm(IMAGES, None, None, norm.weight, norm.bias, True, eps=EPS)
    torch.testing.assert_close(MixedBatchNorm(norm, alpha=1)(IMAGES), batch)


@pytest.mark.parametrize("mode", [True, False])
def test_mixing_stores_nothing_in_either_mode(norm: nn.BatchNorm2d, mode: bool) -> None:
    before = stored(norm)
    mixed = MixedBatchNorm(norm, alpha=0.3)
    first = mixed(IMAGES)
    assert torch.equal(mixed.train(mode)(IMAGES), first)
    assert all(map(torch.equal, stored(norm), before))


def test_mixed_statistics_are_constants_to_the_gradient(norm: nn.BatchNorm2d) -> None:
    x = IMAGES.clone().requires_grad_()
    (m, v), (bm, bv) = stored(norm), of_batch(IMAGES)
    MixedBatchNorm(norm, alpha=0.3)(x).square().sum().backward()
    y = IMAGES.clone().requires_grad_()
    by_hand(norm, y, 0.7 * m + 0.3 * bm, 0.7 * v + 0.3 * bv).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad)


def test_alpha_or_prior(norm: nn.BatchNorm2d) -> None:
    with pytest.raises(ValueError, match="alpha or prior"):
        MixedBatchNorm(norm)
    with pytest.raises(ValueError, match="alpha or prior"):
        MixedBatchNorm(norm, 0.1, 16)


def test_moving_statistics_move_in_training_and_divide_at_once(norm: nn.BatchNorm2d) -> None:
    (m, v), (bm, bv) = stored(norm), of_batch(IMAGES)
    mean, variance = 0.95 * m + 0.05 * bm, 0.95 * v + 0.05 * bv
    moving = MovingBatchNorm(norm).train()
    torch.testing.assert_close(moving(IMAGES), by_hand(norm, IMAGES, mean, variance))
    torch.testing.assert_close(stored(norm), (mean, variance))
    moving(IMAGES)
    torch.testing.assert_close(stored(norm), (0.95 * mean + 0.05 * bm, 0.95 * variance + 0.05 * bv))


def test_moving_statistics_stand_still_in_evaluation(norm: nn.BatchNorm2d) -> None:
    before = stored(norm)
    expected = norm(IMAGES)
    moving = MovingBatchNorm(norm)
    assert torch.equal(moving(IMAGES), expected)
    moving.train()(IMAGES)
    after = stored(norm)
    assert not torch.equal(before[0], after[0])
    torch.testing.assert_close(moving.eval()(IMAGES), by_hand(norm, IMAGES, *after))
    assert all(map(torch.equal, stored(norm), after))


def test_the_gradient_flows_through_the_batch_s_share(norm: nn.BatchNorm2d) -> None:
    (m, v), y = stored(norm), IMAGES.clone().requires_grad_()
    bm, bv = of_batch(y)
    expected = by_hand(norm, y, 0.95 * m + 0.05 * bm, 0.95 * v + 0.05 * bv)
    expected.pow(3).sum().backward()
    hand = [norm.weight.grad, norm.bias.grad, y.grad]
    norm.zero_grad()
    x = IMAGES.clone().requires_grad_()
    MovingBatchNorm(norm).train()(x).pow(3).sum().backward()
    torch.testing.assert_close([norm.weight.grad, norm.bias.grad, x.grad], hand)


def test_normalising_by_the_batch_is_training_mode_that_stores_nothing(
    norm: nn.BatchNorm2d,
) -> None:
    model = nn.Sequential(norm, nn.Dropout(0.5)).eval()
    expected = F.batch_norm(IMAGES, None, None, norm.weight, norm.bias, True, eps=EPS)
    normalise_by_batch(model)
    assert torch.equal(model(IMAGES), expected)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    "make", [lambda n: MixedBatchNorm(n, 0.3), MovingBatchNorm], ids=["mixed", "moving"]
)
def test_timm_s_activation_behind_a_norm_stays(make: Callable[..., nn.Module]) -> None:
    from timm.layers import BatchNormAct2d

    layer = BatchNormAct2d(3, eps=EPS).eval()
    plain = nn.BatchNorm2d(3, eps=EPS).eval()
    for mode in (True, False):
        one, other = make(layer).train(mode), make(plain).train(mode)
        torch.testing.assert_close(one(IMAGES), other(IMAGES).relu())


def test_half_precision_in_and_out(norm: nn.BatchNorm2d) -> None:
    for module in (MixedBatchNorm(norm, 0.3), MovingBatchNorm(norm).train()):
        exact = copy.deepcopy(module)(IMAGES)
        found = module(IMAGES.bfloat16())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.05)


class Shared(nn.Module):
    """One batch norm in two places, another inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.again = self.first
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
        self.norm = nn.LayerNorm(6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.block(self.again(self.first(x))))
        return out


def test_every_place_of_a_batch_norm_is_replaced_by_one_module() -> None:
    model = Shared()
    made = replace_batch_norms(model, lambda n: MixedBatchNorm(n, alpha=0.5))
    assert len(made) == 2
    places = dict(model.named_modules(remove_duplicate=False))
    assert places["first"] is places["again"] is made[0]
    assert places["block.1"] is made[1]
    assert made[0].layer.running_mean is not None
    assert len(batch_norms(model)) == 2
    assert model(IMAGES).shape == IMAGES.shape


def test_replaced_models_are_copied_and_restored() -> None:
    model = Shared().eval()
    replace_batch_norms(model, MovingBatchNorm)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    other = copy.deepcopy(model)
    before = other(IMAGES)
    model.train()(IMAGES)
    assert torch.equal(other.eval()(IMAGES), before)
    model.load_state_dict(start)
    assert torch.equal(model.eval()(IMAGES), before)


def test_affine_parameters_of_every_kind_of_norm() -> None:
    model = Shared()
    found = affine_parameters(model)
    assert list(found) == [
        *("first.weight", "first.bias", "block.1.weight", "block.1.bias"),
        *("block.2.weight", "block.2.bias", "norm.weight"),
    ]
    named = dict(model.named_parameters())
    assert all(found[name] is named[name] for name in found)
    assert list(affine_parameters(model, frozen=["norm", "block.1"])) == [
        *("first.weight", "first.bias", "block.2.weight", "block.2.bias"),
    ]
    # A part is whole names: "nor" and "lock.1" are none.
    assert affine_parameters(model, frozen=["nor", "lock.1"]).keys() == found.keys()


def test_only_these_are_trained() -> None:
    model = Shared()
    trained = train_only(model, affine_parameters(model, frozen=["block"]).values())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        *("first.weight", "first.bias", "norm.weight"),
    ]
    assert trained == [p for p in model.parameters() if p.requires_grad]


def test_a_model_without_norms_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="no scales and shifts"):
        affine_parameters(model)
    with pytest.raises(UserError, match=r"outside of block, first, norm"):
        affine_parameters(Shared(), frozen=["block", "first", "norm"])
    with pytest.raises(UserError, match="no batch norm"):
        replace_batch_norms(model, MovingBatchNorm)


def test_a_batch_norm_without_statistics_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(UserError, match="no stored statistics"):
        replace_batch_norms(model, MovingBatchNorm)
