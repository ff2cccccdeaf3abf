"""Instructions rewritten by rules, so that the same knowledge is asked for in other styles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType

import torch

from clbench.samples import Samples
from clbench.text.encoding import Example, TextSource, encode
from clbench.text.instructions import text_source

#: Rewrites an example, given other answers to choose from; None where it can't.
Rewrite = Callable[[Example, Sequence[str], Random], "Example | None"]

_LETTERS = "ABCD"


def yes_or_no(example: Example, answers: Sequence[str], random: Random) -> Example | None:
    """Whether an answer is right, which it is in half of the cases."""
    right, others = _told_apart(example, answers)
    if not others:
        return None
    asked, said = (right, "Yes") if random.random() < 0.5 else (random.choice(others), "No")
    return _asked(example, f"Is it {asked}? Answer Yes or No.", said)


def multiple_choice(example: Example, answers: Sequence[str], random: Random) -> Example | None:
    """Which letter stands before the right one of at most four answers."""
    right, others = _told_apart(example, answers)
    if not others:
        return None
    options = [right, *random.sample(others, min(len(others), len(_LETTERS) - 1))]
    random.shuffle(options)
    listed = " ".join(f"{x}) {text}" for x, text in zip(_LETTERS, options, strict=False))
    return _asked(example, f"{listed} Answer with the letter.", _LETTERS[options.index(right)])


def sentence(example: Example, answers: Sequence[str], random: Random) -> Example | None:  # noqa: ARG001
    """The answer as a sentence."""
    return _asked(example, "Answer in a sentence.", f"The answer is {example.outputs[0]}.")


STYLES: Mapping[str, Rewrite] = MappingProxyType(
    {"yes_no": yes_or_no, "multiple_choice": multiple_choice, "sentence": sentence}
)


def diversified(
    samples: Samples, share: float, context: int, generator: torch.Generator
) -> tuple[Samples, dict[str, int]]:
    """The same samples, some of them asked and answered in another style.

    The styles take turns; where one can't be had, because all answers are the same or because
    question or answer would not fit, the next one is taken, and where none can, the sample stays
    as it is.

    Args:
        samples: Of a `TextSource`.
        share: Part of them to rewrite, in [0, 1].
        context: Tokens that a model reads at most.
        generator: On the CPU.

    Returns:
        As many samples in the same order, of a source of their own; how many have each style.
    """
    source = text_source(samples)
    rows = samples.index.tolist()
    examples = [source.examples[row] for row in rows]
    random = Random(int(torch.randint(2**62, (), generator=generator)))
    chosen = torch.randperm(len(rows), generator=generator)[: round(share * len(rows))].tolist()
    told: dict[int, list[str]] = {}
    for row, example in zip(rows, examples, strict=True):
        told.setdefault(source.task_of[row], []).append(example.outputs[0])
    answers = {
        task: source.tasks[task].labels or tuple(dict.fromkeys(some)) for task, some in told.items()
    }
    count = dict.fromkeys(STYLES, 0)
    turns = list(STYLES)
    for position in chosen:
        others = answers[source.task_of[rows[position]]]
        for name in turns:
            made = STYLES[name](examples[position], others, random)
            if made is not None and _fits(made, source, context):
                examples[position] = made
                count[name] += 1
                turns.append(turns.pop(turns.index(name)))
                break
    return _encoded(examples, [source.task_of[row] for row in rows], samples, context), count


def _encoded(
    examples: Sequence[Example], task_of: Sequence[int], samples: Samples, context: int
) -> Samples:
    """Examples in the place of samples."""
    old = text_source(samples)
    length = old.targets.shape[1]
    encoded = encode(examples, old.template, old.tokenizer, context, length)
    width = max(encoded.width, old.inputs.shape[1])
    new = TextSource(
        encoded, width, length, examples, old.tasks, task_of, old.tokenizer, old.template
    ).to(old.device)
    return Samples(new, torch.arange(len(examples), device=old.device), samples.transform)


def _fits(example: Example, source: TextSource, context: int) -> bool:
    """Whether nothing of an example would be cut."""
    length = source.targets.shape[1]
    encoded = encode([example], source.template, source.tokenizer, context, length)
    return not (encoded.cut_prompts or encoded.cut_answers)


def _told_apart(example: Example, answers: Sequence[str]) -> tuple[str, list[str]]:
    """The right answer, and wrong ones."""
    return example.outputs[0], [a for a in answers if a not in example.outputs]


def _asked(example: Example, question: str, answer: str) -> Example:
    text = f"{example.input}\n{question}" if example.input else question
    return replace(example, input=text, outputs=(answer,))
