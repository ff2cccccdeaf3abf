"""APER against SimpleCIL, the closed form, and the promise that pre-trained weights stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.testing import ToyScenario, ToyViT
from strategies.aper import APER
from strategies.nmc import NMC

Make = Callable[..., Any]
TUNING = ["adapter", "ssf", "vpt_shallow", "vpt_deep", "full"]
EVERY_TUNING = pytest.mark.parametrize("tuning", TUNING)


def vit(bench: Make, **options: Any) -> Any:
    return bench(backbone=ToyViT(), **options)


def test_without_tuning_it_is_the_nearest_mean_of_frozen_features(bench: Make) -> None:
    one = vit(bench)
    aper, nmc = one.learned(APER(tuning="none")), one.learned(NMC(metric="cosine"))
    torch.testing.assert_close(one.outputs(aper), one.outputs(nmc))
    assert torch.equal(one.outputs(aper).argmax(1), one.outputs(nmc).argmax(1))
    assert sum(one.steps) == 2 * 240, "one pass each"


def test_without_tuning_any_features_will_do(bench: Make) -> None:
    APER(tuning="none").check(ToyScenario())
    APER(tuning="full").check(ToyScenario())
    one = bench()
    aper, nmc = one.learned(APER(tuning="none")), one.learned(NMC(metric="cosine"))
    torch.testing.assert_close(one.outputs(aper), one.outputs(nmc))


@EVERY_TUNING
def test_outputs_are_cosines_to_means_of_both_features(bench: Make, tuning: Any) -> None:
    one = vit(bench)
    aper = one.learned(APER(tuning=tuning))
    tests = torch.cat([t.take(torch.arange(len(t))).inputs for t in one.stream.tests])
    means = []
    for label in range(6):
        train = next(e.train for e in one.stream.experiences if label in e.classes)
        batch = train.take((train.targets == label).nonzero().flatten())
        means.append(aper.embed(batch.inputs).double().mean(0))
    expected = F.cosine_similarity(
        aper.embed(tests).double().unsqueeze(1), torch.stack(means), dim=2
    )
    torch.testing.assert_close(one.outputs(aper).double(), expected, rtol=1e-5, atol=1e-5)


@EVERY_TUNING
def test_features_are_those_of_the_model_as_it_came_and_as_it_was_tuned(
    bench: Make, tuning: Any
) -> None:
    one = vit(bench)
    fresh, aper = one.prepare(NMC()), one.learned(APER(tuning=tuning), 0)
    inputs = one.batch(0, 0, 10).inputs
    frozen, tuned = aper.embed(inputs).chunk(2, 1)
    torch.testing.assert_close(frozen, fresh.model.features(inputs), rtol=0, atol=0)
    assert not torch.allclose(frozen, tuned, atol=1e-3)


@EVERY_TUNING
def test_tuning_lowers_the_loss_of_the_first_experience(bench: Make, tuning: Any) -> None:
    one = vit(bench, epochs=20)
    aper = one.prepare(APER(tuning=tuning))
    losses: list[Any] = []
    update = aper.update

    def note(loss: Any) -> None:
        losses.append(loss.detach())
        update(loss)

    aper.update = note
    one.teach(aper, 0)
    epoch = len(losses) // 20
    assert torch.stack(losses[-epoch:]).mean() < 0.8 * torch.stack(losses[:epoch]).mean()


@EVERY_TUNING
def test_only_the_first_experience_tunes(bench: Make, tuning: Any) -> None:
    one = vit(bench)
    aper = one.learned(APER(tuning=tuning), 0)
    after_one = {k: v.clone() for k, v in aper.model.state_dict().items()}
    one.teach(aper, 1, 2)
    assert all(torch.equal(v, after_one[k]) for k, v in aper.model.state_dict().items())
    assert not any(p.requires_grad for p in aper.model.parameters())
    assert sum(one.steps) == 5 * 80 + 80 + 80


@pytest.mark.parametrize("tuning", TUNING[:-1])
def test_pre_trained_weights_stay_to_the_bit_and_get_no_gradients(bench: Make, tuning: Any) -> None:
    one = vit(bench)
    fresh, aper = one.prepare(NMC()), one.learned(APER(tuning=tuning))
    states = aper.model.features.state_dict(), fresh.model.features.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])
    assert all(p.grad is None for p in aper.model.features.parameters())


def test_frozen_parts_are_in_evaluation_mode_while_adapters_train(bench: Make) -> None:
    one = vit(bench)
    aper = one.prepare(APER())
    aper.before(one.stream.experiences[0])
    aper.begin(1)
    assert not any(m.training for m in aper.model.features.modules())
    assert all(m.training for m in aper.model.get_submodule("tuning").modules())
    assert len(aper.trainable()) == 2 * 4 + 2, "adapters of two blocks, the head and its scale"


def test_classes_that_have_not_come_are_named_last(bench: Make) -> None:
    one = vit(bench)
    aper = one.prepare(APER())
    assert one.outputs(aper).isfinite().all()
    one.teach(aper, 1)
    outputs = one.outputs(aper)
    met = list(one.stream.experiences[1].classes)
    others = [c for c in range(6) if c not in met]
    assert outputs.isfinite().all()
    assert outputs[:, others].max() < outputs[:, met].min()


@pytest.mark.parametrize("tuning", TUNING[:-1])
def test_a_backbone_without_blocks_is_refused_before_anything_is_loaded(tuning: Any) -> None:
    with pytest.raises(UserError, match=r"MLP.*backbone=vit_glyphs"):
        APER(tuning=tuning).check(ToyScenario())


def test_a_model_without_features_is_refused(bench: Make) -> None:
    sequence = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 6))
    with pytest.raises(UserError, match="Sequential"):
        bench(sequence).prepare(APER(tuning="none"))
