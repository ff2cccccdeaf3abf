"""Running class means against means of everything at once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from clbench.nn.prototypes import Prototypes, only


def test_means_of_parts_are_means_of_the_whole_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    features = 5 + torch.randn(30, 4, generator=generator)
    targets = torch.randint(0, 3, (30,), generator=generator)
    order = torch.randperm(30, generator=generator)
    whole, parts = Prototypes(5, 4), Prototypes(5, 4)
    whole.add(features, targets)
    for some in order.split(7):
        parts.add(features[some], targets[some])
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.means(), whole.means())
    for label in range(3):
        torch.testing.assert_close(parts.means()[label], features[targets == label].mean(0))
    assert parts.known.tolist() == [True, True, True, False, False]
    assert not parts.means()[3:].any()


def test_millions_of_samples_do_not_lose_digits() -> None:
    prototypes = Prototypes(1, 1)
    prototypes.sums.fill_(2.0**24)
    prototypes.counts.fill_(2.0**24)
    prototypes.add(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
    assert prototypes.sums.item() == 2**24 + 1
    assert prototypes.means().item() == 1


def test_cosines_and_the_least_number_for_unknown_classes() -> None:
    prototypes = Prototypes(3, 2)
    prototypes.add(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 2, 2]))
    scores = prototypes.cosines(torch.tensor([[2.0, 2.0]]))
    least = torch.finfo(torch.float32).min
    torch.testing.assert_close(scores, torch.tensor([[0.5**0.5, least, 0.5**0.5]]))
    assert scores.isfinite().all()


def test_state_comes_back() -> None:
    one, two = Prototypes(3, 2), Prototypes(3, 2)
    one.add(torch.ones(1, 2), torch.tensor([1]))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.means(), one.means())
    features = F.normalize(torch.ones(1, 2))
    assert torch.equal(two.cosines(features), one.cosines(features))


def test_only() -> None:
    scores = only(torch.tensor([True, False]), torch.zeros(2, 2))
    assert scores.tolist() == [[0, torch.finfo(torch.float32).min]] * 2
