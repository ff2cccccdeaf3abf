"""Language modelling of answers as an objective, and answers in words as scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import Diverged
from clbench.samples import Batch, Samples
from clbench.text.encoding import ANSWER, IGNORED, PADDING, TextSource
from clbench.text.scores import Judgement, judge
from clbench.types import Experience, Objective

Method = Literal["generate", "rank"]
Predict = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class _Question:
    """One test sample on its way to its answer.

    Attributes:
        test: Position of its test.
        source: Where it lies.
        position: Its place there.
        length: Tokens of its prompt.
        task: Position of its task.
    """

    test: int
    source: TextSource
    position: int
    length: int
    task: int


class Answering(Objective):
    """Cross-entropy of the tokens of the right answer; scores of what is answered.

    Outputs are those of `clbench.text.language_model.LanguageModel`. Scores, each a mean over a
    test: "accuracy" is what the sample's task is scored by, "answer" and "format" tell content
    from form (see `clbench.text.scores`).

    Args:
        method: How answers are found where a task has labels: "generate", greedily, or "rank",
            the label of the highest likelihood. Other tasks are always generated. What is ranked
            has the right form by construction.
    """

    def __init__(self, method: Method = "generate") -> None:
        self.method = method

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the tokens of all answers of the batch, end tokens included.

        Args:
            outputs: Logits [B, A, V], or [M, V] of chosen tokens.
            targets: Ids [B, A] or [M]; IGNORED where there is no token.
        """
        logits = outputs.flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)

    def predictions(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective.predictions`: one for each token of an answer."""
        asked = targets != IGNORED
        return outputs[asked], targets[asked]

    def score(
        self,
        predict: Predict,
        tests: Sequence[Samples],
        experiences: Sequence[Experience],  # noqa: ARG002
        batch_size: int,
    ) -> dict[str, list[float]]:
        """See `Objective.score`.

        Raises:
            Diverged: If an output is not finite.
        """
        # A test that serves several experiences is answered once.
        unique = list({id(test): test for test in tests}.values())
        place = {id(test): i for i, test in enumerate(unique)}
        questions = [q for i, test in enumerate(unique) for q in _questions(i, test)]
        judged: list[list[Judgement]] = [[] for _ in unique]
        for question, judgement in self._judged(predict, questions, batch_size):
            judged[question.test].append(judgement)
        means = [
            {
                "accuracy": _mean([j.score for j in found]),
                "answer": _mean([j.answer for j in found]),
                "format": _mean([j.format for j in found]),
            }
            for found in judged
        ]
        names = means[0].keys()
        return {name: [means[place[id(test)]][name] for test in tests] for name in names}

    def answers(
        self, predict: Predict, samples: Samples, batch_size: int
    ) -> list[tuple[str, Judgement]]:
        """What is said to each sample, in their order, and how right it is.

        Args:
            predict: Outputs for an unlabelled batch of questions.
            samples: Of a `TextSource`.
            batch_size: Questions at once.
        """
        questions = _questions(0, samples)
        said = dict(self._answered(predict, questions, batch_size))
        return [(said[q][0], _judge(q, *said[q])) for q in questions]

    def _judged(
        self, predict: Predict, questions: Sequence[_Question], batch_size: int
    ) -> Iterator[tuple[_Question, Judgement]]:
        # In the order of the questions, so that sums round alike whatever the batches.
        said = dict(self._answered(predict, questions, batch_size))
        for question in questions:
            yield question, _judge(question, *said[question])

    def _answered(
        self, predict: Predict, questions: Sequence[_Question], batch_size: int
    ) -> Iterator[tuple[_Question, tuple[str, bool]]]:
        """Text of each answer, and whether it came to an end."""
        for (source, labels), group in self._groups(questions).items():
            # Neighbours in length share a batch: little padding, and they end together.
            ordered = sorted(group, key=lambda q: q.length)
            for start in range(0, len(ordered), batch_size):
                some = ordered[start : start + batch_size]
                batch = _asked(source, some, labels)
                outputs = predict(batch)
                if labels:
                    yield from zip(some, _chosen(outputs, labels), strict=True)
                else:
                    yield from zip(some, _told(outputs, source), strict=True)

    def _groups(
        self, questions: Sequence[_Question]
    ) -> Mapping[tuple[TextSource, tuple[str, ...]], list[_Question]]:
        """Questions that can be asked together: of one source, with the same labels to rank."""
        groups: dict[tuple[TextSource, tuple[str, ...]], list[_Question]] = {}
        for question in questions:
            labels = question.source.tasks[question.task].labels if self.method == "rank" else ()
            groups.setdefault((question.source, labels), []).append(question)
        return groups


def _questions(test: int, samples: Samples) -> list[_Question]:
    source = samples.source
    assert isinstance(source, TextSource)
    positions = samples.index.cpu()
    lengths = source.prompt_lengths[positions].tolist()
    return [
        _Question(test, source, position, length, source.task_of[position])
        for position, length in zip(positions.tolist(), lengths, strict=True)
    ]


def _asked(source: TextSource, some: Sequence[_Question], labels: Sequence[str]) -> Batch:
    """A batch of prompts without their answers, followed by the labels to choose from."""
    index = torch.tensor([q.position for q in some], device=source.device)
    lengths = torch.tensor([q.length for q in some], device=source.device)
    longest = max(q.length for q in some)
    rows = source.gather(index)[:, : longest + 1]
    columns = torch.arange(longest + 1, device=source.device)
    inputs = rows.masked_fill(columns >= lengths[:, None], PADDING)
    inputs = inputs.masked_fill(columns == lengths[:, None], ANSWER)
    if labels:
        options = _options(source, labels).to(inputs)
        prompts = inputs.masked_fill(inputs == ANSWER, PADDING)
        inputs = torch.cat((prompts, options.expand(len(some), -1)), 1)
    return Batch(inputs, index.new_empty(0), inputs, index)


def _options(source: TextSource, labels: Sequence[str]) -> Tensor:
    """Codes of the answers to choose from, each behind a mark, [L]."""
    texts = [source.template.answer(label) for label in labels]
    end = source.tokenizer.end
    codes = [c for ids in source.tokenizer.encode(texts) for c in (ANSWER, *ids, end)]
    return torch.tensor(codes)


def _told(outputs: Tensor, source: TextSource) -> Iterator[tuple[str, bool]]:
    """The texts of generated ids [B, A]."""
    if not outputs.isfinite().all():
        raise Diverged("an output of the model is not finite")
    end = source.tokenizer.end
    for row in outputs.long().tolist():
        ids = [i for i in row if i != PADDING]
        yield source.tokenizer.decode([i for i in ids if i != end]), end in ids


def _chosen(outputs: Tensor, labels: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The likeliest labels by log-likelihoods [B, number of labels]."""
    if not outputs.isfinite().all():
        raise Diverged("an output of the model is not finite")
    for best in outputs.argmax(1).tolist():
        yield labels[best], True


def _judge(question: _Question, said: str, ended: bool) -> Judgement:
    source = question.source
    example = source.examples[question.position]
    task = source.tasks[question.task]
    return judge(said, ended, example.outputs, example.input, task)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def decoding(method: Method, answer_length: int) -> Mapping[str, Any]:
    """How answers are found, for the result file."""
    return {
        "method": method,
        "search": "greedy" if method == "generate" else "likelihood of each label, summed",
        "answer_length": answer_length,
    }


def padding_share(lengths: Tensor, order: Tensor, batch_size: int) -> float:
    """The part of what is computed that is padding, if every batch is as wide as its longest row.

    Args:
        lengths: Tokens of each sample, [N].
        order: Positions in the order of batches, [M].
        batch_size: B.
    """
    ordered = lengths[order].split(batch_size)
    computed = sum(int(some.max()) * len(some) for some in ordered)
    return 1 - int(lengths[order].sum()) / computed
