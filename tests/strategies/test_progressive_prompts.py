"""Progressive prompts: what is frozen, what is read, and who answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.samples import Batch
from strategies.progressive_prompts import ProgressivePrompts


def test_the_model_and_older_prompts_stay_to_the_bit(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=1)
    strategy = toy.prepare(ProgressivePrompts(prompt_length=3))
    model = [p.detach().clone() for p in strategy.model.parameters()]
    older: list[Tensor] = []
    for index in range(3):
        toy.teach(strategy, index)
        assert all(torch.equal(p, q) for p, q in zip(strategy.prompts, older, strict=False))
        older = [p.clone() for p in strategy.prompts]
    assert [tuple(p.shape) for p in older] == [(3, 48)] * 3
    assert all(torch.equal(p, q) for p, q in zip(strategy.model.parameters(), model, strict=True))
    assert not any(p.requires_grad for p in strategy.model.parameters())


def test_the_newest_prompt_is_read_first(instructions: Callable[..., Any]) -> None:
    toy = instructions(epochs=1)
    strategy = toy.learned(ProgressivePrompts(prompt_length=2))
    first, second, third = strategy.prompts
    assert torch.equal(strategy.prefix(2), torch.cat((third, second, first)))
    assert torch.equal(strategy.prefix(0), first)
    strategy.before(toy.stream.experiences[2])
    read = strategy.prefix(3)
    assert torch.equal(read[:2], strategy.newest())
    assert torch.equal(read[2:], torch.cat((third, second, first)))


def test_a_prompt_begins_as_tokens_and_goes_through_the_mlp(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions()
    strategy = toy.prepare(ProgressivePrompts(prompt_length=4))
    strategy.before(toy.stream.experiences[0])
    vectors = strategy._soft.embedding
    for row in strategy.start.detach():
        assert (vectors == row).all(1).any()
    w, b = strategy.mlp[0].weight, strategy.mlp[0].bias
    v, c, norm = strategy.mlp[2].weight, strategy.mlp[2].bias, strategy.mlp[3]
    e = strategy.start
    expected = e + norm((e @ w.T + b).relu() @ v.T + c)
    assert torch.allclose(strategy.newest(), expected, atol=1e-5)
    plain = toy.prepare(ProgressivePrompts(bottleneck=0))
    plain.before(toy.stream.experiences[0])
    assert plain.newest() is plain.start
    assert plain.trainable() == [plain.start]


def test_the_loss_is_that_of_the_answers_behind_all_prompts(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions(epochs=1)
    strategy = toy.learned(ProgressivePrompts(prompt_length=2), 0)
    strategy.before(toy.stream.experiences[1])
    batch = toy.batch(1, 0, 4)
    decoder = strategy._soft.decoder
    total = []
    for row, target in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        ids = torch.tensor([[code for code in row if code >= 0]])
        read = decoder.get_input_embeddings()(ids)
        prompt = torch.cat((strategy.newest(), strategy.prompts[0]))[None]
        logits = decoder(inputs_embeds=torch.cat((prompt, read), 1)).logits[0]
        # Before an answer of two tokens stand 4 vectors and the other tokens.
        at = torch.tensor([4 + ids.shape[1] - 3, 4 + ids.shape[1] - 2])
        total.append(-logits[at].log_softmax(1)[[0, 1], target[:2]])
    assert strategy.loss(batch).item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-4)


def test_a_question_is_answered_with_the_prompts_of_its_experience(
    worded: Callable[..., Any],
) -> None:
    toy = worded()
    strategy = toy.learned(ProgressivePrompts(lr=0.03), 0)
    asked = toy.stream.tests[0].take(torch.arange(4)).unlabelled()
    then = strategy.predict(asked)
    toy.teach(strategy, 1, 2)
    assert torch.equal(strategy.predict(asked), then), "nothing is forgotten"
    both = toy.stream.tests[1].take(torch.arange(4)).unlabelled()
    columns = ("inputs", "targets", "raw", "index")
    mixed = Batch(*(torch.cat([getattr(b, name) for b in (asked, both)]) for name in columns))
    assert torch.equal(strategy.predict(mixed), torch.cat((then, strategy.predict(both))))
    newest = toy.learned(ProgressivePrompts(lr=0.03, whose="newest"))
    found = newest.predict(asked)
    newest._soft.prefix = newest.prefix(2)
    assert torch.equal(found, newest.model(asked.inputs).float())


def test_before_anything_is_learned_the_model_answers_alone(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions()
    strategy = toy.prepare(ProgressivePrompts())
    asked = toy.stream.tests[0].take(torch.arange(4)).unlabelled()
    found = strategy.predict(asked)
    assert strategy._soft.prefix is None
    assert torch.equal(found, strategy.model(asked.inputs).float())


def test_prompts_that_do_not_fit_into_the_context_are_refused(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions(epochs=1)
    strategy = toy.prepare(ProgressivePrompts(prompt_length=30))
    toy.teach(strategy, 0)
    with pytest.raises(UserError, match=r"2 experiences take 60 tokens.*leave 59 of the context"):
        toy.teach(strategy, 1)
