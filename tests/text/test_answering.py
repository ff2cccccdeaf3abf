"""The objective of answers: its loss, its questions and what it makes of what is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from clbench.errors import Diverged
from clbench.nn.transforms import Identity
from clbench.samples import Batch, Samples
from clbench.text.answering import Answering, padding_share
from clbench.text.encoding import (
    ANSWER,
    IGNORED,
    PADDING,
    Example,
    Task,
    Template,
    TextSource,
    encode,
    padded,
)
from clbench.text.tokenizers import Bytes

END, A = Bytes.end, 8
PLAIN = Template("{instruction} {input}=", separator="")
TASKS = (
    Task("upper", "strict_match"),
    Task("sentiment", labels=("good", "bad")),
)
EXAMPLES = (
    Example("up", "abc", ("ABC",)),
    Example("up", "a", ("A",)),
    Example("feel", "wonderful", ("good",)),
    Example("feel", "no", ("bad",)),
    Example("feel", "oh", ("bad",)),
)
TASK_OF = (0, 0, 1, 1, 1)


def source() -> TextSource:
    encoded = encode(EXAMPLES, PLAIN, Bytes(), 64, A)
    return TextSource(encoded, 40, A, EXAMPLES, TASKS, TASK_OF, Bytes(), PLAIN)


def parts_of(made: TextSource) -> list[Samples]:
    return [Samples(made, torch.tensor(i), Identity()) for i in ([0, 1], [2, 3, 4])]


class Mock:
    """A model that says what it is told to, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.asked: list[Tensor] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.asked.append(batch.inputs)
        assert not len(batch.targets)
        assert torch.equal(batch.raw, batch.inputs)
        said = []
        for row in batch.inputs.tolist():
            assert row[[i for i, c in enumerate(row) if c != PADDING][-1]] == ANSWER
            prompt = Bytes().decode([code for code in row if code >= 0])
            said.append([*Bytes().encode([self.answer(prompt)])[0], END][:A])
        return padded(said, A, PADDING).float()


def scores(answer: Callable[[str], str], batch_size: int = 2) -> dict[str, list[float]]:
    return Answering().score(Mock(answer), parts_of(source()), [], batch_size)


def right(prompt: str) -> str:
    instruction, _, rest = prompt.partition(" ")
    word = rest.removesuffix("=")
    if instruction == "up":
        return word.upper()
    return "good" if word == "wonderful" else "bad"


def test_right_answers_score_one_and_wrong_ones_nothing() -> None:
    assert scores(right) == {"accuracy": [1, 1], "answer": [1, 1], "format": [1, 1]}
    assert scores(lambda _: "good") == {
        "accuracy": [0, pytest.approx(1 / 3)],
        "answer": [0, pytest.approx(1 / 3)],
        "format": [1, 1],
    }


def test_content_is_told_from_form() -> None:
    found = scores(lambda prompt: "so " + right(prompt))
    assert found == {"accuracy": [0, 0], "answer": [1, 1], "format": [1, 0]}
    # Eight tokens are not enough for an end.
    found = scores(lambda prompt: right(prompt) + " as you see")
    assert found["format"] == [0, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_size_of_a_batch_changes_no_score(batch_size: int) -> None:
    assert scores(lambda p: right(p)[:2], batch_size) == scores(lambda p: right(p)[:2])


def test_no_answer_is_in_what_a_strategy_is_asked() -> None:
    mock = Mock(right)
    Answering().score(mock, parts_of(source()), [], 100)
    for rows in mock.asked:
        for row in rows.tolist():
            assert row.count(ANSWER) == 1
            assert not any(code >= 0 for code in row[row.index(ANSWER) :])
    shortest_first = [[sum(c >= 0 for c in row) for row in rows.tolist()] for rows in mock.asked]
    assert all(lengths == sorted(lengths) for lengths in shortest_first)


def test_a_test_of_several_experiences_is_answered_once() -> None:
    mock = Mock(right)
    one, other = parts_of(source())
    found = Answering().score(mock, [one, other, one], [], 100)
    assert found["accuracy"] == [1, 1, 1]
    assert sum(map(len, mock.asked)) == 5


def test_ranking_asks_for_the_likelihood_of_every_label_and_takes_the_best() -> None:
    asked: list[list[int]] = []

    def predict(batch: Batch) -> Tensor:
        rows = batch.inputs.tolist()
        if [c for c in rows[0] if c < 0].count(ANSWER) == 1:
            return Mock(right)(batch)
        asked.extend(rows)
        return torch.tensor([[-2.0, -1.0]]).expand(len(rows), -1)  # always "bad"

    found = Answering("rank").score(predict, parts_of(source()), [], 100)
    assert found["accuracy"] == [1, pytest.approx(2 / 3)]
    assert found["format"] == [1, 1]
    word = Bytes().encode(["feel no="])[0]
    good, bad = Bytes().encode(["good", "bad"])
    codes = [[c for c in row if c != PADDING] for row in asked]
    assert [256, *word, ANSWER, *good, END, ANSWER, *bad, END] in codes


def test_outputs_that_are_not_finite_are_no_score() -> None:
    def broken(batch: Batch) -> Tensor:
        return torch.full((len(batch), A), torch.nan)

    for method in ("generate", "rank"):
        with pytest.raises(Diverged):
            Answering(method).score(broken, parts_of(source()), [], 2)


def test_answers_come_in_the_order_of_the_samples() -> None:
    one = parts_of(source())[1]
    told = Answering().answers(Mock(right), one, 2)
    assert [said for said, _ in told] == ["good", "bad", "bad"]
    assert [judgement.score for _, judgement in told] == [1, 1, 1]


def test_loss_is_the_mean_over_the_tokens_of_all_answers() -> None:
    """Worked out by hand: three tokens of probability 1/2, 1/4 and 1/8; the rest counts nothing."""
    probabilities = torch.full((2, 3, 4), 0.25)
    probabilities[0, 0] = torch.tensor([0.5, 0.25, 0.125, 0.125])
    probabilities[0, 1] = torch.tensor([0.5, 0.25, 0.125, 0.125])
    probabilities[1, 0] = torch.tensor([0.5, 0.25, 0.125, 0.125])
    targets = torch.tensor([[0, 1, IGNORED], [2, IGNORED, IGNORED]])
    loss = Answering().loss(probabilities.log(), targets)
    assert loss == pytest.approx((1 + 2 + 3) * torch.tensor(2.0).log().item() / 3)
    rows = Answering().predictions(probabilities.log(), targets)
    assert rows[0].shape == (3, 4)
    assert rows[1].tolist() == [0, 1, 2]
    assert Answering().loss(*rows) == pytest.approx(loss.item())


def test_the_share_of_padding() -> None:
    lengths = torch.tensor([1, 4, 2, 4])
    assert padding_share(lengths, torch.tensor([0, 1, 2, 3]), 2) == pytest.approx(1 - 11 / 16)
    assert padding_share(lengths, torch.tensor([0, 2, 1, 3]), 2) == pytest.approx(1 - 11 / 12)


def shuffles(lengths: Sequence[int], batch_size: int) -> Tensor:
    made = source()
    many = Samples(made, torch.arange(len(EXAMPLES)).repeat(20), Identity())
    made.lengths = torch.tensor(lengths)
    return many.shuffled(batch_size, torch.Generator().manual_seed(0))


def test_neighbours_in_length_share_a_batch_and_nothing_is_lost() -> None:
    lengths = [10, 20, 30, 40, 50]
    order = shuffles(lengths, 10)
    assert sorted(order.tolist()) == list(range(100))
    assert padding_share(torch.tensor(lengths).repeat(20), order, 10) == 0
    widest = torch.tensor(lengths).repeat(20)[order].view(10, 10).amax(1).tolist()
    assert widest != sorted(widest), "batches come in a random order"
    order = shuffles(lengths, 32)
    assert sorted(order.tolist()) == list(range(100))
