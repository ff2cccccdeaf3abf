"""EASE's prototypes and outputs, by hand and by loops over the paper's indices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.testing import ToyScenario, ToyViT
from strategies.ease import EASE, synthesised
from strategies.finetune import Finetune

Make = Callable[..., Any]
QUICK = EASE(lr=0.1, momentum=0.9, bottleneck=4)


def vit(bench: Make, **options: Any) -> Any:
    return bench(backbone=ToyViT(), **options)


def test_a_prototype_synthesised_by_hand() -> None:
    """Class 0 came first; in its own subspace it is as class 1 and at right angles to class 2."""
    measured = torch.tensor(
        [[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [1.0, 1.0], [5.0, -1.0]]]
    )
    whole = synthesised(measured, torch.tensor([0, 1, 1]))
    w = math.e / (math.e + 1)
    expected = torch.tensor([w * 1 + (1 - w) * 5, w * 1 - (1 - w) * 1])
    torch.testing.assert_close(whole[1, 0], expected)
    assert torch.equal(whole[0], measured[0])
    assert torch.equal(whole[1, 1:], measured[1, 1:])


def by_loops(measured: Tensor, owners: list[int], j: int, c: int) -> Tensor:
    """p_j(c), for one class and one subspace after another."""
    i = owners[c]
    if j <= i:
        return measured[j, c]
    references = [k for k, owner in enumerate(owners) if owner >= j]
    likeness = [float(F.cosine_similarity(measured[i, c], measured[i, k], 0)) for k in references]
    total = sum(map(math.exp, likeness))
    parts = [
        math.exp(s) / total * measured[j, k] for s, k in zip(likeness, references, strict=True)
    ]
    return torch.stack(parts).sum(0)


def test_prototypes_of_three_experiences_are_those_of_loops() -> None:
    owners = [1, 0, 2, 1, 0, 2, 2, -1]
    measured = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    whole = synthesised(measured, torch.tensor(owners))
    for j in range(3):
        for c in range(7):
            torch.testing.assert_close(whole[j, c], by_loops(measured, owners, j, c))


def test_prototypes_are_means_of_features_with_the_adapters(bench: Make) -> None:
    one = vit(bench)
    ease = one.learned(QUICK)
    assert ease.measured.shape == (3, 6, 16)
    for label in range(6):
        owner = int(ease.owners[label])
        assert label in one.stream.experiences[owner].classes
        train = one.stream.experiences[owner].train
        inputs = train.take((train.targets == label).nonzero().flatten()).inputs
        for j, features in enumerate(ease.subspaces(inputs)):
            expected = features.mean(0) if j <= owner else torch.zeros(16)
            torch.testing.assert_close(ease.measured[j, label], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
def test_outputs_are_the_equation_s(bench: Make, alpha: float) -> None:
    one = vit(bench)
    ease = one.learned(EASE(lr=0.1, bottleneck=4, alpha=alpha))
    batch, owners = one.batch(1, 0, 7), ease.owners.tolist()
    outputs = ease.predict(batch.unlabelled())
    for x, row in zip(batch.inputs, outputs, strict=True):
        features = [f[0] for f in ease.subspaces(x.unsqueeze(0))]
        for c, i in enumerate(owners):
            expected = torch.zeros(())
            for j in range(3):
                cosine = F.cosine_similarity(features[j], by_loops(ease.measured, owners, j, c), 0)
                expected += cosine * (1 if j == i else alpha / 2)
            torch.testing.assert_close(row[c], expected, rtol=1e-4, atol=1e-5)


def test_one_experience_is_the_nearest_mean_of_adapted_features(bench: Make) -> None:
    one = vit(bench)
    ease = one.learned(QUICK, 0)
    classes = list(one.stream.experiences[0].classes)
    outputs = one.outputs(ease)
    tests = torch.cat([t.take(torch.arange(len(t))).inputs for t in one.stream.tests])
    (features,) = ease.subspaces(tests)
    expected = F.cosine_similarity(features.unsqueeze(1), ease.measured[0, classes], dim=2)
    torch.testing.assert_close(outputs[:, classes], expected)
    others = [c for c in range(6) if c not in classes]
    assert outputs.isfinite().all()
    assert outputs[:, others].max() < outputs[:, classes].min()


def test_nothing_is_known_before_the_first_experience(bench: Make) -> None:
    one = vit(bench)
    assert one.outputs(one.prepare(QUICK)).isfinite().all()


def test_pre_trained_weights_and_older_adapters_stay_to_the_bit(bench: Make) -> None:
    one = vit(bench)
    ease, fresh = one.learned(QUICK, 0), one.prepare(Finetune())
    first = {k: v.clone() for k, v in ease.adapters[0].state_dict().items()}
    one.teach(ease, 1, 2)
    assert all(torch.equal(v, first[k]) for k, v in ease.adapters[0].state_dict().items())
    states = ease.model.features.state_dict(), fresh.model.features.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])
    assert all(p.grad is None for p in ease.model.features.parameters())
    assert not any(p.requires_grad for p in ease.adapters.parameters())


def test_every_experience_trains_new_adapters_and_a_classifier_of_its_own(bench: Make) -> None:
    one = vit(bench)
    ease = one.learned(QUICK, 0)
    ease.before(one.stream.experiences[1])
    with ease._adapters.put_into(ease._vit):
        inputs = one.batch(1, 0, 5).inputs
        fresh = one.prepare(Finetune())
        assert torch.equal(ease._features(inputs), fresh.model.features(inputs))
    downs = ease._adapters[0].down.weight, ease.adapters[0][0].down.weight
    assert not torch.allclose(*downs, atol=0.01)
    assert ease._head.weight.shape == (2, 16)
    ease.begin(1)
    assert not any(m.training for m in ease.model.features.modules())
    assert all(m.training for m in ease._adapters.modules())
    parameters = sum(p.numel() for p in ease.trainable())
    assert parameters == 2 * (2 * 16 * 4 + 4 + 16) + 2 * 16 + 1


def test_an_image_costs_one_pass_for_each_experience(bench: Make) -> None:
    one = vit(bench)
    ease = one.learned(QUICK)
    seen: list[int] = []
    hook = ease._features.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    ease.predict(one.batch(0, 0, 9).unlabelled())
    hook.remove()
    assert seen == [9, 9, 9]


def test_a_backbone_without_blocks_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"MLP.*backbone=vit_glyphs"):
        QUICK.check(ToyScenario())
