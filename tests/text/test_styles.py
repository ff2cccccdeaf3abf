"""Rewritten instructions: each style by hand, and what is left of the samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

import torch

from clbench.nn.transforms import Identity
from clbench.samples import Samples
from clbench.text.encoding import IGNORED, Example, Task, Template, TextSource, encode
from clbench.text.instructions import text_source
from clbench.text.styles import STYLES, diversified, multiple_choice, sentence, yes_or_no
from clbench.text.tokenizers import Bytes

LABELS = ("good", "bad", "fair")
EXAMPLE = Example("How is it", "the soup", ("bad",))
PLAIN = Template("{instruction} {input}=", separator="")


def samples(
    examples: Sequence[Example], labels: tuple[str, ...] = LABELS, answer_length: int = 24
) -> Samples:
    encoded = encode(examples, PLAIN, Bytes(), 120, answer_length)
    source = TextSource(
        encoded,
        encoded.width,
        answer_length,
        examples,
        [Task("t", labels=labels)],
        [0] * len(examples),
        Bytes(),
        PLAIN,
    )
    return Samples(source, torch.arange(len(examples)), Identity())


def rewritten(
    given: Samples, share: float = 1.0, context: int = 120, seed: int = 0
) -> tuple[list[Example], dict[str, int]]:
    found, count = diversified(given, share, context, torch.Generator().manual_seed(seed))
    source = text_source(found)
    return [source.examples[i] for i in found.index.tolist()], count


def test_yes_or_no() -> None:
    seen = set()
    for seed in range(50):
        made = yes_or_no(EXAMPLE, LABELS, Random(seed))
        assert made is not None
        asked = re.fullmatch(r"the soup\nIs it (\w+)\? Answer Yes or No\.", made.input)
        assert asked is not None
        assert made.instruction == "How is it"
        assert made.outputs == (("Yes",) if asked[1] == "bad" else ("No",))
        seen.add(asked[1])
    assert seen == set(LABELS)


def test_multiple_choice() -> None:
    letters = set()
    for seed in range(50):
        made = multiple_choice(EXAMPLE, [*LABELS, "poor", "odd"], Random(seed))
        assert made is not None
        options = dict(re.findall(r"([A-D])\) (\w+)", made.input))
        assert list(options) == list("ABCD")
        assert len(set(options.values())) == 4
        (letter,) = made.outputs
        assert options[letter] == "bad"
        assert made.input.endswith(" Answer with the letter.")
        letters.add(letter)
    assert letters == set("ABCD")


def test_two_labels_make_a_choice_of_two_and_one_makes_none() -> None:
    made = multiple_choice(EXAMPLE, ("bad", "good"), Random(0))
    assert made is not None
    assert re.findall(r"[A-D]\)", made.input) == ["A)", "B)"]
    assert multiple_choice(EXAMPLE, ("bad",), Random(0)) is None
    assert yes_or_no(EXAMPLE, ("bad",), Random(0)) is None


def test_another_right_answer_is_never_called_wrong() -> None:
    several = Example("x", "", ("bad", "poor"))
    for seed in range(30):
        made = yes_or_no(several, ("bad", "poor"), Random(seed))
        assert made is None


def test_a_sentence() -> None:
    assert sentence(EXAMPLE, (), Random(0)) == Example(
        "How is it", "the soup\nAnswer in a sentence.", ("The answer is bad.",)
    )
    assert sentence(Example("Say x", "", ("x",)), (), Random(0)) == Example(
        "Say x", "Answer in a sentence.", ("The answer is x.",)
    )


def test_styles_take_turns_over_a_share_of_the_samples() -> None:
    given = [Example("How is it", f"the {i}", (LABELS[i % 3],)) for i in range(50)]
    found, count = rewritten(samples(given), 0.6)
    assert count == dict.fromkeys(STYLES, 10)
    assert len(found) == 50
    assert sum(a == b for a, b in zip(found, given, strict=True)) == 20
    for made, old in zip(found, given, strict=True):
        assert made.input.split("\n")[0] == old.input
    assert rewritten(samples(given), 0.6) == (found, count)
    assert rewritten(samples(given), 0.6, seed=1)[0] != found
    assert rewritten(samples(given), 0.0) == (given, dict.fromkeys(STYLES, 0))


def test_free_answers_are_told_apart_from_those_of_other_samples() -> None:
    given = [Example("up", x, (x.upper(),)) for x in "abcdefgh"]
    found, count = rewritten(samples(given, labels=()))
    assert sum(count.values()) == 8
    chosen = [made for made in found if "letter" in made.input]
    assert all(set(re.findall(r"\) (\w)", made.input)) <= set("ABCDEFGH") for made in chosen)


def test_what_does_not_fit_is_asked_in_another_way_or_stays() -> None:
    given = [Example("How is it", "soup", (x,)) for x in LABELS * 4]
    _, count = rewritten(samples(given, answer_length=5))
    assert count == {"yes_no": 6, "multiple_choice": 6, "sentence": 0}
    found, count = rewritten(samples(given, answer_length=5), context=30)
    assert not any(count.values())
    assert found == given


def test_rows_and_targets_are_those_of_the_new_text() -> None:
    given = samples([EXAMPLE] * 6)
    found, _ = diversified(given, 1.0, 120, torch.Generator().manual_seed(0))
    source = text_source(found)
    batch = found.take(torch.arange(6))
    for row, target, example in zip(
        batch.inputs.tolist(), batch.targets.tolist(), source.examples, strict=True
    ):
        prompt = Bytes().decode([c for c in row[: row.index(-2)] if c >= 0])
        assert prompt == f"How is it {example.input}="
        answer = [c for c in target if c != IGNORED]
        assert answer == [*example.outputs[0].encode(), Bytes.end]
    assert source.targets.shape[1] == text_source(given).targets.shape[1]
