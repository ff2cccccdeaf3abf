"""A soft prompt before every row: what is read, generated and ranked, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.machine import isolated_rng
from clbench.text.decoders import Llama, Published
from clbench.text.encoding import ANSWER, PADDING, padded
from clbench.text.language_model import LanguageModel
from clbench.text.soft_prompts import SoftPrompted
from clbench.text.tokenizers import Bytes

transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")

LENGTH = 6
PROMPTS = [[256, *b"abc"], [256, *b"x"], [256, *b"hello"]]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path: Any) -> LanguageModel:
    """Rotary positions, and positions from a table."""
    made: Any = Llama(width=16, depth=2, heads=2, inner=24, spread=0.4)
    if request.param == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=258,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.4,
            bos_token_id=256,
            eos_token_id=257,
        )
        config.save_pretrained(tmp_path)
        made = Published(where=str(tmp_path), weights="random")
    with isolated_rng(0, "test"):
        found = made.assemble(Bytes(), LENGTH)
    found.decoder = SoftPrompted(found.decoder)
    assert isinstance(found, LanguageModel)
    return found.eval().requires_grad_(False)


def prefix(count: int = 5) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0))


def logits_after(model: LanguageModel, ids: list[int], prompt: Tensor | None) -> Tensor:
    """Of all tokens of one row, without padding, mask, positions and cache."""
    decoder: Any = model.decoder.decoder
    read = decoder.get_input_embeddings()(torch.tensor([ids]))
    if prompt is None:
        return decoder(inputs_embeds=read).logits[0]
    return decoder(inputs_embeds=torch.cat((prompt[None], read), 1)).logits[0, len(prompt) :]


@pytest.mark.parametrize("count", [0, 5])
def test_given_answers_are_read_behind_the_prompt(model: LanguageModel, count: int) -> None:
    model.decoder.prefix = prefix(count) if count else None
    answers = [[*b"no", 257], [*b"y", 257], [257]]
    rows = [[*p, ANSWER, *a] for p, a in zip(PROMPTS, answers, strict=True)]
    found = model(padded(rows, 12, PADDING))
    for out, p, a in zip(found, PROMPTS, answers, strict=True):
        whole = logits_after(model, [*p, *a], model.decoder.prefix)
        expected = whole[len(p) - 1 : len(p) - 1 + len(a)]
        assert torch.allclose(out[: len(a)], expected, atol=1e-4)


def test_answers_are_generated_behind_the_prompt(model: LanguageModel) -> None:
    """Left padding, positions and cache: as if each row were alone and read anew each time."""
    model.decoder.prefix = prefix()
    found = model(padded([[*p, ANSWER] for p in PROMPTS], 8, PADDING))
    for out, ids in zip(found.long().tolist(), PROMPTS, strict=True):
        said: list[int] = []
        while len(said) < LENGTH and 257 not in said:
            logits = logits_after(model, [*ids, *said], model.decoder.prefix)
            said.append(int(logits[-1].argmax()))
        assert [i for i in out if i != PADDING] == said
    model.decoder.prefix = None
    assert not torch.equal(found, model(padded([[*p, ANSWER] for p in PROMPTS], 8, PADDING)))


def test_labels_are_ranked_behind_the_prompt(model: LanguageModel) -> None:
    model.decoder.prefix = prefix()
    labels = [[*b"good", 257], [*b"bad", 257]]
    options = [code for label in labels for code in (ANSWER, *label)]
    rows = padded([[*p, *options] for p in PROMPTS], 24, PADDING)
    for out, ids in zip(model(rows), PROMPTS, strict=True):
        for score, label in zip(out, labels, strict=True):
            whole = logits_after(model, [*ids, *label], model.decoder.prefix).log_softmax(1)
            at = torch.arange(len(ids) - 1, len(ids) - 1 + len(label))
            expected = whole[at, torch.tensor(label)].sum()
            assert score.item() == pytest.approx(expected.item(), abs=1e-3)
