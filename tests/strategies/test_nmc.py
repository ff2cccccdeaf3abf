"""NMC against the closed form, whatever the order of the experiences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from strategies.nmc import NMC

Make = Callable[..., Any]
METRICS = pytest.mark.parametrize("metric", ["euclidean", "cosine"])


def closed_form(one: Any, nmc: NMC, metric: str) -> Tensor:
    """Outputs from the means over all samples at once, in double precision."""
    parts = [e.train.take(torch.arange(len(e.train))) for e in one.stream.experiences]
    tests = [t.take(torch.arange(len(t))) for t in one.stream.tests]
    with torch.no_grad():
        features = nmc.model.features(torch.cat([p.inputs for p in parts])).double()
        queries = nmc.model.features(torch.cat([t.inputs for t in tests])).double()
    targets = torch.cat([p.targets for p in parts])
    means = torch.stack([features[targets == c].mean(0) for c in range(6)])
    if metric == "euclidean":
        outputs: Tensor = -((queries.unsqueeze(1) - means) ** 2).sum(2)
    else:
        outputs = F.cosine_similarity(queries.unsqueeze(1), means, dim=2)
    return outputs


@METRICS
def test_every_order_of_experiences_gives_the_joint_closed_form(bench: Make, metric: Any) -> None:
    one = bench()
    for order in permutations(range(3)):
        nmc = one.learned(NMC(metric=metric), *order)
        expected = closed_form(one, nmc, metric)
        torch.testing.assert_close(one.outputs(nmc).double(), expected, rtol=1e-5, atol=1e-5)


def test_samples_of_one_class_may_come_in_several_experiences(bench: Make) -> None:
    """The mean is over samples, not over experiences."""
    one = bench()
    train = one.stream.experiences[0].train
    label = int(train.targets[0])
    mine = train.subset((train.targets == label).nonzero().flatten())
    nmc = one.prepare(NMC())
    for positions in (torch.arange(3), torch.arange(3, len(mine))):
        part = one.stream.experiences[0]
        nmc.learn(type(part)(part.index, part.name, mine.subset(positions), part.classes))
    whole = one.learned(NMC(), 0)
    torch.testing.assert_close(nmc.means()[label], whole.means()[label])
    assert nmc.counts[label] == len(mine)


def test_nothing_is_trained(bench: Make, same_weights: Callable[..., bool]) -> None:
    one = bench()
    nmc, fresh = one.learned(NMC()), one.prepare(NMC())
    assert same_weights(nmc.model, fresh.model)
    assert not any(p.requires_grad for p in nmc.model.parameters())
    assert sum(one.steps) == 240, "one pass"


@METRICS
def test_classes_that_have_not_come_are_named_last(bench: Make, metric: Any) -> None:
    one = bench()
    nmc = one.prepare(NMC(metric=metric))
    assert one.outputs(nmc).isfinite().all()
    one.teach(nmc, 1)
    outputs = one.outputs(nmc)
    met = list(one.stream.experiences[1].classes)
    others = [c for c in range(6) if c not in met]
    assert outputs.isfinite().all()
    assert outputs[:, others].max() < outputs[:, met].min()


def test_a_model_without_features_is_refused(bench: Make) -> None:
    with pytest.raises(UserError, match="Sequential"):
        bench(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 6))).prepare(NMC())
