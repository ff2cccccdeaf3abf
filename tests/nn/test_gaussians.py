"""Gaussians of classes against closed forms and moments of what they sample."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from clbench.errors import Diverged
from clbench.nn.gaussians import ClassGaussians, Kind

KINDS = pytest.mark.parametrize("kind", get_args(Kind))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(count: int = 200, seed: int = 0) -> Tensor:
    """Features of one class, [count, 4], with mean 3 and strong correlations."""
    mixing = torch.randn(4, 4, generator=generator(9))
    return 3 + torch.randn(count, 4, generator=generator(seed)) @ mixing


def drawn(gaussians: ClassGaussians, count: int = 40_000) -> Tensor:
    features, targets = gaussians.sample([7], count, generator(1))
    assert targets.tolist() == [7] * count
    return features.double()


def test_by_hand() -> None:
    """(0, 0), (2, 4): mean (1, 2), unbiased covariance ((2, 4), (4, 8))."""
    for kind, expected in (("full", [[2.5, 4], [4, 8.5]]), ("diagonal", [[2.5, 0], [0, 8.5]])):
        gaussians = ClassGaussians(kind, 2, jitter=0.5)  # type: ignore[arg-type]
        gaussians.fit(0, torch.tensor([[0.0, 0], [2, 4]]))
        torch.testing.assert_close(gaussians.mean(0), torch.tensor([1.0, 2]))
        torch.testing.assert_close(gaussians.covariance(0), torch.tensor(expected))


def test_centroids_by_hand() -> None:
    """Clusters {−1, 1} and {10}: shares ⅔ and ⅓, variances 1 and 0."""
    gaussians = ClassGaussians("centroids", 1, jitter=0.25, n_centroids=2)
    gaussians.fit(0, torch.tensor([[-1.0], [10], [1]]))
    assert sorted(gaussians.means([0]).flatten().tolist()) == [0, 10]
    torch.testing.assert_close(gaussians.mean(0), torch.tensor([10 / 3]))
    within, between = 2 / 3 * 1 + 0.25, 2 / 3 * (10 / 3) ** 2 + 1 / 3 * (20 / 3) ** 2
    torch.testing.assert_close(gaussians.covariance(0), torch.tensor([[within + between]]))
    features, _ = gaussians.sample([0], 3000, generator())
    assert (features > 5).float().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert features[features > 5].std().item() == pytest.approx(0.5, abs=0.05)


@KINDS
def test_samples_have_the_moments_that_are_promised(kind: Kind) -> None:
    features = correlated()
    gaussians = ClassGaussians(kind, 4)
    gaussians.fit(7, features)
    samples = drawn(gaussians)
    mean, covariance = gaussians.mean(7).double(), gaussians.covariance(7).double()
    centred = samples - mean
    products = centred.unsqueeze(1) * centred.unsqueeze(2)
    for found, expected in ((samples, mean), (products, covariance)):
        error = 5 * found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - expected).abs() < error).all()
    torch.testing.assert_close(gaussians.mean(7), features.mean(0))


def test_full_keeps_correlations_and_diagonal_drops_them() -> None:
    features = correlated().double()
    full, diagonal = (
        ClassGaussians("full", 4, jitter=1e-12),
        ClassGaussians("diagonal", 4, jitter=1e-12),
    )
    for gaussians in (full, diagonal):
        gaussians.fit(7, features)
    covariance = features.T.cov()
    torch.testing.assert_close(full.covariance(7).double(), covariance, rtol=1e-5, atol=1e-5)
    expected = torch.diag(covariance.diagonal())
    torch.testing.assert_close(diagonal.covariance(7).double(), expected, rtol=1e-5, atol=1e-5)


def test_as_many_centroids_as_samples_hold_the_whole_class() -> None:
    """Every sample is a cluster: mean and (biased) covariance are those of the samples."""
    features = correlated(12)
    gaussians = ClassGaussians("centroids", 4, jitter=1e-12, n_centroids=12)
    gaussians.fit(0, features)
    torch.testing.assert_close(gaussians.mean(0), features.mean(0))
    torch.testing.assert_close(gaussians.covariance(0), features.T.cov(correction=0))


@KINDS
@pytest.mark.parametrize("count", [1, 3])
def test_fewer_samples_than_features(kind: Kind, count: int) -> None:
    features = 100 * torch.randn(count, 64, generator=generator())
    gaussians = ClassGaussians(kind, 64)
    gaussians.fit(0, features)
    samples, _ = gaussians.sample([0], 500, generator())
    assert samples.isfinite().all()
    torch.testing.assert_close(gaussians.mean(0), features.mean(0))
    if kind == "full":
        # Outside the span of the samples only the jitter spreads them.
        centred = (features - features.mean(0)).double()
        basis = torch.linalg.svd(centred, full_matrices=True)[2][count - 1 :]
        outside = (samples - features.mean(0)).double() @ basis.T
        assert outside.std().item() == pytest.approx(0.01, rel=0.1)


@KINDS
def test_samples_that_are_all_the_same(kind: Kind) -> None:
    gaussians = ClassGaussians(kind, 5)
    gaussians.fit(0, torch.full((30, 5), 2.0))
    samples, _ = gaussians.sample([0], 2000, generator())
    assert samples.mean().item() == pytest.approx(2, abs=1e-3)
    assert samples.std().item() == pytest.approx(0.01, rel=0.05)


def test_jitter_grows_until_the_covariance_has_a_factor() -> None:
    """1e-4 beside 1e16 is nothing, in double precision too."""
    features = 1e8 * torch.ones(4, 8).cumsum(0)
    gaussians = ClassGaussians("full", 8)
    gaussians.fit(0, features)
    covariance = features.double().T.cov()
    torch.testing.assert_close(gaussians.covariance(0).double(), covariance, rtol=1e-5, atol=0)


def test_sums_are_in_double_precision() -> None:
    """A mean of a million leaves a variance of 1 no digits in fp32 (ε = 0.06)."""
    features = 1e6 + torch.randn(5000, 2, generator=generator(), dtype=torch.float64)
    gaussians = ClassGaussians("full", 2)
    gaussians.fit(0, features)
    expected = (features.T.cov() + 1e-4 * torch.eye(2, dtype=torch.float64)).float()
    torch.testing.assert_close(gaussians.covariance(0), expected, rtol=1e-5, atol=1e-5)


@KINDS
def test_scales_move_means_and_leave_the_spread(kind: Kind) -> None:
    gaussians = ClassGaussians(kind, 4)
    gaussians.fit(1, correlated(seed=1))
    gaussians.fit(4, correlated(seed=2))
    plain, targets = gaussians.sample([4, 1], 50, generator())
    scaled, _ = gaussians.sample([4, 1], 50, generator(), scales=[0.5, 1.0])
    assert targets.tolist() == [4] * 50 + [1] * 50
    torch.testing.assert_close(scaled[50:], plain[50:])
    half = (plain - scaled)[:50]
    apart = (half.unsqueeze(1) - gaussians.means([4]) / 2).abs().amax(2)
    assert apart.min(1).values.max() < 1e-5


def test_a_class_of_its_own_is_all_that_a_fit_changes() -> None:
    gaussians = ClassGaussians("full", 4)
    gaussians.fit(7, correlated(seed=1))
    before = gaussians.covariance(7)
    gaussians.fit(3, correlated(seed=2))
    assert torch.equal(gaussians.covariance(7), before)
    assert gaussians.classes == (7, 3)
    gaussians.fit(7, correlated(seed=3))
    assert not torch.allclose(gaussians.covariance(7), before, atol=1e-3)
    assert gaussians.classes == (7, 3)


@KINDS
def test_state_comes_back(kind: Kind) -> None:
    one, two = ClassGaussians(kind, 4), ClassGaussians(kind, 4)
    one.fit(7, correlated(seed=1))
    one.fit(3, correlated(seed=2))
    two.fit(5, correlated(seed=3))
    two.load_state_dict(one.state_dict())
    assert two.classes == one.classes
    for features in zip(
        one.sample([3, 7], 9, generator()), two.sample([3, 7], 9, generator()), strict=True
    ):
        assert torch.equal(*features)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("full", 4 * (32 * 32 + 32 + 1)), ("diagonal", 4 * (2 * 32 + 1)), ("centroids", 4 * 10 * 65)],
)
def test_bytes_of_a_class(kind: Kind, expected: int) -> None:
    gaussians = ClassGaussians(kind, 32)
    for label in range(3):
        gaussians.fit(label, torch.randn(50, 32, generator=generator(label)))
    assert gaussians.nbytes == 3 * expected


def test_features_that_are_not_finite_end_the_run() -> None:
    with pytest.raises(Diverged, match="class 2"):
        ClassGaussians("full", 2).fit(2, torch.tensor([[0.0, torch.nan]]))


def test_no_jitter_is_refused() -> None:
    with pytest.raises(ValueError, match="jitter=0"):
        ClassGaussians("full", 2, jitter=0)
