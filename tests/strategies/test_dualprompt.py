"""DualPrompt: prefixes, keys and loss written out; experts that stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vit_by_hand import features, transformer

from clbench.errors import UserError
from clbench.samples import Batch
from clbench.testing import ToyScenario, ToyViT
from strategies.dualprompt import DualPrompt

Make = Callable[..., Any]
SHORT: dict[str, Any] = {"general_length": 2, "expert_length": 4, "start_scale": 1.0}


@pytest.fixture
def vit_bench(bench: Make) -> Any:
    """A short stream for a vision transformer of three blocks: one general, two of experts."""
    return bench(model=transformer(3), epochs=1)


def features_by_hand(dual: Any, images: Tensor, experts: list[int]) -> Tensor:
    count = len(images)
    prefixes = {0: dual._general[0][0].expand(count, -1, -1)}
    for position, block in enumerate((1, 2)):
        prefixes[block] = torch.stack([dual._experts()[e, position] for e in experts])
    return features(dual._vit, images, prefixes)


def test_features_are_those_of_attention_with_prefixes(vit_bench: Any) -> None:
    dual = vit_bench.learned(DualPrompt(**SHORT), 0, 1, 2)
    batch = vit_bench.batch(0, 0, 4)
    experts = [2, 0, 1, 0]
    found = dual.prompted(batch.inputs, dual._experts()[experts])
    torch.testing.assert_close(found, features_by_hand(dual, batch.inputs, experts))
    plain = dual.model.features(batch.inputs)
    torch.testing.assert_close(plain, features(dual._vit, batch.inputs))
    assert not torch.allclose(found, plain, atol=0.1)


def test_prompts_of_no_length_leave_the_transformer_as_it_is(vit_bench: Any) -> None:
    dual = vit_bench.prepare(DualPrompt(general_length=0, expert_length=0))
    dual.before(vit_bench.stream.experiences[0])
    inputs = vit_bench.batch(0, 0, 5).inputs
    found = dual.prompted(inputs, dual._experts.latest[0])
    assert torch.equal(found, dual.model.features(inputs))


def test_a_prediction_takes_the_expert_with_the_nearest_key(vit_bench: Any) -> None:
    dual = vit_bench.learned(DualPrompt(**SHORT), 0, 1, 2)
    tests = torch.cat([t.take(torch.arange(4)).inputs for t in vit_bench.stream.tests])
    queries = features(dual._vit, tests)
    dual._keys.frozen[:] = queries[:2]
    dual._keys.latest.data[:] = queries[2]
    experts = [int(F.cosine_similarity(q, dual._keys()).argmax()) for q in queries]
    assert experts[:3] == [0, 1, 2]
    expected = dual.model.head(features_by_hand(dual, tests, experts))
    torch.testing.assert_close(dual.forward(tests), expected)


def test_the_loss_takes_the_expert_of_the_experience(vit_bench: Any) -> None:
    dual = vit_bench.learned(DualPrompt(**SHORT, match_weight=0.7), 0)
    dual.before(vit_bench.stream.experiences[1])
    batch, classes = vit_bench.batch(1, 0, 6), list(vit_bench.stream.experiences[1].classes)
    logits = dual.model.head(features_by_hand(dual, batch.inputs, [1] * 6))[:, classes]
    queries, key = features(dual._vit, batch.inputs), dual._keys()[1]
    expected = torch.zeros(())
    for i, label in enumerate(batch.targets.tolist()):
        expected = expected - logits[i].log_softmax(0)[classes.index(label)] / 6
        expected = expected - 0.7 * F.cosine_similarity(queries[i], key, 0) / 6
    torch.testing.assert_close(dual.loss(batch), expected)


def test_earlier_experts_and_keys_never_change_the_general_prompt_does(vit_bench: Any) -> None:
    dual = vit_bench.learned(DualPrompt(**SHORT), 0)
    general = dual._general[0].detach().clone()
    weights = {k: v.clone() for k, v in dual.model.features.state_dict().items()}
    for count in (1, 2):
        experts, keys = dual._experts().detach().clone(), dual._keys().detach().clone()
        vit_bench.teach(dual, count)
        assert len(dual._experts) == len(dual._keys) == count + 1
        assert torch.equal(dual._experts()[:count], experts)
        assert torch.equal(dual._keys()[:count], keys)
    assert not torch.equal(dual._general[0], general)
    after = dual.model.features.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in weights.items())
    assert all(p.grad is None for p in dual.model.features.parameters())


def test_what_learns_is_the_latest_expert_its_key_the_general_prompt_and_the_head(
    vit_bench: Any,
) -> None:
    dual = vit_bench.learned(DualPrompt(**SHORT), 0)
    dual.before(vit_bench.stream.experiences[1])
    start = dual._experts.latest.clone(), dual._keys.latest.clone()
    dual.fit(dual.material(vit_bench.stream.experiences[1]))
    assert not torch.equal(dual._experts.latest, start[0])
    assert not torch.equal(dual._keys.latest, start[1])
    numbers = 1 * 2 * 16 + 1 * 2 * 4 * 16 + 16 + 6 * 17
    assert sum(p.numel() for p in dual.trainable()) == numbers


def test_a_new_expert_starts_at_random_or_as_the_one_before(vit_bench: Any) -> None:
    for start in ("random", "previous"):
        dual = vit_bench.learned(DualPrompt(**SHORT, expert_start=start), 0)
        learned = dual._experts.latest.detach().clone()
        dual.before(vit_bench.stream.experiences[1])
        assert torch.equal(dual._experts.latest, learned) == (start == "previous")
        if start == "random":
            assert dual._experts.latest.min() >= 0
            assert dual._experts.latest.max() < 1
        vit_bench.teach(dual, 2)
        assert torch.equal(dual._experts.frozen[:1], learned)


def test_an_answer_does_not_depend_on_the_other_images(vit_bench: Any) -> None:
    dual = vit_bench.learned(DualPrompt(**SHORT), 0, 1, 2)
    batch = vit_bench.stream.tests[1].take(torch.arange(8)).unlabelled()
    together = dual.predict(batch)
    for i in range(8):
        alone = Batch(batch.inputs[i : i + 1], batch.targets, batch.raw[i : i + 1], batch.index)
        torch.testing.assert_close(dual.predict(alone)[0], together[i])


def test_classes_to_come_are_never_the_answer(vit_bench: Any) -> None:
    dual = vit_bench.prepare(DualPrompt(**SHORT))
    assert vit_bench.outputs(dual).isfinite().all()
    vit_bench.teach(dual, 0)
    met = set(vit_bench.stream.experiences[0].classes)
    assert set(vit_bench.outputs(dual).argmax(1).tolist()) <= met


@pytest.mark.parametrize(
    ("depth", "general", "experts"),
    [
        (12, [0, 1], [2, 3, 4]),
        (4, [0, 1], [2, 3]),
        (3, [0], [1, 2]),
        (2, [0], [1]),
        (1, [], [0]),
    ],
)
def test_shallow_transformers_have_fewer_prompted_blocks(
    bench: Make, depth: int, general: list[int], experts: list[int]
) -> None:
    dual = bench(model=transformer(depth)).prepare(DualPrompt())
    assert dual._general_blocks == general
    assert dual._expert_blocks == experts
    assert len(dual._general[0]) == len(general)


def test_chosen_blocks_are_kept_and_the_default_experts_avoid_them(bench: Make) -> None:
    dual = bench(model=transformer(12)).prepare(DualPrompt(general_layers=(2, 11)))
    assert dual._general_blocks == [2, 11]
    assert dual._expert_blocks == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"general_layers": (0, 3)}, r"general_layers=\[0, 3\].*blocks 0 to 2"),
        ({"expert_layers": (1, 1)}, r"expert_layers=\[1, 1\]"),
        ({"expert_layers": (-1,)}, "expert_layers"),
        ({"expert_layers": (0, 1)}, r"blocks \[0\] are in"),
    ],
)
def test_blocks_that_do_not_exist_or_twice_are_refused(
    vit_bench: Any, options: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        vit_bench.prepare(DualPrompt(**options))


def test_odd_lengths_and_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="expert_length=5"):
        DualPrompt(expert_length=5)
    with pytest.raises(UserError, match="DualPrompt needs a vision transformer"):
        DualPrompt().check(ToyScenario())
    DualPrompt().check(ToyScenario(backbone=ToyViT()))
