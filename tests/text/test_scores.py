"""Scores of answers in words, against published examples and numbers worked out by hand."""

from __future__ import annotations

import pytest

from clbench.text.encoding import Task
from clbench.text.scores import (
    SCORES,
    edit_similarity,
    exact_match,
    first_character,
    judge,
    normalised,
    rouge_l,
    sari,
    strict_match,
)


def test_normalisation_drops_case_punctuation_and_spaces_and_keeps_articles() -> None:
    assert normalised("  The  Cat's, MAT!\n") == "the cats mat"
    assert normalised("a") == "a"


@pytest.mark.parametrize(
    ("said", "right", "exact", "strict"),
    [
        ("Good", ["good."], 1, 0),
        (" Good\n", ["Good"], 1, 1),
        ("bad", ["good"], 0, 0),
        ("b", ["a", "b"], 1, 1),
        ("", [""], 1, 1),
        ("...", [""], 1, 0),
        ("", ["x"], 0, 0),
    ],
)
def test_matches(said: str, right: list[str], exact: float, strict: float) -> None:
    assert exact_match(said, right, "") == exact
    assert strict_match(said, right, "") == strict


def test_the_first_character_decides() -> None:
    assert first_character(" A. because", ["A"], "") == 1
    assert first_character("B", ["A"], "") == 0
    assert first_character("", ["A"], "") == 0


def test_rouge_l_stems_and_takes_the_best_reference() -> None:
    pytest.importorskip("rouge_score", reason="the extra `text` is not installed")
    assert rouge_l("the cats sat", ["the cat sat"], "") == 1
    # Longest common subsequence "the cat" of 2 and 4 words: P = 1, R = 1/2, F = 2/3.
    assert rouge_l("the cat", ["the black cat sat"], "") == pytest.approx(2 / 3)
    assert rouge_l("the cat", ["dogs", "the cat"], "") == 1
    assert rouge_l("", ["the cat"], "") == 0


def test_edit_similarity_is_of_code_with_its_literals() -> None:
    assert edit_similarity("x = <NUM_LIT:12>", ["x = 12"], "") == 1
    assert edit_similarity("f(<STR_LIT>, <NUM_LIT>)", ["f(, 0)"], "") == 1
    # difflib: one block of 3 of 4 + 4 characters, 6/8.
    assert edit_similarity("abcd", ["abce"], "") == 0.75
    assert edit_similarity("", ["abce"], "") == 0


def test_sari_of_the_published_example() -> None:
    """The documentation of Hugging Face's `evaluate` and of the authors' code."""
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    source = "About 95 species are currently accepted ."
    assert sari("About 95 you now get in .", references, source) == pytest.approx(
        0.26953601953601954
    )


def test_sari_is_one_where_everything_is_right() -> None:
    assert sari("a b c d e", ["a b c d e"], "a b x d e") == 1
    assert sari("A, b-c 1.5", ["a , b-c 1.5"], "a") == 1


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_a_fraction(name: str) -> None:
    pytest.importorskip("rouge_score", reason="the extra `text` is not installed")
    for said in ("", "x", "a b c d e f", "?!"):
        for right in ([""], ["a b", "x"]):
            assert 0 <= SCORES[name](said, right, "a b c") <= 1


LABELS = Task("sentiment", labels=("good", "bad", "very bad"))


@pytest.mark.parametrize(
    ("said", "score", "answer", "form"),
    [
        ("Good.", 1, 1, 1),
        ("it is good", 0, 1, 0),
        ("bad, not good", 0, 0, 0),
        ("very bad", 0, 0, 1),
        ("goodness", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_content_and_form_of_a_label(said: str, score: float, answer: float, form: float) -> None:
    found = judge(said, True, ["good"], "", LABELS)
    assert (found.score, found.answer, found.format) == (score, answer, form)


def test_of_labels_at_one_place_the_longest_is_meant() -> None:
    assert judge("very bad film", True, ["very bad"], "", LABELS).answer == 1
    assert judge("very bad film", True, ["bad"], "", LABELS).answer == 0


def test_content_and_form_of_free_text() -> None:
    number = Task("count", "strict_match", pattern=r"\d+")
    assert judge("3", True, ["3"], "", number).format == 1
    told = judge("there are 3", True, ["3"], "", number)
    assert (told.score, told.answer, told.format) == (0, 1, 0)
    assert judge("13", True, ["3"], "", number).answer == 0
    upper = Task("upper", "strict_match")
    assert judge("cat", True, ["CAT"], "", upper).answer == 0
    assert judge("Say CAT", False, ["CAT"], "", upper).answer == 1
    assert judge("CAT", False, ["CAT"], "", upper).format == 0


def test_an_empty_answer_can_be_right() -> None:
    free = Task("rest")
    assert judge("", True, [""], "", free).answer == 1
    assert judge("x", True, [""], "", free).answer == 0
