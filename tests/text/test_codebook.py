"""Which group an instruction belongs to: cosines by hand, stop words, prompts with other words."""

from __future__ import annotations

import math

import pytest
import torch

from clbench.text.codebook import Codebook, prompts_of
from clbench.text.encoding import ANSWER, PADDING
from clbench.text.tokenizers import Bytes


def book(*groups: list[str]) -> Codebook:
    made = Codebook()
    for group in groups:
        made.add(group)
    return made


def test_cosines_of_tf_idf_by_hand() -> None:
    """Three texts: "sort" and "count" are in one each, "letters" in two.

    idf = ln(4 / (1 + n)) + 1, as scikit-learn has it.
    """
    rare, common = math.log(4 / 2) + 1, math.log(4 / 3) + 1
    one = book(["sort letters"], ["reverse"])
    cosine = common**2 / (rare**2 + common**2)
    assert one.compared(["count letters"]).tolist() == pytest.approx([cosine, 0])
    assert one.compared(["sort letters"])[0] == pytest.approx(1)


def test_similarity_is_the_mean_over_all_pairs() -> None:
    several = book(["alpha", "beta"])
    assert several.compared(["alpha"])[0] == pytest.approx(0.5)
    assert several.compared(["alpha", "beta"])[0] == pytest.approx(0.5)
    assert several.of_prompts(["alpha", "beta", "alpha beta"])[:, 0].tolist() == pytest.approx(
        [0.5, 0.5, 2**-0.5]
    )


def test_stop_words_and_what_an_instruction_is_applied_to_do_not_count() -> None:
    one = book(["sort the letters"], ["mirror a word"])
    similar = one.of_prompts(["sort the letters: xqzu the", "mirror a word: abc", "xyz"])
    assert torch.allclose(similar, torch.tensor([[1.0, 0], [0, 1], [0, 0]], dtype=torch.float64))


def test_instructions_without_a_word_are_like_nothing() -> None:
    assert book().compared(["anything"]).shape == (0,)
    silent = book(["a"], ["the of"])
    assert silent.compared(["a"]).tolist() == [0, 0]
    assert silent.of_prompts(["a", "b"]).tolist() == [[0, 0], [0, 0]]


def test_groups_grow_and_are_saved() -> None:
    one = book(["alpha"], ["beta"])
    assert one.of_prompts(["gamma"]).tolist() == [[0, 0]]
    one.add(["gamma", "alpha"], 0)
    assert one.groups == [["alpha", "gamma"], ["beta"]]
    assert one.of_prompts(["gamma"]).tolist() == [[0.5, 0]]
    other = book(["something else"])
    other.load_state_dict(one.state_dict())
    assert other.groups == one.groups
    assert torch.equal(other.of_prompts(["gamma"]), one.of_prompts(["gamma"]))


def test_prompts_end_at_the_first_mark() -> None:
    rows = torch.tensor(
        [
            [Bytes.start, *b"ab", ANSWER, *b"x", PADDING],
            [Bytes.start, *b"cde", ANSWER, ANSWER],
            [PADDING, Bytes.start, *b"fg", PADDING, PADDING],
        ]
    )
    assert prompts_of(rows, Bytes()) == ["ab", "cde", "fg"]
