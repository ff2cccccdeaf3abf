"""Adapter tuning against a step worked out by hand, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.testing import ToyScenario, ToyViT
from strategies.adapter_finetune import AdapterFinetune
from strategies.finetune import Finetune

Make = Callable[..., Any]
PLAIN = AdapterFinetune(lr=0.1)


def vit(bench: Make, **options: Any) -> Any:
    return bench(backbone=ToyViT(), **options)


def adapters(strategy: Any) -> dict[str, torch.Tensor]:
    return dict(strategy.model.get_submodule("adapters").named_parameters())


def step(strategy: Any, batch: Any) -> None:
    strategy.begin(1)
    strategy.update(strategy.loss(batch))


def test_it_starts_from_the_pre_trained_outputs(bench: Make) -> None:
    one = vit(bench)
    assert torch.equal(one.outputs(one.prepare(PLAIN)), one.outputs(one.prepare(Finetune())))


def test_the_first_step_worked_out_by_hand(bench: Make) -> None:
    """Where W_u is zero, W_d gets no gradient, and the head that of softmax regression."""
    one = vit(bench)
    tuned, fresh = one.prepare(replace(PLAIN, compete="all")), one.prepare(Finetune())
    batch, old = one.batch(0, 0, 10), {k: v.clone() for k, v in adapters(tuned).items()}
    tuned.before(one.stream.experiences[0])
    step(tuned, batch)
    features = fresh.model.features(batch.inputs)
    errors = (fresh.model.head(features).softmax(1) - F.one_hot(batch.targets, 6)) / 10
    expected = fresh.model.head.weight - 0.1 * errors.T @ features
    torch.testing.assert_close(tuned.model.head.weight, expected)
    for name, value in adapters(tuned).items():
        changed = not torch.equal(value, old[name])
        assert changed == ("up" in name), name


@pytest.mark.parametrize(("compete", "untouched"), [("experience", True), ("all", False)])
def test_outputs_of_other_classes_compete_or_do_not(
    bench: Make, compete: Any, untouched: bool
) -> None:
    one = vit(bench)
    tuned, fresh = one.learned(replace(PLAIN, compete=compete), 1), one.prepare(PLAIN)
    others = [c for c in range(6) if c not in one.stream.experiences[1].classes]
    same = torch.equal(tuned.model.head.weight[others], fresh.model.head.weight[others])
    assert same == untouched


def test_pre_trained_weights_stay_to_the_bit_and_get_no_gradients(bench: Make) -> None:
    one = vit(bench)
    decayed = replace(PLAIN, momentum=0.9, weight_decay=0.1)
    tuned, fresh = one.learned(decayed), one.prepare(Finetune())
    states = tuned.model.features.state_dict(), fresh.model.features.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])
    assert all(p.grad is None for p in tuned.model.features.parameters())
    assert all(p.grad is not None for p in adapters(tuned).values())


def test_one_set_of_adapters_goes_on_through_all_experiences(bench: Make) -> None:
    one = vit(bench)
    tuned = one.learned(PLAIN, 0)
    first = {k: v.clone() for k, v in adapters(tuned).items()}
    outputs = one.outputs(tuned)
    one.teach(tuned, 1)
    assert adapters(tuned).keys() == first.keys()
    assert not any(torch.equal(v, first[k]) for k, v in adapters(tuned).items())
    assert not torch.allclose(one.outputs(tuned), outputs)


def test_frozen_parts_are_in_evaluation_mode_while_adapters_train(bench: Make) -> None:
    one = vit(bench)
    tuned = one.prepare(PLAIN)
    tuned.begin(1)
    assert not any(m.training for m in tuned.model.features.modules())
    assert all(m.training for m in tuned.model.get_submodule("adapters").modules())


def test_the_adapters_are_part_of_the_model_that_others_wrap(bench: Make) -> None:
    tuned = vit(bench).prepare(replace(PLAIN, bottleneck=4))
    count = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    assert count == 2 * (2 * 16 * 4 + 4 + 16) + 6 * 16 + 6


def test_a_backbone_without_blocks_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"MLP.*backbone=vit_glyphs"):
        PLAIN.check(ToyScenario())
