"""Instructions with answers as rows of token ids.

A row is the ids of a prompt, the mark `ANSWER`, the ids of the answer and the end token. `PADDING`
may stand anywhere and means nothing. A row that stops at the mark is a question; one with several
marks, each before an answer of its own, is a choice (see `clbench.text.language_model`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.samples import TensorSource
from clbench.text.tokenizers import Tokenizer

#: Codes in a row that are no token.
PADDING, ANSWER = -1, -2
#: A target that no loss counts.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One instruction with what it is applied to and the answers that are right.

    Attributes:
        instruction: What to do.
        input: With what; may be empty.
        outputs: Right answers, at least one; the first is what training teaches. May be "".
    """

    instruction: str
    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """How an example becomes the text that a model reads.

    Attributes:
        prompt: With the fields {instruction} and {input}. A line that has fields, all of them
            empty, is left out.
        separator: Stands between prompt and answer and belongs to the answer, where tokenizers
            that join a space to the word behind it want it. An empty answer has none.
    """

    prompt: str = "{instruction}\n{input}\nAnswer:"
    separator: str = " "

    def __post_init__(self) -> None:
        try:
            self.prompt.format(instruction="", input="")
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"scenario.template={self.prompt!r} can't be filled in: {error}. "
                "Its fields are {instruction} and {input}."
            ) from error

    def of(self, example: Example) -> str:
        """The prompt of one example."""
        values = {"instruction": example.instruction, "input": example.input}
        empty = dict.fromkeys(values, "")
        kept = []
        for line in self.prompt.split("\n"):
            filled = line.format(**values)
            if filled != line.format(**empty) or "{" not in line:
                kept.append(filled)
        return "\n".join(kept)

    def answer(self, text: str) -> str:
        """An answer as it stands behind the prompt."""
        return self.separator + text if text else ""


@dataclass(frozen=True)
class Encoded:
    """Examples as ids, not yet side by side in a tensor.

    Attributes:
        prompts: Ids of each, the start token included.
        answers: Ids of each, the end token included unless the answer was cut.
        cut_prompts: How many prompts lost their beginning.
        cut_answers: How many answers lost their end.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    cut_prompts: int = 0
    cut_answers: int = 0

    @property
    def answer_length(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.answers), default=1)

    @property
    def width(self) -> int:
        """Codes in the longest row."""
        rows = zip(self.prompts, self.answers, strict=True)
        return max((len(prompt) + 1 + len(answer) for prompt, answer in rows), default=1)

    def lengths(self) -> Tensor:
        """Tokens of each example, [N] int64."""
        rows = zip(self.prompts, self.answers, strict=True)
        return torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])

    def facts(self) -> Mapping[str, int]:
        """Plain data for the result file."""
        return {
            "examples": len(self.prompts),
            "cut_prompts": self.cut_prompts,
            "cut_answers": self.cut_answers,
        }


def longest_answer(texts: Sequence[str], template: Template, tokenizer: Tokenizer) -> int:
    """Tokens of the longest of some answers, the end token included."""
    found = tokenizer.encode([template.answer(text) for text in sorted(set(texts))])
    return max(map(len, found), default=0) + 1


def encode(
    examples: Sequence[Example],
    template: Template,
    tokenizer: Tokenizer,
    context: int,
    answer_length: int,
) -> Encoded:
    """Examples as ids that fit into a model's context.

    An answer that is too long loses its end, and has no end token then: the model must not learn
    to stop there. A prompt that is too long loses its beginning, but not its start token. Every
    prompt leaves room for the longest answer, so that an unknown one can be generated.

    Args:
        examples: At least one output each.
        template: How they become text.
        tokenizer: Makes ids of the text.
        context: Tokens that a model reads at most.
        answer_length: Tokens of an answer at most, the end token included.

    Raises:
        UserError: If an answer of that length leaves no room for a prompt.
    """
    head = [] if tokenizer.start is None else [tokenizer.start]
    room = context - len(head) - answer_length
    if room < 1:
        raise UserError(
            f"Answers of {answer_length} tokens leave no room for a prompt in a context of "
            f"{context} tokens. Set scenario.answer_length to less, or take a model with a longer "
            "context."
        )
    texts = tokenizer.encode([template.of(example) for example in examples])
    told = tokenizer.encode([template.answer(example.outputs[0]) for example in examples])
    prompts, answers = [], []
    cut_prompts = cut_answers = 0
    for prompt, answer in zip(texts, told, strict=True):
        whole = [*answer, tokenizer.end]
        cut_prompts += len(prompt) > room
        cut_answers += len(whole) > answer_length
        # A model needs something to read: a lone end token says "nothing before this".
        body = prompt[-room:] if prompt or head else [tokenizer.end]
        prompts.append(head + body)
        answers.append(whole[:answer_length])
    return Encoded(prompts, answers, cut_prompts, cut_answers)


@dataclass(frozen=True)
class Task:
    """What the answers to some examples are scored by.

    Attributes:
        name: For people.
        score: Name in `clbench.text.scores.SCORES`.
        labels: The answers that there are, where there are few; empty: any text.
        pattern: Regular expression of an answer's form, if `labels` is empty; "": any that ends.
    """

    name: str
    score: str = "exact_match"
    labels: tuple[str, ...] = ()
    pattern: str = ""


class TextSource(TensorSource):
    """Rows of token ids with the targets of their answers.

    Args:
        encoded: The rows.
        width: Codes in a row of the tensor.
        answer_length: Targets of a row.
        examples: As they were before they were encoded.
        tasks: What scores them.
        task_of: Position in `tasks` of each example.
        tokenizer: What encoded them.
        template: What made text of them.

    Attributes:
        inputs: [N, width] int32.
        targets: [N, answer_length] int64: the ids of the answer and its end token, then IGNORED.
        prompt_lengths: Tokens of each prompt, [N] int64 on the CPU.
        lengths: Tokens of each row, [N] int64 on the device.
    """

    def __init__(
        self,
        encoded: Encoded,
        width: int,
        answer_length: int,
        examples: Sequence[Example],
        tasks: Sequence[Task],
        task_of: Sequence[int],
        tokenizer: Tokenizer,
        template: Template,
    ) -> None:
        rows = zip(encoded.prompts, encoded.answers, strict=True)
        inputs = padded([[*p, ANSWER, *a] for p, a in rows], width, PADDING)
        targets = padded(encoded.answers, answer_length, IGNORED)
        super().__init__(inputs.to(torch.int32), targets)
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in encoded.prompts])
        self.lengths: Tensor = encoded.lengths()
        self.examples, self.tasks, self.task_of = examples, tasks, tuple(task_of)
        self.tokenizer, self.template = tokenizer, template

    def to(self, device: torch.device) -> TextSource:
        if device == self.device:
            return self
        moved: Any = TextSource.__new__(TextSource)
        vars(moved).update(vars(self))
        for name in ("inputs", "targets", "lengths"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved  # type: ignore[no-any-return]


def padded(rows: Sequence[Sequence[int]], width: int, filler: int) -> Tensor:
    """Rows side by side, [N, width] int64, each followed by the filler.

    Raises:
        ValueError: If a row is longer than that.
    """
    longest = max(map(len, rows), default=0)
    if longest > width:
        raise ValueError(f"a row has {longest} codes, the tensor room for {width}")
    out = torch.full((len(rows), width), filler)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.int64)
    return out
