"""Domains and views: every sample in every domain, one source, on demand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from clbench.classification import Images
from clbench.domains import DomainIncrementalImages, Domains, domain_order
from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.samples import TensorSource
from clbench.testing import check_scenario
from clbench.types import Setting, Split
from clbench.views import View, ViewedSource


@dataclass
class Add(View):
    """Adds a number to every pixel; counts its calls."""

    amount: int
    calls: int = 0

    def __call__(self, raw: Tensor) -> Tensor:
        self.calls += 1
        return raw + self.amount

    def to(self, device: torch.device) -> View:
        return Add(self.amount) if device.type == "meta" else self


def source(n: int = 5) -> TensorSource:
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2)
    return TensorSource(pixels.contiguous(), torch.arange(n) % 3)


def test_position_says_which_sample_in_which_view() -> None:
    viewed = ViewedSource(source(), [Add(0), Add(10), Add(20)])
    assert len(viewed) == 15
    assert viewed.targets.tolist() == [0, 1, 2, 0, 1] * 3
    assert viewed.domain.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    everything = viewed.gather(torch.arange(15))[:, 0, 0, 0].tolist()
    assert everything == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24]


def test_any_mixture_and_order_of_views() -> None:
    viewed = ViewedSource(source(), [Add(0), Add(10), Add(20)])
    order = torch.tensor([14, 0, 7, 7, 3, 10, 5])
    assert viewed.gather(order)[:, 0, 0, 0].tolist() == [24, 0, 12, 12, 3, 20, 10]
    assert viewed.gather(order[:0]).shape == (0, 1, 2, 2)


def test_looking_changes_nothing() -> None:
    base = source()
    before = base.inputs.clone()
    ViewedSource(base, [Add(1), Add(10)]).gather(torch.arange(10))
    assert torch.equal(base.inputs, before)


def test_a_batch_of_one_view_is_looked_at_once() -> None:
    views = [Add(0), Add(10)]
    ViewedSource(source(), views).gather(torch.tensor([5, 6, 9]))
    assert [view.calls for view in views] == [0, 1]


def test_views_move_with_their_source() -> None:
    viewed = ViewedSource(source(), [Add(0), Add(10)])
    assert viewed.to(torch.device("cpu")) is viewed
    moved = viewed.to(torch.device("meta"))
    assert isinstance(moved, ViewedSource)
    assert moved.device.type == moved.base.device.type == "meta"
    assert all(a is not b for a, b in zip(moved.views, viewed.views, strict=True))


@dataclass(kw_only=True)
class Brighter(DomainIncrementalImages):
    """Noise of three classes, each domain brighter by ten."""

    def domains(self, split: Split, seed: int) -> Domains:
        generator = torch.Generator().manual_seed(7 if split is Split.TUNE else 8)
        order = domain_order(self.n_experiences, seed).tolist()

        def part(n: int) -> ViewedSource:
            pixels = torch.randint(0, 200, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
            views = [Add(10 * k) for k in order]
            return ViewedSource(TensorSource(pixels, torch.arange(n) % 3), views)

        train, test = part(30), part(12)
        images = Images(train, test, ["a", "b", "c"], (0.5,), (0.3,), {"note": 1})
        return Domains(images, [f"plus {10 * k}" for k in order], train.domain, test.domain)


def test_a_domain_incremental_scenario_conforms() -> None:
    check_scenario(Brighter(backbone=MLP(hidden=(4,)), n_experiences=4))


def test_every_experience_has_all_classes_and_its_own_test() -> None:
    scenario = Brighter(backbone=MLP(hidden=(4,)), n_experiences=4)
    stream = scenario.stream(Split.EVALUATE, 0)
    assert scenario.setting is Setting.DOMAIN_INCREMENTAL
    assert stream.n_outputs == 3
    assert stream.facts == {"note": 1, "class_names": ["a", "b", "c"], "image_shape": [1, 4, 4]}
    for index, (experience, test) in enumerate(zip(stream.experiences, stream.tests, strict=True)):
        assert experience.classes == (0, 1, 2)
        assert experience.train is not None
        assert experience.train.index.tolist() == list(range(30 * index, 30 * index + 30))
        assert test.index.tolist() == list(range(12 * index, 12 * index + 12))
    assert len({id(e.train.source) for e in stream.experiences if e.train}) == 1
    images = scenario.images(Split.EVALUATE)
    assert len(images.train) == 120


def test_the_model_has_all_classes_from_the_start() -> None:
    scenario = Brighter(backbone=MLP(hidden=(4,)), n_experiences=2)
    stream = scenario.stream(Split.EVALUATE, 0)
    assert stream.experiences[0].train is not None
    inputs = stream.experiences[0].train.take(torch.arange(6)).inputs
    assert scenario.model(0, stream)(inputs).shape == (6, 3)


def test_scores_name_no_task() -> None:
    """With one set of classes there is nothing that a task label could tell."""
    scenario = Brighter(backbone=MLP(hidden=(4,)), n_experiences=2)
    stream = scenario.stream(Split.EVALUATE, 0)
    scores = scenario.objective().score(
        lambda batch: torch.eye(3)[batch.inputs.new_zeros(len(batch)).long()],
        stream.tests,
        stream.experiences,
        7,
    )
    assert scores == {"accuracy": [pytest.approx(1 / 3)] * 2}


def test_domain_orders_are_permutations_that_follow_the_seed() -> None:
    orders = [domain_order(8, seed).tolist() for seed in range(5)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert orders[0] == domain_order(8, 0).tolist()


def test_no_experience_is_refused() -> None:
    with pytest.raises(UserError, match="n_experiences=0"):
        Brighter(backbone=MLP(hidden=(4,)), n_experiences=0)
