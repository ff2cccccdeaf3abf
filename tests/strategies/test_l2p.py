"""L2P: choice, features and loss written out; what learns and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vit_by_hand import features, transformer

from clbench.errors import UserError
from clbench.nn.backbones import ModelFeatures
from clbench.nn.heads import Classifier
from clbench.samples import Batch
from clbench.state import capture
from clbench.testing import ToyScenario, ToyViT
from strategies.l2p import L2P

Make = Callable[..., Any]
FEW: dict[str, Any] = {"pool_size": 4, "prompt_length": 3, "top_k": 2, "start_scale": 1.0}


@pytest.fixture
def vit_bench(bench: Make) -> Any:
    """A short stream for a small vision transformer."""
    return bench(backbone=ToyViT(), epochs=1)


def choice_by_hand(l2p: Any, batch: Batch, weights: Tensor | None = None) -> list[list[int]]:
    """The keys with the smallest, possibly weighted, cosine distance from each query."""
    chosen = []
    for query in features(l2p._vit, batch.inputs):
        distances = 1 - F.cosine_similarity(query, l2p._pool.keys)
        if weights is not None:
            distances = distances * weights
        chosen.append(distances.argsort()[: l2p.top_k].tolist())
    return chosen


def spread_keys(l2p: Any, batch: Batch) -> None:
    """A key in the direction of each of the first images: each of these chooses its own first."""
    l2p._pool.keys.data = features(l2p._vit, batch.inputs[: l2p.pool_size]).detach()


def features_by_hand(l2p: Any, batch: Batch, chosen: list[list[int]]) -> Tensor:
    tokens = torch.stack([torch.cat([l2p._pool.prompts[i] for i in row]) for row in chosen])
    return features(l2p._vit, batch.inputs, tokens=tokens)


def test_features_are_the_mean_output_of_the_chosen_prompts(vit_bench: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW))
    batch = vit_bench.batch(0, 0, 7)
    spread_keys(l2p, batch)
    chosen = choice_by_hand(l2p, batch)
    assert [row[0] for row in chosen[:4]] == [0, 1, 2, 3]
    found, _ = l2p._pool.choose(l2p.queries(batch.inputs), l2p.top_k)
    assert found.tolist() == chosen
    prompted = l2p.prompted(batch.inputs, found)
    torch.testing.assert_close(prompted, features_by_hand(l2p, batch, chosen))
    plain = l2p.model.features(batch.inputs)
    torch.testing.assert_close(plain, features(l2p._vit, batch.inputs))
    assert not torch.allclose(plain, prompted, atol=0.1)


def test_a_transformer_that_averages_its_tokens_averages_the_prompts(bench: Make) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = transformer(2)
    averaging = VisionTransformer(
        img_size=6,
        patch_size=3,
        in_chans=1,
        num_classes=0,
        mlp_ratio=2,
        embed_dim=16,
        depth=2,
        num_heads=2,
        global_pool="avg",
    )
    token = model.features.get_submodule("model")
    state = token.state_dict()
    averaging.load_state_dict(
        {
            k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v
            for k, v in state.items()
        }
    )
    one = bench(model=Classifier(ModelFeatures(averaging, 16), nn.Linear(16, 6)))
    l2p, batch = one.prepare(L2P(**FEW)), one.batch(0, 0, 3)
    chosen = torch.tensor([[0, 1], [2, 0], [1, 3]])
    tokens = l2p._pool(chosen)
    # The norm comes after the mean there.
    norm: Any = averaging.fc_norm
    token.add_module("norm", nn.Identity())
    expected = norm(features(token, batch.inputs, tokens=tokens))
    torch.testing.assert_close(l2p.prompted(batch.inputs, chosen), expected)


def test_the_loss_is_cross_entropy_of_the_experience_and_the_pull(vit_bench: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW, pull_weight=0.3))
    vit_bench.teach(l2p, 0)
    l2p.before(vit_bench.stream.experiences[1])
    batch, classes = vit_bench.batch(1, 0, 6), list(vit_bench.stream.experiences[1].classes)
    chosen = choice_by_hand(l2p, batch)
    queries = features(l2p._vit, batch.inputs)
    logits = l2p.model.head(features_by_hand(l2p, batch, chosen))[:, classes]
    expected = torch.zeros(())
    for i, label in enumerate(batch.targets.tolist()):
        expected = expected - logits[i].log_softmax(0)[classes.index(label)] / 6
        for k in chosen[i]:
            expected = expected - 0.3 * F.cosine_similarity(queries[i], l2p._pool.keys[k], 0) / 6
    torch.testing.assert_close(l2p.loss(batch), expected)


def test_only_prompts_keys_and_the_head_of_arriving_classes_learn(vit_bench: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW))
    before = {k: v.clone() for k, v in l2p.model.state_dict().items()}
    vit_bench.teach(l2p, 0)
    changed = {k for k, v in l2p.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"prompts.prompts", "prompts.keys", "head.weight", "head.bias"}
    rows = (l2p.model.head.weight != before["head.weight"]).any(1)
    assert rows.nonzero().flatten().tolist() == sorted(vit_bench.stream.experiences[0].classes)
    assert all(p.grad is None for p in l2p.model.features.parameters())


def test_the_transformer_stays_in_evaluation_mode_while_it_is_prompted(vit_bench: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW))
    l2p.before(vit_bench.stream.experiences[0])
    l2p.begin(1)
    assert l2p.model.training
    assert not any(module.training for module in l2p.model.features.modules())


@pytest.mark.parametrize("vote", ["never", "training"])
def test_an_answer_does_not_depend_on_the_other_images(vit_bench: Any, vote: Any) -> None:
    l2p = vit_bench.learned(L2P(**FEW, batch_vote=vote), 0, 1)
    batch = vit_bench.stream.tests[1].take(torch.arange(8)).unlabelled()
    spread_keys(l2p, batch)
    together = l2p.predict(batch)
    for i in range(8):
        alone = Batch(batch.inputs[i : i + 1], batch.targets, batch.raw[i : i + 1], batch.index)
        torch.testing.assert_close(l2p.predict(alone)[0], together[i])


def test_where_a_batch_votes_always_all_images_get_the_same_prompts(vit_bench: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW, batch_vote="always"))
    l2p.met.fill_(True)
    batch = vit_bench.batch(0, 0, 7)
    spread_keys(l2p, batch)
    counts = torch.tensor(choice_by_hand(l2p, batch)).flatten().bincount(minlength=4)
    popular = counts.argsort(descending=True, stable=True)[:2].tolist()
    expected = l2p.model.head(features_by_hand(l2p, batch, [popular] * 7))
    torch.testing.assert_close(l2p.predict(batch), expected)


@pytest.mark.parametrize("vote", ["training", "always"])
def test_a_vote_in_training_takes_the_popular_prompts(vit_bench: Any, vote: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW, batch_vote=vote))
    l2p.before(vit_bench.stream.experiences[0])
    batch = vit_bench.batch(0, 0, 7)
    spread_keys(l2p, batch)
    l2p.loss(batch)
    assert len({tuple(row) for row in l2p._chosen.tolist()}) == 1


def test_choices_are_counted_and_weigh_the_distances_of_the_next_experience(vit_bench: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW, diversify=True))
    vit_bench.teach(l2p, 0)
    assert l2p.choices.sum().item() == sum(vit_bench.steps) * 2
    assert "choices" in capture(l2p)
    l2p.choices = torch.tensor([1.0, 5.0, 3.0, 1.0])
    l2p.before(vit_bench.stream.experiences[1])
    batch = vit_bench.batch(1, 0, 9)
    spread_keys(l2p, batch)
    l2p.loss(batch)
    frequent = torch.tensor([0.1, 0.5, 0.3, 0.1])
    assert l2p._chosen.tolist() == choice_by_hand(l2p, batch, frequent)
    assert l2p._chosen.tolist() != choice_by_hand(l2p, batch)
    # A prediction chooses by distance alone.
    l2p.met.fill_(True)
    expected = l2p.model.head(features_by_hand(l2p, batch, choice_by_hand(l2p, batch)))
    torch.testing.assert_close(l2p.predict(batch), expected)


def test_without_diversification_frequency_plays_no_part(vit_bench: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW))
    vit_bench.teach(l2p, 0)
    l2p.before(vit_bench.stream.experiences[1])
    batch = vit_bench.batch(1, 0, 9)
    spread_keys(l2p, batch)
    l2p.loss(batch)
    assert l2p._chosen.tolist() == choice_by_hand(l2p, batch)


def test_classes_to_come_are_never_the_answer(vit_bench: Any) -> None:
    l2p = vit_bench.prepare(L2P(**FEW))
    assert vit_bench.outputs(l2p).isfinite().all()
    vit_bench.teach(l2p, 0)
    met = set(vit_bench.stream.experiences[0].classes)
    assert set(vit_bench.outputs(l2p).argmax(1).tolist()) <= met


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match="top_k=6"):
        L2P(pool_size=5, top_k=6)
    with pytest.raises(UserError, match=r"L2P needs a vision transformer.*MLP"):
        L2P().check(ToyScenario())
    L2P().check(ToyScenario(backbone=ToyViT()))
