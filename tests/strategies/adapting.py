"""Sets strategies of test-time adaptation up on a model of a few weights, without an engine."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from clbench.classification import Classification
from clbench.nn.backbones import FeatureExtractor
from clbench.nn.transforms import Identity, Transform
from clbench.samples import Batch, Samples, TensorSource
from clbench.state import capture
from clbench.testing import ToyScenario
from clbench.types import Context, Strategy

S = TypeVar("S", bound=Strategy)


class Features(FeatureExtractor):
    """Any module whose output is a feature vector.

    Args:
        body: [B, ...] to [B, n_features].
        n_features: Length of the vector.
    """

    def __init__(self, body: nn.Module, n_features: int) -> None:
        super().__init__()
        self.body, self.n_features = body, n_features

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


def adapting(
    strategy: S,
    model: nn.Module,
    n_outputs: int,
    source: Samples | None = None,
    transform: Transform | None = None,
) -> S:
    """A copy of the strategy, set up on a copy of the model as the engine would."""
    context = Context(
        device=torch.device("cpu"),
        seed=0,
        scenario=ToyScenario(),
        objective=Classification(task_aware=False, apart=True),
        transform=transform or Identity(),
        n_outputs=n_outputs,
        source=source,
    )
    strategy = copy.deepcopy(strategy)
    strategy.setup(copy.deepcopy(model), context)
    return strategy


def unlabelled(inputs: Tensor, raw: Tensor | None = None) -> Batch:
    """What arrives."""
    return Batch(
        inputs,
        torch.empty(0, dtype=torch.int64),
        inputs if raw is None else raw,
        torch.arange(len(inputs)),
    )


def labelled(inputs: Tensor, targets: Tensor, transform: Transform | None = None) -> Samples:
    """A source."""
    source = TensorSource(inputs, targets)
    return Samples(source, torch.arange(len(inputs)), transform or Identity())


def answers_without_a_trace(strategy: Strategy, batch: Batch) -> Tensor:
    """What the strategy predicts; twice the same, and nothing of it has changed."""
    before = flat(capture(strategy))
    with torch.inference_mode():
        first, second = strategy.predict(batch), strategy.predict(batch)
    after = flat(capture(strategy))
    assert torch.equal(first, second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    return first.clone()


def flat(state: object, path: str = "") -> dict[str, Tensor]:
    """The tensors and numbers of captured state by their place in it."""
    if isinstance(state, dict):
        pairs = list(state.items())
    elif isinstance(state, (list, tuple)):
        pairs = list(enumerate(state))
    elif isinstance(state, Tensor):
        return {path: state}
    elif isinstance(state, (bool, int, float)):
        return {path: torch.tensor(state)}
    else:
        return {}
    return {k: v for key, part in pairs for k, v in flat(part, f"{path}/{key}").items()}
