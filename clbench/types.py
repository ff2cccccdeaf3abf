"""The words of the suite: what a scenario offers, what a strategy may see, what a run leaves."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.transforms import Transform
from clbench.samples import Batch, Samples


class Setting(Enum):
    """What arrives and what is scored."""

    CLASS_INCREMENTAL = "class_incremental"
    DOMAIN_INCREMENTAL = "domain_incremental"
    INSTRUCTION_TUNING = "instruction_tuning"
    TEST_TIME_ADAPTATION = "test_time_adaptation"


class Split(Enum):
    """Two parts of the data that share no sample, and no class where the data allow."""

    TUNE = "tune"
    EVALUATE = "evaluate"


@dataclass(frozen=True)
class Experience:
    """All that a strategy may see of one step of the stream.

    Attributes:
        index: Position in the stream, from 0.
        name: For people.
        train: Labelled samples; None where nothing labelled arrives.
        classes: Classes that occur in it. Classes are numbered in the order of their arrival.
    """

    index: int
    name: str
    train: Samples | None
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Arrivals:
    """What arrives without labels in one experience (test-time adaptation).

    Attributes:
        samples: In the order of their arrival; the labels stay with the engine.
        domains: Position in `Stream.domains` of the domain of each, [N] int64 on the CPU.
    """

    samples: Samples
    domains: Tensor


@dataclass(frozen=True)
class Stream:
    """A sequence of experiences and the test samples of each.

    Attributes:
        experiences: What the strategy gets, one after another.
        tests: Test samples of each experience; these stay with the engine.
        transform: Augmentation and normalisation shared by the whole stream.
        n_outputs: Classes over the whole stream.
        facts: Plain data for the result file: class names, sizes, skipped files.
        arrivals: What arrives without labels in each experience; empty: labelled samples do.
        domains: Names of the domains of the arrivals.
        source: Labelled samples that the model was trained on before the stream.
        source_test: Test samples like those; these stay with the engine.
        reset: When the engine puts a strategy back to where it was before the stream.
    """

    experiences: Sequence[Experience]
    tests: Sequence[Samples]
    transform: Transform
    n_outputs: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    arrivals: Sequence[Arrivals] = ()
    domains: Sequence[str] = ()
    source: Samples | None = None
    source_test: Samples | None = None
    reset: Literal["never", "experience", "batch"] = "never"

    def to(self, device: torch.device) -> Stream:
        """The same stream with every sample served on `device`."""
        sources = {id(s.source): s.source for s in self._samples()}
        moved = {key: source.to(device) for key, source in sources.items()}
        return self.mapped(lambda s: Samples(moved[id(s.source)], s.index.to(device), s.transform))

    def mapped(self, change: Callable[[Samples], Samples]) -> Stream:
        """The same stream with another selection in place of each."""
        experiences = [
            replace(e, train=None if e.train is None else change(e.train)) for e in self.experiences
        ]
        # One test may serve many experiences: it stays one, so that it is predicted once.
        tests = {id(test): change(test) for test in self.tests}
        return replace(
            self,
            experiences=experiences,
            tests=[tests[id(test)] for test in self.tests],
            arrivals=[replace(a, samples=change(a.samples)) for a in self.arrivals],
            source=None if self.source is None else change(self.source),
            source_test=None if self.source_test is None else change(self.source_test),
        )

    def batches(self, scenario: Scenario) -> int:
        """Mini-batches that arrive over the whole stream, those of every epoch counted."""
        sizes = (len(e.train) for e in self.experiences if e.train is not None)
        return scenario.epochs * sum(-(-size // scenario.batch_size) for size in sizes)

    def _samples(self) -> Iterator[Samples]:
        yield from (e.train for e in self.experiences if e.train is not None)
        yield from self.tests
        yield from (arrivals.samples for arrivals in self.arrivals)
        yield from (part for part in (self.source, self.source_test) if part is not None)


class Objective(ABC):
    """What is minimised and what is scored; hides the modality from strategies."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def predictions(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted, a row for each label: for methods that compare outputs.

        A classifier predicts one label for a sample, a language model as many as an answer has
        tokens.

        Args:
            outputs: Of the model for a batch, [B, ..., C].
            targets: Labels of the batch, as `Batch.targets`.

        Returns:
            [M, C] and [M]; `loss` of them is the loss of the batch.
        """
        return outputs, targets

    @abstractmethod
    def score(
        self,
        predict: Callable[[Batch], Tensor],
        tests: Sequence[Samples],
        experiences: Sequence[Experience],
        batch_size: int,
    ) -> dict[str, list[float]]:
        """Every score of every given experience.

        Args:
            predict: Outputs of the strategy for an unlabelled batch.
            tests: Test samples, one entry per experience.
            experiences: The experiences met so far, as many as `tests`.
            batch_size: Samples to predict at once.

        Returns:
            One list per score, its first key the headline ("accuracy"). "task_aware_accuracy"
            has a matrix of its own in the result; what else there is goes to `Result.scores`.
        """


@dataclass(kw_only=True)
class Scenario(ABC):
    """A family of streams; its fields are its options, the budget among them.

    Every strategy gets the same budget. Attributes:
        epochs: Passes over each experience.
        batch_size: Samples of the stream in a step.
        memory_size: Samples that a strategy may keep, over the whole stream.
        memory_batch_size: Samples replayed in a step; 0: as many as `batch_size`.
        online: Single pass: each mini-batch arrives once and is gone.
        passes: Steps taken on each mini-batch of an online stream.
    """

    setting: ClassVar[Setting]

    epochs: int = 1
    batch_size: int = 32
    memory_size: int = 500
    memory_batch_size: int = 0
    online: bool = False
    passes: int = 1

    def __post_init__(self) -> None:
        require(self, "epochs", "batch_size", "passes", at_least=1)
        require(self, "memory_size", "memory_batch_size", at_least=0)
        if self.online and self.epochs != 1:
            raise UserError(
                f"scenario.online=true means one pass, but scenario.epochs={self.epochs}. "
                "Set scenario.epochs=1; scenario.passes=N takes N steps on each mini-batch."
            )
        if self.passes != 1 and not self.online:
            raise UserError("scenario.passes needs scenario.online=true; else use scenario.epochs")

    @abstractmethod
    def stream(self, split: Split, seed: int) -> Stream:
        """The stream of one split. The seed decides the class order, never which samples."""

    @abstractmethod
    def model(self, seed: int, stream: Stream) -> nn.Module:
        """A fresh model for the stream: the same start for every strategy."""

    @abstractmethod
    def objective(self) -> Objective:
        """What is minimised and scored."""

    def model_facts(self, model: nn.Module) -> Mapping[str, Any]:  # noqa: ARG002
        """Plain data for the result file about the model that `model` returned."""
        return {}

    def fingerprint(self) -> Mapping[str, Any]:
        """What decides the numbers besides the options: the content of the user's own files."""
        return {}

    def check(self, split: Split) -> None:  # noqa: B027
        """Refuses what cannot work before anything is loaded or written.

        Raises:
            UserError: If data are missing or the options contradict each other.
        """


class Differentiation:
    """How losses become gradients: those of one run, at once."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss to the `grad` of what it depends on."""
        loss.backward()

    def gradients(self, loss: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of a loss; zeros for weights that it does not depend on."""
        return torch.autograd.grad(loss, weights, materialize_grads=True)


class Context:
    """What the engine lends a strategy for one run.

    Attributes:
        device: Where model and samples are.
        precision: "fp32" or "bf16" (automatic mixed precision).
        seed: The run's seed.
        scenario: The budget (`epochs`, `batch_size`, `memory_size`, ...).
        objective: Loss and scores.
        transform: Turns stored samples into model inputs.
        n_outputs: Classes over the whole stream.
        stream_batches: Mini-batches that will arrive over the whole stream, every epoch counted;
            0: not known. The horizon of a budget: into how many experiences it divides, and
            where, is not told.
        seen: The experiences met so far, for strategies that declare `revisits`; else empty.
        source: Labelled samples that the model was trained on before the stream, if any.
        on_step: Called after every training step with the number of stream samples used.
        differentiation: Makes gradients, those of other runs at the same time perhaps.
        proceed: What `resumable` hands to the first loop of an experience that asks for it.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        seed: int,
        scenario: Scenario,
        objective: Objective,
        transform: Transform,
        n_outputs: int,
        stream_batches: int = 0,
        precision: str = "fp32",
        source: Samples | None = None,
        on_step: Callable[[int], None] = lambda _: None,
        differentiation: Differentiation | None = None,
    ) -> None:
        self.device, self.seed, self.scenario = device, seed, scenario
        self.objective, self.transform, self.n_outputs = objective, transform, n_outputs
        self.stream_batches = stream_batches
        self.precision, self.source, self.on_step = precision, source, on_step
        self.differentiation = differentiation or Differentiation()
        self.proceed: Callable[[], bool] = _always
        self.seen: list[Experience] = []
        self.generators: dict[str, torch.Generator] = {}

    @property
    def memory_batch_size(self) -> int:
        """Samples to replay in a step."""
        return self.scenario.memory_batch_size or self.scenario.batch_size

    def generator(self, purpose: str, device: torch.device | None = None) -> torch.Generator:
        """The random stream of one purpose, seeded by (seed, purpose).

        Args:
            purpose: Any name; the same name is the same generator.
            device: Where it draws; default: the run's device.
        """
        device = device or self.device
        key = f"{purpose}@{device.type}"
        if key not in self.generators:
            generator = torch.Generator(device)
            generator.manual_seed(derive_seed(self.seed, key))
            self.generators[key] = generator
        return self.generators[key]

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision where the run asks for it."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def resumable(self) -> Iterator[Callable[[], bool]]:
        """For a loop of steps between which all that changes is the strategy's attributes.

        A run can be saved in such a loop, and goes on in it. Only the first loop of an experience
        is one: what was done before it is done again from what the experience began with.

        Yields:
            What to ask at the top of the loop, once there is a batch; False: skip this step, it
            was taken before the run was interrupted.
        """
        proceed, self.proceed = self.proceed, _always
        yield proceed

    def batches(
        self, samples: Samples, epochs: int | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """The training batches of one experience: shuffled, augmented, counted.

        Args:
            samples: What to learn from.
            epochs: Passes; default: the scenario's budget.
            batch_size: Default: the scenario's budget.

        Yields:
            Each batch; when control comes back, the step is counted as done.
        """
        size = batch_size or self.scenario.batch_size
        shuffle, augment = self.generator("shuffle"), self.generator("augment")
        for _ in range(self.scenario.epochs if epochs is None else epochs):
            order = samples.shuffled(size, shuffle)
            for batch in samples.batches(order, size, augment):
                yield batch
                self.on_step(len(batch))


def _always() -> bool:
    return True


@dataclass(kw_only=True)
class Strategy(ABC):
    """A continual-learning method. Its fields are its hyper-parameters, nothing else.

    State lives in plain attributes that exist from `setup` on (tensors, numbers, text,
    lists and dicts of these, modules, generators, and objects with `state_dict` and
    `load_state_dict`). All of it is saved between experiences, except the context and names
    that begin with an underscore: those are scratch.
    """

    settings: ClassVar[frozenset[Setting]]
    #: May go back to the data of earlier experiences (a reference, not a continual learner).
    revisits: ClassVar[bool] = False
    #: All of its state can be saved; else an interrupted run begins anew.
    resumable: ClassVar[bool] = True
    #: Conformance checks that this method cannot pass, each with the reason.
    expected_failures: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def setup(self, model: nn.Module, context: Context) -> None:
        """Takes the model and makes all state, before the first experience."""

    @abstractmethod
    def learn(self, experience: Experience) -> None:
        """Learns one experience."""

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Outputs for an unlabelled batch: [B, n_outputs] logits for a classifier.

        Leaves no trace, whatever the method does in `adapt`.
        """

    def adapt(self, batch: Batch) -> Tensor:
        """Outputs that are scored for a batch as it arrives; may change the model.

        For test-time adaptation only.

        Args:
            batch: Without labels; one domain or several, as the stream has it.
        """
        return self.predict(batch)

    def reset(self) -> None:  # noqa: B027
        """Forgets everything since `setup`; for test-time adaptation only."""

    def check(self, scenario: Scenario) -> None:
        """Refuses a scenario that this method cannot work on, before anything is loaded.

        Raises:
            UserError: With the reason and what would work.
        """
        if scenario.setting not in self.settings:
            works = ", ".join(sorted(s.value for s in self.settings))
            raise UserError(
                f"{type(self).__name__} does not work in the {scenario.setting.value} setting of "
                f"this scenario. It works in: {works}."
            )

    @property
    def keeps_features(self) -> bool:
        """Whether images reach it as the model's `features` alone, which it never changes.

        Such a method gets the same features in place of the images where `cache_features=true`:
        `model.features` then hands on what it is given.
        """
        return False

    @property
    def memory_samples(self) -> int:
        """Stored samples of the stream, in its memories."""
        return 0

    def facts(self) -> Mapping[str, Any]:
        """What the method found out, for the result file: plain data, every number finite.

        Asked for once, when the whole stream has been learned.
        """
        return {}


#: Metadata of fields that say where files lie; they are no part of a run's identity.
LOCATION: Mapping[str, Any] = {"identity": False}
#: Metadata of fields that name a file whose content, not its place, is part of a run's identity.
CONTENT: Mapping[str, Any] = {"identity": "content"}

#: Settings in which labelled classes arrive and a classifier is scored.
CLASSIFICATION = frozenset({Setting.CLASS_INCREMENTAL, Setting.DOMAIN_INCREMENTAL})
#: Settings in which something to learn from arrives: for methods that ask no more than a loss.
LABELLED = CLASSIFICATION | {Setting.INSTRUCTION_TUNING}


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed that differs for every (seed, purpose)."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def require(
    options: Any,
    *names: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> None:
    """Checks the range of some fields of a dataclass, for `__post_init__`.

    Raises:
        UserError: Naming the field, its value and the allowed range.
    """
    known = {f.name for f in fields(options)}
    for name in names:
        assert name in known, f"{type(options).__name__} has no field {name}"
        value = getattr(options, name)
        low = (at_least is None or value >= at_least) and (above is None or value > above)
        if not (low and (at_most is None or value <= at_most)):  # also refuses NaN
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (("at least", at_least), ("above", above), ("at most", at_most))
                if bound is not None
            ]
            raise UserError(
                f"{type(options).__name__}: {name}={value} is out of range; "
                f"it must be {' and '.join(bounds)}."
            )
