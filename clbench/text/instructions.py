"""Streams of instruction tasks: how examples become experiences, and what learns them."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from clbench import source_model
from clbench.errors import UserError, did_you_mean
from clbench.nn.transforms import Identity, Transform
from clbench.samples import Samples
from clbench.text import decoders
from clbench.text.answering import Answering, Method, decoding, padding_share
from clbench.text.decoders import Decoder
from clbench.text.encoding import (
    PADDING,
    Example,
    Task,
    Template,
    TextSource,
    encode,
    longest_answer,
)
from clbench.text.language_model import LanguageModel
from clbench.text.tokenizers import Bytes, Published, Tokenizer, Trained
from clbench.types import (
    LOCATION,
    Experience,
    Objective,
    Scenario,
    Setting,
    Split,
    Stream,
    derive_seed,
    require,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One instruction task with its examples.

    Attributes:
        task: Its name, and what it is scored by.
        train: To learn from.
        test: To be scored on.
        passes: How often each of `train` comes in one epoch of the scenario.
    """

    task: Task
    train: Sequence[Example]
    test: Sequence[Example]
    passes: int = 1


@dataclass(frozen=True)
class Instructions:
    """What one split of a scenario consists of.

    Attributes:
        parts: One for each experience, in the order of the data.
        base: What a model was taught before the stream, as far as it is known.
        ordered: Whether the parts come in this order, whatever the seed.
        facts: Plain data for the result file.
    """

    parts: Sequence[Part]
    base: Sequence[Part] = ()
    ordered: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class InstructionScenario(Scenario):
    """Base of the scenarios whose experiences are instruction tasks.

    Attributes:
        language_model: What learns.
        tokenizer: "bytes"; "trained", by byte-pair encoding on the training text of the whole
            split; or a folder or a name on the Hugging Face hub.
        vocabulary_size: Ids of a "trained" tokenizer.
        template: Text that a model reads: {instruction}, {input}.
        separator: What joins an answer to it.
        answer_length: Tokens of an answer at most, its end token included; 0: as many as the
            longest answer to learn has.
        scoring: "generate" answers, or "rank" the labels of tasks that have some.
        order: Names of the experiences in their order, all or some; empty: drawn from the seed,
            or as it was published.
        train_samples: Examples of each experience to learn from, at most; 0: all.
        test_samples: Examples of each experience to be scored on, at most; 0: all.
        evaluation_share: Questions of all evaluations together, as a part of the examples that are
            gone through in learning, at most; 0: as many as there are. What is left out is drawn
            once for all seeds, alike from each task; `scenario_facts` says how much.
        cache_dir: Where trained tokenizers and taught models are kept; None: the user's.
    """

    setting: ClassVar[Setting] = Setting.INSTRUCTION_TUNING

    language_model: Decoder
    tokenizer: str = "bytes"
    vocabulary_size: int = 4096
    template: str = Template.prompt
    separator: str = Template.separator
    answer_length: int = 0
    scoring: Method = "generate"
    order: tuple[str, ...] = ()
    train_samples: int = 0
    test_samples: int = 0
    evaluation_share: float = 1.0
    cache_dir: Path | None = field(default=None, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "answer_length", "train_samples", "test_samples", at_least=0)
        require(self, "evaluation_share", at_least=0)
        require(self, "vocabulary_size", at_least=300)
        Template(self.template, self.separator)

    @abstractmethod
    def instructions(self, split: Split) -> Instructions:
        """The data of one split."""

    def objective(self) -> Objective:
        return Answering(self.scoring)

    def stream(self, split: Split, seed: int) -> Stream:
        found = self.instructions(split)
        parts = [self._limited(part) for part in self._ordered(found, seed)]
        parts, base, evaluation = self._affordable(parts, found.base)
        tokenizer = self._tokenizer([*base, *parts])
        taught = [*parts, *base]
        length = self._answer_length(taught, tokenizer)
        encoding = _Encoding(
            Template(self.template, self.separator),
            tokenizer,
            self.language_model.context,
            length,
        )
        # One row width for all that is learned, so that a memory can hold any of it.
        train, learned = encoding.of(taught, "train")
        test, asked = encoding.of(taught, "test")
        transform = Identity()
        everything = tuple(range(tokenizer.size))
        facts = {
            **found.facts,
            "tokenizer": dict(tokenizer.facts()),
            "decoding": dict(decoding(self.scoring, length)),
            "train": learned,
            "test": asked,
            "evaluation": evaluation,
            "padding_share": self._padding(train, parts, transform),
        }
        return Stream(
            [
                Experience(
                    i,
                    part.task.name,
                    Samples(train, _rows(taught, i, "train").repeat(part.passes), transform),
                    everything,
                )
                for i, part in enumerate(parts)
            ],
            [Samples(test, _rows(taught, i, "test"), transform) for i in range(len(parts))],
            transform,
            tokenizer.size,
            facts,
            source=_base(train, taught, len(parts), "train", transform),
            source_test=_base(test, taught, len(parts), "test", transform),
        )

    def model(self, seed: int, stream: Stream) -> nn.Module:  # noqa: ARG002
        model = self.fresh(stream)
        self.language_model.adapt(model)
        return model

    def fresh(self, stream: Stream) -> LanguageModel:
        """The model as it is before the stream, all of it to be trained."""
        source = text_source(stream.experiences[0].train)
        return self.language_model.assemble(source.tokenizer, source.targets.shape[1])

    def model_facts(self, model: nn.Module) -> Mapping[str, Any]:
        assert isinstance(model, LanguageModel)
        return {"backbone": dict(decoders.facts(model))}

    def _ordered(self, found: Instructions, seed: int) -> list[Part]:
        parts = found.parts
        if not self.order:
            if found.ordered:
                return list(parts)
            generator = torch.Generator().manual_seed(derive_seed(seed, "order of tasks"))
            return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
        named = {part.task.name: part for part in parts}
        for name in self.order:
            if name not in named:
                raise UserError(f"scenario.order: no task {name!r}. {did_you_mean(name, named)}")
        if len(set(self.order)) < len(self.order):
            raise UserError("scenario.order names a task twice. Name each once.")
        return [named[name] for name in self.order]

    def _limited(self, part: Part) -> Part:
        """As many examples as the options allow."""
        return replace(
            part,
            train=some(part.train, self.train_samples, f"train {part.task.name}"),
            test=some(part.test, self.test_samples, f"test {part.task.name}"),
        )

    def _affordable(
        self, parts: Sequence[Part], base: Sequence[Part]
    ) -> tuple[list[Part], list[Part], Mapping[str, int]]:
        """Tests that are worth their time: of each task no more than `evaluation_share` allows.

        Returns:
            Both kinds of parts, and facts: questions of one evaluation, and how many there are.
        """
        learned = self.epochs * sum(part.passes * len(part.train) for part in parts)
        every = [*parts, *base]
        there = sum(len(part.test) for part in every)
        room = int(self.evaluation_share * learned / len(parts))
        if self.evaluation_share and there > room:
            at_most = max(1, room // len(every))
            every = [
                replace(p, test=some(p.test, at_most, f"evaluation {p.task.name}")) for p in every
            ]
        asked = sum(len(part.test) for part in every)
        if asked < there:
            _log.warning(
                "each evaluation asks %d of %d test examples, so that evaluations take less time "
                "than learning; scenario.evaluation_share=0 asks all",
                asked,
                there,
            )
        facts = {"questions": asked, "there_are": there}
        return every[: len(parts)], every[len(parts) :], facts

    def _tokenizer(self, parts: Sequence[Part]) -> Tokenizer:
        if self.tokenizer == "bytes":
            return Bytes()
        if self.tokenizer != "trained":
            return Published(self.tokenizer)
        template = Template(self.template, self.separator)
        texts = [
            template.of(example) + template.answer(example.outputs[0])
            for part in parts
            for example in part.train
        ]
        return Trained(texts, self.vocabulary_size, self.cache_dir)

    def _answer_length(self, parts: Sequence[Part], tokenizer: Tokenizer) -> int:
        if self.answer_length:
            return self.answer_length
        told = [example.outputs[0] for part in parts for example in part.train]
        labels = [label for part in parts for label in part.task.labels]
        template = Template(self.template, self.separator)
        return longest_answer([*told, *labels], template, tokenizer)

    def _padding(self, train: TextSource, parts: Sequence[Part], transform: Transform) -> float:
        """The part of the tokens of a pass over the stream that is padding."""
        padded = computed = 0.0
        for i in range(len(parts)):
            samples = Samples(train, _rows(parts, i, "train"), transform)
            order = samples.shuffled(self.batch_size, torch.Generator().manual_seed(0))
            lengths = train.lengths[samples.index]
            share = padding_share(lengths, order, self.batch_size)
            whole = int(lengths.sum()) / (1 - share)
            padded, computed = padded + share * whole, computed + whole
        return padded / computed


@dataclass(frozen=True)
class _Encoding:
    """How examples become rows."""

    template: Template
    tokenizer: Tokenizer
    context: int
    answer_length: int

    def of(
        self, parts: Sequence[Part], kind: Literal["train", "test"]
    ) -> tuple[TextSource, Mapping[str, int]]:
        """All training or all test examples as one source, and facts about them."""
        lists = [part.train if kind == "train" else part.test for part in parts]
        examples = [example for some in lists for example in some]
        task_of = [i for i, some in enumerate(lists) for _ in some]
        encoded = encode(examples, self.template, self.tokenizer, self.context, self.answer_length)
        source = TextSource(
            encoded,
            encoded.width,
            self.answer_length,
            examples,
            [part.task for part in parts],
            task_of,
            self.tokenizer,
            self.template,
        )
        return source, encoded.facts()


def some(examples: Sequence[Example], at_most: int, purpose: str) -> Sequence[Example]:
    """So many examples, drawn once and for all, in their order; all if 0 or fewer are there."""
    if not at_most or len(examples) <= at_most:
        return examples
    generator = torch.Generator().manual_seed(derive_seed(0, f"instructions {purpose}"))
    chosen = torch.randperm(len(examples), generator=generator)[:at_most].sort().values
    return [examples[i] for i in chosen.tolist()]


def _rows(parts: Sequence[Part], index: int, kind: Literal["train", "test"]) -> torch.Tensor:
    """Positions of a part's examples in the source of all."""
    sizes = [len(part.train if kind == "train" else part.test) for part in parts]
    start = sum(sizes[:index])
    return torch.arange(start, start + sizes[index])


def _base(
    source: TextSource,
    parts: Sequence[Part],
    first: int,
    kind: Literal["train", "test"],
    transform: Transform,
) -> Samples | None:
    """The examples of all parts from `first` on, if there are any."""
    rows = [_rows(parts, i, kind) for i in range(first, len(parts))]
    index = torch.cat(rows) if rows else torch.empty(0)
    return Samples(source, index, transform) if len(index) else None


def text_source(samples: Samples | None) -> TextSource:
    """Where the samples of a stream of text lie."""
    assert samples is not None
    assert isinstance(samples.source, TextSource)
    return samples.source


def rows_sha256(samples: Samples) -> str:
    """Of the codes of some samples, however wide the tensor is that holds them."""
    rows = text_source(samples).inputs[samples.index]
    used = int((rows != PADDING).any(0).nonzero().amax()) + 1
    return source_model.sha256(rows[:, :used])
