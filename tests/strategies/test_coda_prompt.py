"""CODA-Prompt: composition, penalty and loss written out; components that stay as they are."""

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
from strategies.coda_prompt import CODAPrompt

Make = Callable[..., Any]
SMALL: dict[str, Any] = {"components": 3, "prompt_length": 4}


@pytest.fixture
def vit_bench(bench: Make) -> Any:
    """A short stream for a vision transformer of three blocks."""
    return bench(model=transformer(3), epochs=1)


def prompted(coda: Any, inputs: Tensor) -> Tensor:
    return coda.prompted(inputs, coda.queries(inputs))  # type: ignore[no-any-return]


def features_by_hand(coda: Any, images: Tensor) -> Tensor:
    queries = features(coda._vit, images).detach()
    prefixes = {}
    for position, block in enumerate(coda._blocks):
        rows = []
        for query in queries:
            prompt = torch.zeros(coda.prompt_length * 16)
            for p, k, a in zip(*(table()[:, position] for table in coda._tables), strict=True):
                prompt = prompt + F.cosine_similarity(query * a, k, 0) * p
            rows.append(prompt.view(coda.prompt_length, 16))
        prefixes[block] = torch.stack(rows)
    return features(coda._vit, images, prefixes)


def test_features_are_those_of_attention_with_composed_prefixes(vit_bench: Any) -> None:
    coda = vit_bench.learned(CODAPrompt(**SMALL, layers=(0, 2)), 0, 1)
    for table in coda._tables:
        table.latest.data.mul_(3)
    inputs = vit_bench.batch(0, 0, 4).inputs
    found = prompted(coda, inputs)
    torch.testing.assert_close(found, features_by_hand(coda, inputs))
    plain = coda.model.features(inputs)
    torch.testing.assert_close(plain, features(coda._vit, inputs))
    assert not torch.allclose(found, plain, atol=0.01)


def test_composed_prompts_are_halves_for_keys_and_values(vit_bench: Any) -> None:
    """A component in the direction of the query alone, its weight 1."""
    coda = vit_bench.prepare(CODAPrompt(components=1, prompt_length=2, layers=(1,)))
    coda.before(vit_bench.stream.experiences[0])
    inputs = vit_bench.batch(0, 0, 1).inputs
    prompts, keys, attention = coda._tables
    prompts.latest.data[0, 0] = torch.arange(32.0)
    attention.latest.data.fill_(1)
    keys.latest.data[0, 0] = features(coda._vit, inputs)[0]
    prefix = torch.arange(32.0).view(1, 2, 16)
    expected = features(coda._vit, inputs, {1: prefix})
    torch.testing.assert_close(prompted(coda, inputs), expected)


def test_earlier_components_never_change(vit_bench: Any) -> None:
    coda = vit_bench.learned(CODAPrompt(**SMALL), 0)
    weights = {k: v.clone() for k, v in coda.model.features.state_dict().items()}
    for count in (1, 2):
        before = [table().detach().clone() for table in coda._tables]
        vit_bench.teach(coda, count)
        for table, kept in zip(coda._tables, before, strict=True):
            assert len(table) == 3 * (count + 1)
            assert torch.equal(table()[: 3 * count], kept)
    after = coda.model.features.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in weights.items())
    assert all(p.grad is None for p in coda.model.features.parameters())


def test_what_learns_are_the_latest_components_and_the_head(vit_bench: Any) -> None:
    coda = vit_bench.learned(CODAPrompt(**SMALL), 0)
    coda.before(vit_bench.stream.experiences[1])
    start = [table.latest.clone() for table in coda._tables]
    coda.fit(coda.material(vit_bench.stream.experiences[1]))
    for table, drawn in zip(coda._tables, start, strict=True):
        assert (table.latest != drawn).flatten(2).any(2).all()
    assert sum(p.numel() for p in coda.trainable()) == 3 * 3 * 16 * (4 + 1 + 1) + 6 * 17


def test_new_components_are_orthonormal_to_the_trained_ones(vit_bench: Any) -> None:
    coda = vit_bench.learned(CODAPrompt(**SMALL, lr=0.1), 0)
    trained = coda._prompts()[:, 0]
    assert not torch.allclose(trained @ trained.T, torch.eye(3), atol=0.1), "nothing was trained"
    coda.before(vit_bench.stream.experiences[1])
    for table in coda._tables:
        for block in range(3):
            rows, earlier = table.latest[:, block], table.frozen[:, block]
            torch.testing.assert_close(rows @ rows.T, torch.eye(3))
            torch.testing.assert_close(rows @ earlier.T, torch.zeros(3, 3), atol=1e-5, rtol=0)


def test_the_stream_may_be_longer_than_the_space_has_dimensions(vit_bench: Any) -> None:
    """16 features, of which the third experience would take up to 24."""
    coda = vit_bench.learned(CODAPrompt(components=8, prompt_length=2), 0, 1, 2)
    assert len(coda._keys) == 24
    assert vit_bench.outputs(coda).isfinite().all()


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_loss_is_cross_entropy_of_the_experience_and_the_penalty(
    vit_bench: Any, form: Any
) -> None:
    coda = vit_bench.learned(CODAPrompt(**SMALL, ortho_weight=0.4, ortho_form=form, lr=0.1), 0)
    coda.before(vit_bench.stream.experiences[1])
    for table in coda._tables:
        table.latest.data += 0.1
    batch, classes = vit_bench.batch(1, 0, 5), list(vit_bench.stream.experiences[1].classes)
    logits = coda.model.head(features_by_hand(coda, batch.inputs))[:, classes]
    expected = torch.zeros(())
    for i, label in enumerate(batch.targets.tolist()):
        expected = expected - logits[i].log_softmax(0)[classes.index(label)] / 5
    for table in coda._tables:
        for block in range(3):
            rows = table()[:, block]
            error = (rows @ rows.T - torch.eye(6)).square()
            expected = expected + 0.4 * (error.sum().sqrt() if form == "paper" else error.mean())
    loss = coda.loss(batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(table.latest.grad.any() for table in coda._tables)


def test_without_its_weight_the_penalty_plays_no_part(vit_bench: Any) -> None:
    coda = vit_bench.prepare(CODAPrompt(**SMALL))
    coda.before(vit_bench.stream.experiences[0])
    batch = vit_bench.batch(0, 0, 5)
    for table in coda._tables:
        table.latest.data.mul_(2)
    expected = coda.cross_entropy(prompted(coda, batch.inputs), batch.targets)
    assert torch.equal(coda.loss(batch), expected)


def test_an_answer_does_not_depend_on_the_other_images(vit_bench: Any) -> None:
    coda = vit_bench.learned(CODAPrompt(**SMALL), 0, 1, 2)
    batch = vit_bench.stream.tests[1].take(torch.arange(8)).unlabelled()
    together = coda.predict(batch)
    for i in range(8):
        alone = Batch(batch.inputs[i : i + 1], batch.targets, batch.raw[i : i + 1], batch.index)
        torch.testing.assert_close(coda.predict(alone)[0], together[i])


def test_classes_to_come_are_never_the_answer(vit_bench: Any) -> None:
    coda = vit_bench.prepare(CODAPrompt(**SMALL))
    assert vit_bench.outputs(coda).isfinite().all()
    vit_bench.teach(coda, 0)
    met = set(vit_bench.stream.experiences[0].classes)
    assert set(vit_bench.outputs(coda).argmax(1).tolist()) <= met


@pytest.mark.parametrize(("depth", "blocks"), [(12, [0, 1, 2, 3, 4]), (2, [0, 1])])
def test_the_first_five_blocks_are_prompted(bench: Make, depth: int, blocks: list[int]) -> None:
    assert bench(model=transformer(depth)).prepare(CODAPrompt())._blocks == blocks


def test_impossible_options_are_refused(vit_bench: Any) -> None:
    with pytest.raises(UserError, match="prompt_length=7"):
        CODAPrompt(prompt_length=7)
    with pytest.raises(UserError, match=r"components=17.*16 features"):
        vit_bench.prepare(CODAPrompt(components=17))
    with pytest.raises(UserError, match=r"layers=\[0, 3\].*blocks 0 to 2"):
        vit_bench.prepare(CODAPrompt(layers=(0, 3)))
    with pytest.raises(UserError, match="CODAPrompt needs a vision transformer"):
        CODAPrompt().check(ToyScenario())
    CODAPrompt().check(ToyScenario(backbone=ToyViT()))
