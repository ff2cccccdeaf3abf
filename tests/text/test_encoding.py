"""Instructions as rows of ids: what is kept, what is cut, what is a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.errors import UserError
from clbench.text.encoding import (
    ANSWER,
    IGNORED,
    PADDING,
    Example,
    Task,
    Template,
    TextSource,
    encode,
)
from clbench.text.tokenizers import Bytes, Published, Tokenizer, Trained

PLAIN = Template("{instruction} {input}=", separator="")
START, END = Bytes.start, Bytes.end


def ids(text: str) -> list[int]:
    return list(text.encode())


def source(*examples: Example, width: int = 20, answer_length: int = 6) -> TextSource:
    encoded = encode(examples, PLAIN, Bytes(), 64, answer_length)
    return TextSource(
        encoded, width, answer_length, examples, [Task("t")], [0] * len(examples), Bytes(), PLAIN
    )


def test_targets_are_the_answer_and_the_end_token_and_nothing_else() -> None:
    made = source(Example("up", "ab", ("AB",)), Example("up", "c", ("C",)))
    assert made.inputs[0].tolist()[:11] == [START, *ids("up ab="), ANSWER, *ids("AB"), END]
    assert made.inputs[1].tolist()[-11:] == [PADDING] * 11
    assert made.targets.tolist() == [
        [*ids("AB"), END, IGNORED, IGNORED, IGNORED],
        [*ids("C"), END, IGNORED, IGNORED, IGNORED, IGNORED],
    ]
    assert made.lengths.tolist() == [10, 8]
    assert made.prompt_lengths.tolist() == [7, 6]


def test_an_empty_answer_is_its_end_token() -> None:
    made = source(Example("say", "nothing", ("",)))
    assert made.targets[0].tolist() == [END] + [IGNORED] * 5
    spaced = encode([Example("a", "", ("",))], Template(separator=" "), Bytes(), 64, 4)
    assert spaced.answers == [[END]]


def test_a_prompt_that_is_too_long_loses_its_beginning_and_keeps_its_answer() -> None:
    encoded = encode([Example("up", "abcdefgh", ("XYZ",))], PLAIN, Bytes(), 12, 4)
    assert encoded.prompts == [[START, *ids("bcdefgh=")[-7:]]]
    assert encoded.answers == [[*ids("XYZ"), END]]
    assert (encoded.cut_prompts, encoded.cut_answers) == (1, 0)
    assert len(encoded.prompts[0]) + len(encoded.answers[0]) == 12


def test_an_answer_that_is_too_long_has_no_end_token() -> None:
    encoded = encode([Example("up", "ab", ("ABCDEF",))], PLAIN, Bytes(), 64, answer_length=3)
    assert encoded.answers == [ids("ABC")]
    assert encoded.cut_answers == 1


def test_an_answer_may_not_take_the_whole_context() -> None:
    with pytest.raises(UserError, match=r"Answers of 11 tokens leave no room for a prompt"):
        encode([Example("up", "ab", ("AB",))], PLAIN, Bytes(), 12, answer_length=11)


def test_a_model_without_start_token_still_has_something_to_read() -> None:
    headless: Any = Bytes()
    headless.start = None
    encoded = encode([Example("", "", ("x",))], Template("{instruction}"), headless, 8, 4)
    assert encoded.prompts == [[END]]


def test_lines_without_content_are_left_out() -> None:
    template = Template("Do: {instruction}\n{input}\nAnswer:")
    assert template.of(Example("add", "1 2", ("3",))) == "Do: add\n1 2\nAnswer:"
    assert template.of(Example("add", "", ("3",))) == "Do: add\nAnswer:"
    assert template.of(Example("{x}", "{}\n{y}", ("3",))) == "Do: {x}\n{}\n{y}\nAnswer:"


@pytest.mark.parametrize("text", ["{instruction", "{text}", "{0}"])
def test_a_template_that_cannot_be_filled_in_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"scenario.template=.* can't be filled in"):
        Template(text)


def tokenizers(folder: Path) -> list[Tokenizer]:
    trained = Trained(["the cat sat on the mat", "grün und 猫 <end>"] * 3, 300, folder)
    return [Bytes(), trained]


WORDS = ["", "cat", " the cat", "grün 猫 🐈", "<start>a<end>b", "</s>", "\t x\n\n"]


def test_text_comes_back_from_its_ids_and_never_becomes_a_special_token(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    for tokenizer in tokenizers(tmp_path):
        for text, found in zip(WORDS, tokenizer.encode(WORDS), strict=True):
            assert tokenizer.decode(found) == text
            assert not {tokenizer.start, tokenizer.end} & set(found)
            assert all(0 <= i < tokenizer.size for i in found)
            assert tokenizer.start is not None
            assert tokenizer.decode([tokenizer.start, *found, tokenizer.end]) == text


def test_a_trained_tokenizer_learns_words_and_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    _, first = tokenizers(tmp_path)
    assert len(first.encode(["the cat"])[0]) < 7
    assert first.size == 300 or first.size < 300
    monkeypatch.setattr(Trained, "_train", None)
    assert tokenizers(tmp_path)[1].facts() == first.facts()


def test_a_published_tokenizer_is_read_from_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="`text` is not installed")
    _, trained = tokenizers(tmp_path)
    assert isinstance(trained, Trained)
    folder = tmp_path / "published"
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained._bpe, bos_token="<start>", eos_token="<end>"
    )
    wrapped.save_pretrained(folder)
    published = Published(str(folder))
    assert (published.start, published.end) == (trained.start, trained.end)
    for text, found in zip(WORDS, published.encode(WORDS), strict=True):
        assert found == trained.encode([text])[0]
        assert published.decode(found) == text
    assert published.encode([]) == []


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"scenario.tokenizer=.*empty: no tokenizer could be"):
        Published(str(tmp_path / "empty"))


def test_a_source_moves_whole() -> None:
    made = source(Example("up", "ab", ("AB",)))
    assert made.to(torch.device("cpu")) is made
    moved = made.to(torch.device("meta"))
    assert moved.inputs.device.type == moved.lengths.device.type == "meta"
    assert moved.examples is made.examples
    assert made.inputs.device.type == "cpu"
