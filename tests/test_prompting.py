"""What prompt methods share: when queries are computed, and that they belong to their images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.prompting import PromptStrategy
from clbench.samples import Batch, Samples
from clbench.testing import ToyScenario, ToyViT
from clbench.types import Context, Split


@dataclass(kw_only=True)
class Asking(PromptStrategy):
    """Compares the queries of every step with fresh ones."""

    errors: list[float] = field(default_factory=list)

    def loss(self, batch: Batch) -> Tensor:
        queries = self.queries_of(batch)
        with torch.no_grad():
            fresh = self.model.features(batch.inputs)  # type: ignore[operator]
        self.errors.append((queries - fresh).abs().max().item())
        return self.cross_entropy(queries, batch.targets)


class Another(Asking):
    """Trains on other images than those that arrive, under their names."""

    def batches(self, samples: Samples, epochs: int, batch_size: int) -> Iterator[Batch]:
        for batch in super().batches(samples, epochs, batch_size):
            yield Batch(-batch.inputs, batch.targets, batch.raw, batch.index)


def prepared(strategy: Any, scenario: ToyScenario) -> tuple[Any, Any, list[int]]:
    stream = scenario.stream(Split.EVALUATE, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = scenario.model(0, stream)
    counts: list[int] = []
    context = Context(
        device=torch.device("cpu"),
        seed=0,
        scenario=scenario,
        objective=scenario.objective(),
        transform=stream.transform,
        n_outputs=stream.n_outputs,
    )
    strategy.setup(model, context)
    parts: Any = model.get_submodule("features")
    parts.register_forward_hook(lambda _, args, __: counts.append(len(args[0])))
    return strategy, stream.experiences[1], counts


@pytest.mark.parametrize("kind", [Asking, Another])
@pytest.mark.parametrize("options", [{}, {"crop_padding": 1, "flip": True}, {"epochs": 1}])
def test_queries_are_those_of_the_images_of_the_batch(kind: Any, options: Any) -> None:
    scenario = ToyScenario(**{"backbone": ToyViT(), "epochs": 3, **options})
    strategy, experience, _ = prepared(kind(), scenario)
    strategy.learn(experience)
    assert len(strategy.errors) == 8 * scenario.epochs
    assert max(strategy.errors) < 1e-5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epochs": 3}, 80),
        ({"epochs": 3, "flip": True}, 3 * 80),
        ({"epochs": 1}, 80),
        ({"epochs": 1, "online": True, "passes": 2}, 2 * 80),
    ],
)
def test_queries_are_computed_once_where_they_are_always_the_same(
    options: Any, expected: int
) -> None:
    scenario = ToyScenario(backbone=ToyViT(), **options)
    strategy, experience, counts = prepared(Asking(), scenario)
    strategy.learn(experience)
    fresh = 80 * scenario.epochs * scenario.passes
    assert sum(counts) - fresh == expected


def test_the_transformer_is_frozen_and_the_head_is_not() -> None:
    strategy, _, _ = prepared(Asking(), ToyScenario(backbone=ToyViT()))
    assert {name for name, p in strategy.model.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    strategy.add_prompts(nn.Linear(2, 2))
    assert len(strategy.trainable()) == 4
