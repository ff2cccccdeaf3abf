"""What a language model makes of rows of codes, against the same model called by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.text.decoders import Llama
from clbench.text.encoding import ANSWER, PADDING, padded
from clbench.text.language_model import LanguageModel
from clbench.text.tokenizers import Bytes

pytest.importorskip("transformers", reason="the extra `text` is not installed")

END = Bytes.end
A = 6
#: Prompts of several lengths, each with two answers.
PROMPTS = ([256, 5, 6, 7], [256, 9], [256, 1, 2, 3, 4, 5, 6, 7])
ANSWERS = ([11, 12, END], [END], [13, 14, 15, 16, END])
OTHERS = ([12, END], [21, 22, 23, END], [END])


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        tiny = Llama(width=16, depth=2, heads=2, inner=24, context_length=64, spread=0.5)
        return tiny.assemble(Bytes(), A).eval()


def by_hand(model: LanguageModel, ids: list[int]) -> Tensor:
    """Logits after each token of one sequence without any padding."""
    decoder: Any = model.decoder
    logits: Tensor = decoder(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0]


def rows(*parts: tuple[list[int], ...], width: int = 40, left: bool = False) -> Tensor:
    """Codes of prompts and answers, padded on one side."""
    lists = [[*p, *(code for answer in a for code in (ANSWER, *answer))] for p, *a in parts]
    if left:
        lists = [[PADDING] * (width - len(row)) + row for row in lists]
    return padded(lists, width, PADDING)


def test_answers_are_read_token_by_token_given_all_before(model: LanguageModel) -> None:
    outputs = model(rows(*zip(PROMPTS, ANSWERS, strict=True)))
    assert outputs.shape == (3, A, Bytes.size)
    for prompt, answer, found in zip(PROMPTS, ANSWERS, outputs, strict=True):
        expected = by_hand(model, prompt + answer)[len(prompt) - 1 : -1]
        assert torch.allclose(found[: len(answer)], expected, atol=1e-5)
        assert not found[len(answer) :].any()


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_neither_logits_nor_answers_nor_likelihoods(
    model: LanguageModel, left: bool
) -> None:
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    questions: list[tuple[list[int], list[int]]] = [(prompt, []) for prompt in PROMPTS]
    choices = list(zip(PROMPTS, ANSWERS, OTHERS, strict=True))
    for parts in (pairs, questions, choices):
        together = model(rows(*parts, left=left))
        alone = torch.cat([model(rows(part, width=24)) for part in parts])
        assert torch.allclose(together, alone, atol=1e-5)


def test_padding_within_a_row_means_nothing(model: LanguageModel) -> None:
    tight = torch.tensor([[256, 5, 6, ANSWER, 11, END]])
    loose = torch.tensor([[PADDING, 256, PADDING, 5, 6, ANSWER, PADDING, 11, END, PADDING]])
    assert torch.equal(model(tight), model(loose))


def test_decoding_is_greedy_and_stops_behind_the_end_token(model: LanguageModel) -> None:
    answers = model(rows(*((prompt, []) for prompt in PROMPTS))).long().tolist()
    for prompt, found in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        expected: list[int] = []
        while len(expected) < A and END not in expected:
            ids.append(int(by_hand(model, ids)[-1].argmax()))
            expected.append(ids[-1])
        assert found == expected + [PADDING] * (A - len(expected))


def test_decoding_stops_early(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = int(by_hand(model, PROMPTS[0])[-1].argmax())
    monkeypatch.setattr(model, "end", first)
    answer = model(rows((PROMPTS[0], [])))
    assert answer.tolist() == [[first] + [PADDING] * (A - 1)]


def test_ranking_is_the_likelihood_of_each_answer_by_itself(model: LanguageModel) -> None:
    options = (*ANSWERS, [11, END], [11, 12, 30, 31, END])
    scores = model(rows(*((prompt, *options) for prompt in PROMPTS)))
    assert scores.shape == (len(PROMPTS), len(options))
    for prompt, found in zip(PROMPTS, scores, strict=True):
        for option, score in zip(options, found, strict=True):
            log_p = by_hand(model, prompt + option).log_softmax(1)[len(prompt) - 1 : -1]
            expected = log_p.gather(1, torch.tensor(option)[:, None]).sum()
            assert torch.allclose(score, expected, atol=1e-4)


def test_rows_with_fewer_answers_have_minus_infinity(model: LanguageModel) -> None:
    scores = model(rows((PROMPTS[0], [11, END], [12, END], [13, END]), (PROMPTS[1], [11, END])))
    assert scores.isfinite().tolist() == [[True, True, True], [True, False, False]]


def test_single_token_answers_can_be_ranked(model: LanguageModel) -> None:
    scores = model(rows((PROMPTS[0], [11], [12])))
    expected = by_hand(model, PROMPTS[0])[-1].log_softmax(0)[[11, 12]]
    assert torch.allclose(scores[0], expected, atol=1e-5)


def test_a_logit_that_is_not_finite_shows(model: LanguageModel) -> None:
    broken: Any = copy.deepcopy(model)
    torch.nn.init.constant_(broken.decoder.lm_head.weight, torch.nan)
    assert broken(rows((PROMPTS[0], []))).isnan().all()


def test_gradients_reach_every_weight_and_only_answers_count(model: LanguageModel) -> None:
    """Changing what is asked for changes nothing but its own positions: hand-made loss."""
    model.zero_grad()
    batch = rows(*zip(PROMPTS, ANSWERS, strict=True))
    targets = padded([*ANSWERS], A, -100)
    loss = F.cross_entropy(model(batch).flatten(0, 1), targets.flatten(), ignore_index=-100)
    by_token = [
        -by_hand(model, prompt + answer).log_softmax(1)[len(prompt) - 1 + i, token]
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        for i, token in enumerate(answer)
    ]
    assert torch.allclose(loss, torch.stack(by_token).mean(), atol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
