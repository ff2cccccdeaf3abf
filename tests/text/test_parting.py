"""Which tasks and examples are for tuning: no example is in two places."""

from __future__ import annotations

from collections import Counter

import pytest

from clbench.errors import UserError
from clbench.text.encoding import Example, Task
from clbench.text.instructions import Part
from clbench.text.parting import few_answers, part_examples, part_tasks, parted
from clbench.types import Split

COUNT = 100


def part(name: str, answers: int = 2, count: int = COUNT) -> Part:
    examples = [Example(name, str(i), (str(i % answers),)) for i in range(count)]
    return Part(Task(name), examples, examples[:0])


def inputs(examples: object) -> set[str]:
    return {e.input for e in examples}  # type: ignore[attr-defined]


@pytest.mark.parametrize("answers", [1, 2, COUNT])
def test_two_parts_are_disjoint_and_complete(answers: int) -> None:
    examples = part("a", answers).train
    first, second = parted(examples, 0.2, "x")
    assert (len(first), len(second)) == (80, 20)
    assert not inputs(first) & inputs(second)
    assert inputs(first) | inputs(second) == inputs(examples)
    assert parted(examples, 0.2, "x") == (first, second)
    assert parted(examples, 0.2, "y") != (first, second)
    if answers == 2:
        assert set(Counter(e.outputs for e in second).values()) == {10}


def test_equal_prompts_stay_together() -> None:
    examples = [Example("a", str(i // 2), (str(i % 2),)) for i in range(40)]
    first, second = parted(examples, 0.5, "x")
    assert not inputs(first) & inputs(second)
    assert len(first) + len(second) == 40


def test_nothing_is_taken_where_nothing_is_asked_for() -> None:
    examples = part("a").train
    assert parted(examples, 0, "x") == (list(examples), [])
    assert parted([], 0.5, "x") == ([], [])


def test_tasks_enough_for_two_splits_are_shared_out() -> None:
    parts = [part(name) for name in "abcdef"]
    mine, rule = part_tasks(parts, Split.EVALUATE, 3, 0.2)
    theirs, same = part_tasks(parts, Split.TUNE, 3, 0.2)
    assert rule == same == "disjoint tasks"
    names = [p.task.name for p in mine], [p.task.name for p in theirs]
    assert not set(names[0]) & set(names[1])
    assert [len(n) for n in names] == [3, 3]
    assert all(n == sorted(n) for n in names)
    assert all(len(p.train) == COUNT for p in mine)


def test_too_few_tasks_share_their_examples_out() -> None:
    parts = [part(name) for name in "abc"]
    mine, rule = part_tasks(parts, Split.EVALUATE, 0, 0.2)
    theirs, _ = part_tasks(parts, Split.TUNE, 0, 0.2)
    assert rule == "disjoint examples"
    for evaluated, tuned in zip(mine, theirs, strict=True):
        assert evaluated.task == tuned.task
        assert (len(evaluated.train), len(tuned.train), len(tuned.test)) == (80, 16, 4)
        sets = [inputs(x) for x in (evaluated.train, tuned.train, tuned.test)]
        assert len(set().union(*sets)) == COUNT


def test_impossible_divisions_are_refused() -> None:
    with pytest.raises(UserError, match=r"experiences=3, but there are 2 tasks"):
        part_tasks([part("a"), part("b")], Split.TUNE, 3, 0.2)
    with pytest.raises(UserError, match=r"task a has 1 examples .* too few to tune on"):
        part_examples(part("a", count=1), Split.TUNE, 0.2)


def test_answers_that_repeat_are_labels() -> None:
    assert few_answers(part("a", 2).train) == ("0", "1")
    assert few_answers(part("a", 20).train) == ()
    assert few_answers([]) == ()
