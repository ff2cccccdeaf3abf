"""Instruction tasks on short strings, made from nothing: any number of examples of each."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Literal

from clbench.text.encoding import Example, Task
from clbench.types import Split, derive_seed

#: What the examples are for; an input of one purpose never occurs in another.
Purpose = Literal["train", "test"]

_VOWELS = "aeiou"


@dataclass(frozen=True)
class StringTask:
    """What to do with a string.

    Attributes:
        name: Of the task.
        wordings: Instructions that all mean it.
        make: Draws an input and says what the answer is.
        labels: The answers that there are, where there are few.
        pattern: Regular expression of an answer, where there are many.
    """

    name: str
    wordings: tuple[str, ...]
    make: Callable[[Random], tuple[str, str]]
    labels: tuple[str, ...] = ()
    pattern: str = ""

    @property
    def task(self) -> Task:
        """Name and scoring: letter for letter."""
        return Task(self.name, "strict_match", self.labels, self.pattern)


def examples(task: StringTask, split: Split, purpose: Purpose, count: int) -> list[Example]:
    """Different examples of a task, always the same ones.

    Which inputs belong to a split and a purpose is decided by their text alone, so the four sets
    have no input in common, whatever their sizes.

    Args:
        task: What to do.
        split: Of the data.
        purpose: To learn from or to be scored on.
        count: How many.

    Raises:
        ValueError: If the task has not so many inputs.
    """
    random = Random(derive_seed(0, f"string task {task.name} {split.value} {purpose}"))
    found: dict[str, str] = {}
    for _ in range(1000 * count + 10_000):
        if len(found) == count:
            break
        text, answer = task.make(random)
        if _owner(task.name, text) == (split, purpose):
            found[text] = answer
    else:
        raise ValueError(f"{task.name} has no {count} inputs for {purpose} of {split.value}")
    return [Example(random.choice(task.wordings), text, (a,)) for text, a in found.items()]


def _owner(name: str, text: str) -> tuple[Split, Purpose]:
    """To whom an input belongs: a fifth to tuning, and of each a quarter to test on."""
    digest = hashlib.sha256(f"{name}:{text}".encode()).digest()
    split = Split.TUNE if digest[0] % 5 == 0 else Split.EVALUATE
    return split, "test" if digest[1] % 4 == 0 else "train"


def _word(random: Random, shortest: int = 4, longest: int = 4) -> str:
    """Letters in which vowels are common enough to be looked for."""
    length = random.randint(shortest, longest)
    return "".join(
        random.choice(_VOWELS if random.random() < 0.35 else string.ascii_lowercase)
        for _ in range(length)
    )


def _of_word(change: Callable[[str], str]) -> Callable[[Random], tuple[str, str]]:
    def make(random: Random) -> tuple[str, str]:
        word = _word(random)
        return word, change(word)

    return make


def _of_words(change: Callable[[str, str], str]) -> Callable[[Random], tuple[str, str]]:
    def make(random: Random) -> tuple[str, str]:
        one, other = _word(random), _word(random)
        while other == one:
            other = _word(random)
        return f"{one} {other}", change(one, other)

    return make


def _of_numbers(
    sign: str, change: Callable[[int, int], int]
) -> Callable[[Random], tuple[str, str]]:
    def make(random: Random) -> tuple[str, str]:
        large, small = random.randint(10, 989), random.randint(1, 9)
        return f"{large}{sign}{small}", str(change(large, small))

    return make


def _count(random: Random) -> tuple[str, str]:
    letter = random.choice(_VOWELS)
    word = "".join(letter if random.random() < 0.4 else c for c in _word(random))
    return f"{letter} {word}", str(word.count(letter))


def _after(random: Random) -> tuple[str, str]:
    number = random.randint(10, 9998)
    return str(number), str(number + 1)


_LETTERS, _NUMBER = r"[a-z]+", r"\d+"


def _named(*tasks: StringTask) -> Mapping[str, StringTask]:
    return MappingProxyType({task.name: task for task in tasks})


#: What a model is taught before the stream.
BASE = _named(
    StringTask(
        "copy",
        ("repeat", "say it again", "copy the word", "echo"),
        _of_word(lambda word: word),
        pattern=_LETTERS,
    ),
    StringTask(
        "first",
        ("first letter", "which letter begins it", "how does it start"),
        _of_word(lambda word: word[0]),
        pattern="[a-z]",
    ),
    StringTask(
        "last",
        ("last letter", "which letter ends it", "how does it end"),
        _of_word(lambda word: word[-1]),
        pattern="[a-z]",
    ),
    StringTask(
        "tail",
        ("drop the first letter", "without its first letter", "behead"),
        _of_word(lambda word: word[1:]),
        pattern=_LETTERS,
    ),
    StringTask(
        "swap",
        ("swap the words", "exchange both words", "other word first"),
        _of_words(lambda one, other: f"{other} {one}"),
        pattern=r"[a-z]+ [a-z]+",
    ),
    StringTask(
        "after",
        ("next number", "which number follows", "one more"),
        _after,
        pattern=_NUMBER,
    ),
)

#: What a stream can bring afterwards.
NEW = _named(
    StringTask(
        "reverse",
        ("reverse", "write it backwards", "spell from the end", "mirror the word"),
        _of_word(lambda word: word[::-1]),
        pattern=_LETTERS,
    ),
    StringTask(
        "sort",
        ("sort the letters", "letters in order", "alphabetical order of letters"),
        _of_word(lambda word: "".join(sorted(word))),
        pattern=_LETTERS,
    ),
    StringTask(
        "count",
        ("how often is the letter in the word", "count the letter", "number of times"),
        _count,
        labels=tuple("012345"),
    ),
    StringTask(
        "upper",
        ("upper case", "in capitals", "shout", "capital letters"),
        _of_word(str.upper),
        pattern="[A-Z]+",
    ),
    StringTask(
        "add",
        ("add", "sum", "work out", "what is it in all"),
        _of_numbers("+", lambda a, b: a + b),
        pattern=_NUMBER,
    ),
    StringTask(
        "spell",
        ("spell it out", "letter by letter", "put dashes between the letters"),
        _of_word("-".join),
        pattern=r"[a-z](-[a-z])+",
    ),
    StringTask(
        "earlier",
        ("which comes first in the dictionary", "earlier word", "smaller by letters"),
        _of_words(min),
        pattern=_LETTERS,
    ),
    StringTask(
        "vowels",
        ("keep the vowels", "only vowels", "delete all consonants"),
        _of_word(lambda word: "".join(c for c in word if c in _VOWELS)),
        pattern=r"[aeiou]*",
    ),
)

#: The same for tuning: other tasks.
TUNING = _named(
    StringTask(
        "rotate",
        ("first letter to the end", "rotate", "move the front letter back"),
        _of_word(lambda word: word[1:] + word[0]),
        pattern=_LETTERS,
    ),
    StringTask(
        "double",
        ("double each letter", "every letter twice", "stutter"),
        _of_word(lambda word: "".join(2 * c for c in word)),
        pattern=_LETTERS,
    ),
    StringTask(
        "subtract",
        ("subtract", "take away", "what is left"),
        _of_numbers("-", lambda a, b: a - b),
        pattern=_NUMBER,
    ),
    StringTask(
        "join",
        ("write the words as one", "join the words", "without the space"),
        _of_words(lambda one, other: one + other),
        pattern=_LETTERS,
    ),
)
