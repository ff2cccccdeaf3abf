"""Tasks on strings: right answers, several wordings, and no input in two places."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest

from clbench.text.scores import strict_match
from clbench.text.string_tasks import BASE, NEW, TUNING, StringTask, examples
from clbench.types import Split

EVERY = {**BASE, **NEW, **TUNING}
EVERY_TASK = pytest.mark.parametrize("task", EVERY.values(), ids=EVERY)

#: An input and its answer for each task, by a person.
BY_HAND = {
    "copy": ("abcd", "abcd"),
    "first": ("abcd", "a"),
    "last": ("abcd", "d"),
    "tail": ("abcd", "bcd"),
    "swap": ("abcd efgh", "efgh abcd"),
    "after": ("199", "200"),
    "reverse": ("abcd", "dcba"),
    "sort": ("dcab", "abcd"),
    "count": ("a abca", "2"),
    "upper": ("abcd", "ABCD"),
    "add": ("195+7", "202"),
    "spell": ("abcd", "a-b-c-d"),
    "earlier": ("bcda abcd", "abcd"),
    "vowels": ("abei", "aei"),
    "rotate": ("abcd", "bcda"),
    "double": ("abcd", "aabbccdd"),
    "subtract": ("202-7", "195"),
    "join": ("abcd efgh", "abcdefgh"),
}


class Fixed:
    """Draws what the test wants, in the place of random words and numbers."""

    def __init__(self, text: str) -> None:
        self.words = re.findall(r"[a-z]+", text)
        self.numbers = [int(n) for n in re.findall(r"\d+", text)]
        self.letters: list[str] = []

    def randint(self, low: int, high: int) -> int:
        return 4 if (low, high) == (4, 4) else self.numbers.pop(0)

    def random(self) -> float:
        return 1.0

    def choice(self, _: str) -> Any:
        if len(self.words) > 1 and len(self.words[0]) == 1:
            return self.words.pop(0)
        if not self.letters:
            self.letters = list(self.words.pop(0))
        return self.letters.pop(0)


@EVERY_TASK
def test_the_answer_is_what_a_person_would_say(task: StringTask) -> None:
    text, answer = BY_HAND[task.name]
    assert task.make(Fixed(text)) == (text, answer)  # type: ignore[arg-type]


@EVERY_TASK
def test_answers_have_the_form_that_the_task_asks_for(task: StringTask) -> None:
    found = examples(task, Split.EVALUATE, "test", 50)
    for example in found:
        (answer,) = example.outputs
        if task.labels:
            assert answer in task.labels
        else:
            assert re.fullmatch(task.pattern, answer), answer
        assert strict_match(answer, [answer], "") == 1
    assert {example.instruction for example in found} == set(task.wordings)
    assert len(task.wordings) >= 3


@EVERY_TASK
def test_no_input_is_in_two_places_and_all_are_reproducible(task: StringTask) -> None:
    sets = []
    for split, purpose in product(Split, ("train", "test")):
        found = examples(task, split, purpose, 60)  # type: ignore[arg-type]
        assert found == examples(task, split, purpose, 60)  # type: ignore[arg-type]
        inputs = {example.input for example in found}
        assert len(inputs) == 60
        sets.append(inputs)
    assert len(set().union(*sets)) == 240


def test_more_examples_begin_with_the_same_inputs() -> None:
    few = examples(NEW["reverse"], Split.EVALUATE, "train", 20)
    many = examples(NEW["reverse"], Split.EVALUATE, "train", 50)
    assert [e.input for e in few] == [e.input for e in many[:20]]


def test_a_task_with_too_few_inputs_says_so() -> None:
    two = StringTask("two", ("x",), lambda r: (r.choice("ab"), "y"))
    with pytest.raises(ValueError, match="two has no 3 inputs for train of evaluate"):
        examples(two, Split.EVALUATE, "train", 3)


def test_splits_have_no_task_in_common() -> None:
    assert not NEW.keys() & TUNING.keys()
    assert not BASE.keys() & (NEW.keys() | TUNING.keys())
    assert len(NEW) == 8
