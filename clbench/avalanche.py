"""Avalanche both ways: its benchmarks as scenarios, its strategies as strategies, ours as its.

The only file that imports Avalanche (Lomonaco et al. 2021, arXiv 2104.00405; version 0.6), and
only when something of it is used: that takes several seconds.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench import checksums, foreign, machine
from clbench.archives import kept_inside
from clbench.classification import Classification, Images, ImageScenario, relabelled
from clbench.errors import UserError
from clbench.foreign import quietly
from clbench.nn.heads import Classifier
from clbench.nn.transforms import AsStored, ImageTransform, Transform
from clbench.one_by_one import Stored, Views
from clbench.samples import Batch, Samples, TensorSource
from clbench.types import (
    CLASSIFICATION,
    LOCATION,
    Context,
    Experience,
    Objective,
    Scenario,
    Setting,
    Split,
    Strategy,
    Stream,
    derive_seed,
    require,
)

#: Where the names of benchmarks, strategies and plug-ins may lie; nothing else is imported.
_BENCHMARKS, _TRAINING = "avalanche.benchmarks.classic", "avalanche.training"
#: Benchmarks that read pickles from the web, which can execute code.
_UNPICKLE = ("CLEAR", "CORe50", "ExMLCIFAR10", "ExMLCoRE50", "ExMLMNIST", "OpenLORIS")

_LABELS = "it needs task labels, which no stream offers here"
_WHOLE = "it needs the data of all experiences; strategy=joint is the reference for that"
_OWN_MODEL = "it needs a model of its own, and so would not start where other strategies start"
_NO_CLASSIFIER = "it trains no classifier"
#: Why some can't be strategies here, by class.
_REFUSED: Mapping[str, str] = {
    "AETraining": _NO_CLASSIFIER,
    "AR1": _OWN_MODEL,
    "Cumulative": _WHOLE,
    "EarlyStoppingPlugin": "it needs evaluations on a validation stream while it trains",
    "ExpertGateStrategy": _LABELS,
    "FeatureDistillationPlugin": _OWN_MODEL,
    "GenerativeReplay": _OWN_MODEL,
    "GenerativeReplayPlugin": _OWN_MODEL,
    "ICaRL": "it reads the class order of the whole stream, the classes to come included",
    "JointTraining": _WHOLE,
    "LearningToPrompt": _OWN_MODEL,
    "LFL": _OWN_MODEL,
    "LFLPlugin": _OWN_MODEL,
    "PackNet": _LABELS,
    "PackNetPlugin": _LABELS,
    "PNNStrategy": _LABELS,
    "SCR": _OWN_MODEL,
    "StreamingLDA": _OWN_MODEL,
    "TrainGeneratorAfterExpPlugin": _OWN_MODEL,
    "VAETraining": _NO_CLASSIFIER,
}


# Benchmarks as scenarios.


@dataclass(kw_only=True)
class AvalancheScenario(ImageScenario, ABC):
    """Base of the scenarios whose experiences are those of an Avalanche benchmark.

    They are the benchmark's train and test streams, each sample as its evaluation transform makes
    it, without task labels. Other transforms of the training samples are left out, and
    `scenario_facts` says so: `crop_padding` and `flip` augment whole batches instead. Where the
    benchmark makes its samples from 8-bit images by scaling and shifting the channels, they are
    stored as these; else as floats, which the model gets as they are.

    The benchmark gets the run's seed as `seed` and the data folder as `dataset_root`, unless
    `arguments` has them. Which samples are for tuning is decided by their content alone, so that
    no class order moves a sample from one split to the other.

    Attributes:
        benchmark: A class or function of `avalanche.benchmarks.classic`, or one of your own that
            returns a benchmark, `scenarios.<file>.<function>`.
        arguments: For the benchmark, by name; plain values.
        tuning_fraction: Part of each class's training samples that is for tuning; 0: none.
        data_dir: Folder of the datasets. What is missing Avalanche downloads; a file of that which
            has changed since is refused.
        unpickle: Allow benchmarks that read pickles from the web, which can execute code.
    """

    benchmark: str = "SplitMNIST"
    arguments: dict[str, Any] = field(default_factory=dict)
    tuning_fraction: float = 0.2
    data_dir: Path = field(default=Path("data"), metadata=LOCATION)
    unpickle: bool = field(default=False, metadata=LOCATION)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "tuning_fraction", at_least=0, at_most=0.9)

    def check(self, split: Split) -> None:
        self._made_with(0)
        if split is Split.TUNE and not self.tuning_fraction:
            raise UserError(
                "There is nothing to tune on: scenario.tuning_fraction=0 leaves all samples to "
                "split=evaluate. Set scenario.tuning_fraction=0.2."
            )

    def fingerprint(self) -> Mapping[str, Any]:
        """Avalanche's version, and the file of a benchmark of the user's; not the data."""
        factory, _ = self._made_with(0)
        known: dict[str, Any] = {"avalanche-lib": machine.version("avalanche-lib")}
        if not factory.__module__.startswith(_BENCHMARKS):
            code = Path(inspect.getfile(factory)).read_bytes()
            known["code"] = hashlib.sha256(code).hexdigest()[:16]
        return known

    def objective(self) -> Objective:
        return Classification(task_aware=self.setting is Setting.CLASS_INCREMENTAL)

    def images(self, split: Split) -> Images:
        """Not there: a benchmark comes as a stream, whose samples may differ by experience."""
        raise NotImplementedError

    def stream(self, split: Split, seed: int) -> Stream:
        with machine.isolated_rng(seed, "avalanche"), quietly():
            train, test = self._datasets(seed)
            stored = Stored([_views(dataset) for dataset in (*train, *test)], len(train))
        order = list(dict.fromkeys(c for part in stored.train for c in stored.classes(part)))
        if split is Split.EVALUATE and not set(stored.classes(*stored.test)) <= set(order):
            raise UserError(f"{self.benchmark} tests classes that it never teaches.")
        rank = torch.full((max(order) + 1,), -1)
        rank[torch.tensor(order)] = torch.arange(len(order))
        transform = self._transform(stored)
        learn, tests = stored.divided(split, self.tuning_fraction)
        source = relabelled(stored.source, rank)
        experiences, checks = [], []
        made: dict[int, Samples] = {}
        for index, part in enumerate(learn):
            classes = tuple(sorted(set(source.targets[part].tolist())))
            check = self._tested(tests, index, source.targets, classes)
            for what, positions in (("training", part), ("test", check)):
                if not len(positions):
                    raise UserError(
                        f"{self.benchmark}: experience {index} has no {what} samples in "
                        f"split={split.value}. Change scenario.tuning_fraction or the benchmark."
                    )
            name = self._named(index, [str(order[c]) for c in classes])
            experiences.append(Experience(index, name, Samples(source, part, transform), classes))
            checks.append(made.setdefault(id(check), Samples(source, check, transform)))
        self._check_order(experiences)
        facts = {
            "class_names": [str(c) for c in order],
            "image_shape": list(stored.shape),
            "avalanche": machine.version("avalanche-lib"),
            **stored.facts,
        }
        return Stream(experiences, checks, transform, len(order), facts)

    def _tested(
        self, tests: Sequence[Tensor], index: int, targets: Tensor, classes: Sequence[int]
    ) -> Tensor:
        """Positions of the test samples of one experience."""
        raise NotImplementedError

    def _named(self, index: int, classes: Sequence[str]) -> str:
        raise NotImplementedError

    def _check_order(self, experiences: Sequence[Experience]) -> None:
        """Refuses a benchmark of another setting."""

    def _made_with(self, seed: int) -> tuple[Callable[..., Any], dict[str, Any]]:
        """What makes the benchmark, and its arguments.

        Raises:
            UserError: If there is no such benchmark or argument.
        """
        where = "scenario.benchmark"
        factory = foreign.found(self.benchmark, _BENCHMARKS, "scenarios", where)
        if factory.__name__ in _UNPICKLE and not self.unpickle:
            raise UserError(
                f"{where}={self.benchmark}: Avalanche reads pickles from the web for it, and these "
                "can execute code. If you trust them, set scenario.unpickle=true."
            )
        offered = {"seed": seed, "dataset_root": str(self.data_dir)}
        known = foreign.parameters(factory)
        foreign.check_arguments(factory, self.arguments, offered, "scenario.arguments")
        return factory, {**{k: v for k, v in offered.items() if k in known}, **self.arguments}

    def _datasets(self, seed: int) -> tuple[list[Any], list[Any]]:
        """Avalanche's datasets of the train and of the test stream."""
        from avalanche.benchmarks import CLScenario

        factory, arguments = self._made_with(seed)
        root = arguments.get("dataset_root")
        try:
            with checksums.watched(Path(root)) if root else nullcontext(), kept_inside():
                made = factory(**arguments)
        except UserError:
            raise
        except Exception as error:  # Avalanche raises whatever its libraries do
            raise UserError(
                f"Avalanche could not make {self.benchmark}: {type(error).__name__}: {error}. It "
                f"looks for data in data_dir={self.data_dir} and downloads what is missing."
            ) from error
        if not isinstance(made, CLScenario) or not {"train", "test"} <= made.streams.keys():
            raise UserError(
                f"scenario.benchmark={self.benchmark} made a {type(made).__name__}. It must be an "
                "Avalanche benchmark with a train and a test stream."
            )
        streams = (made.streams["train"], made.streams["test"])
        train, test = ([e.dataset for e in stream] for stream in streams)
        if len(test) not in (1, len(train)):
            raise UserError(
                f"{self.benchmark} has {len(train)} experiences and {len(test)} tests. It needs as "
                "many, or one for all."
            )
        return train, test

    def _transform(self, stored: Stored) -> ImageTransform:
        if stored.scaling is None:
            return AsStored(self.crop_padding, self.flip)
        mean, std = stored.scaling
        mean, std = self.backbone.mean or mean, self.backbone.std or std
        return ImageTransform(mean, std, self.crop_padding, self.flip)


@dataclass(kw_only=True)
class AvalancheClasses(AvalancheScenario, ABC):
    """Base: a benchmark with new classes in every experience."""

    setting: ClassVar[Setting] = Setting.CLASS_INCREMENTAL

    def _tested(
        self,
        tests: Sequence[Tensor],
        index: int,  # noqa: ARG002
        targets: Tensor,
        classes: Sequence[int],
    ) -> Tensor:
        every = torch.cat([*tests])
        return every[torch.isin(targets[every], torch.tensor(classes))]

    def _named(self, index: int, classes: Sequence[str]) -> str:  # noqa: ARG002
        return ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")

    def _check_order(self, experiences: Sequence[Experience]) -> None:
        seen: set[int] = set()
        for experience in experiences:
            if seen & {*experience.classes}:
                raise UserError(
                    f"{self.benchmark}: experience {experience.index} has classes that came "
                    "before. If they return on purpose, use scenario=avalanche_domains; if each "
                    "experience numbers its classes from 0, set "
                    "scenario.arguments.class_ids_from_zero_in_each_exp=false."
                )
            seen |= {*experience.classes}


@dataclass(kw_only=True)
class AvalancheDomains(AvalancheScenario, ABC):
    """Base: a benchmark whose classes come again; all tests are scored from the beginning."""

    setting: ClassVar[Setting] = Setting.DOMAIN_INCREMENTAL

    def _tested(
        self,
        tests: Sequence[Tensor],
        index: int,
        targets: Tensor,  # noqa: ARG002
        classes: Sequence[int],  # noqa: ARG002
    ) -> Tensor:
        return tests[index if len(tests) > 1 else 0]

    def _named(self, index: int, classes: Sequence[str]) -> str:  # noqa: ARG002
        return f"domain {index + 1}"


def _views(dataset: Any) -> Views:
    return Views(_Leaves(dataset), dataset.eval(), dataset.train(), dataset.targets)


class _Leaves(Sequence[Any]):
    """An Avalanche dataset as it is below all its transforms, frozen ones included.

    Its own way to remove them reaches the training transforms only.

    Args:
        dataset: The dataset.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Any) -> Any:
        from avalanche.benchmarks.utils import FlatData

        below = self.dataset._flat_data
        while isinstance(below, FlatData):
            part, position = below._get_idx(position)
            below = below._datasets[part]
        return below[position]


# Our scenarios as benchmarks.


def to_avalanche(scenario: Scenario, split: Split = Split.EVALUATE, seed: int = 0) -> Any:
    """One of our class-incremental scenarios as an Avalanche benchmark.

    The same samples in the same experiences under the same numbers of classes, as the model gets
    them: augmented in Avalanche's group "train", not in "eval". Task label 0 everywhere, as
    Avalanche has it where there are none.

    Args:
        scenario: Which one.
        split: Which part of its data.
        seed: Decides the class order, and the augmentation.

    Returns:
        An `avalanche.benchmarks.CLScenario` with the streams `train_stream` and `test_stream`.

    Raises:
        UserError: If it is not class-incremental.
    """
    if scenario.setting is not Setting.CLASS_INCREMENTAL:
        raise UserError(
            f"{type(scenario).__name__} is {scenario.setting.value}; only class-incremental "
            "scenarios can be given to Avalanche."
        )
    scenario.check(split)
    with quietly():
        from avalanche.benchmarks import (
            benchmark_from_datasets,
            with_classes_timeline,
            with_task_labels,
        )

        with machine.isolated_rng(seed, "stream"):
            stream = scenario.stream(split, seed)
        augment = torch.Generator().manual_seed(derive_seed(seed, "augment"))
        learned = [e.train for e in stream.experiences if e.train is not None]
        train = [_dataset(_Served(s), s.transform, augment) for s in learned]
        test = [_dataset(_Served(s), s.transform, augment).eval() for s in stream.tests]
        made = benchmark_from_datasets(train=train, test=test)
        return with_task_labels(with_classes_timeline(made))


class _Served(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Samples one by one, as Avalanche reads them: stored, on the CPU; counts what it serves.

    Args:
        samples: Which.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples.to(torch.device("cpu"))
        self.targets: list[int] = self.samples.targets.tolist()
        self.served = 0
        small = isinstance(self.samples.source, TensorSource)
        self._raw = self.samples.source.gather(self.samples.index) if small else None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        self.served += 1
        index = self.samples.index[position : position + 1]
        raw = self._raw[position] if self._raw is not None else self.samples.source.gather(index)[0]
        return raw, self.targets[position]


def _dataset(served: _Served, transform: Transform, augment: torch.Generator) -> Any:
    """An Avalanche dataset with the groups "train" and "eval", all of task 0."""
    from avalanche.benchmarks.utils import (
        ConstantSequence,
        DataAttribute,
        TaskAwareSupervisedClassificationDataset,
        TransformGroups,
    )

    def learned(raw: Tensor) -> Tensor:
        return transform.train(raw[None], augment)[0]

    def tested(raw: Tensor) -> Tensor:
        return transform.test(raw[None])[0]

    tasks = ConstantSequence(0, len(served))
    return TaskAwareSupervisedClassificationDataset(
        [served],
        transform_groups=TransformGroups({"train": learned, "eval": tested}),
        data_attributes=[
            DataAttribute(served.targets, "targets"),
            DataAttribute(tasks, "targets_task_labels", use_in_getitem=True),
        ],
    )


# Strategies.


@dataclass(kw_only=True)
class AvalancheStrategy(Strategy, ABC):
    """Base of the strategy that is one of Avalanche's, trained by its own loop.

    Avalanche trains; samples, initial model, budget, order of experiences and scores are the
    suite's. What the scenario decides is handed over under Avalanche's names, unless `arguments`
    says otherwise: `mem_size` and `memory_size` (scenario.memory_size), `batch_size_mem`
    (scenario.memory_batch_size), `n_classes` and `num_classes`, `feature_extractor` and
    `classifier`, `last_layer_name` and `cwr_layer_name`. What is stored is counted after every
    experience, where Avalanche's own memories keep it.

    The optimizer keeps its state from one experience to the next, as Avalanche has it. Every
    sample has task label 0.

    Attributes:
        name: A class of `avalanche.training.supervised`, or one of your own,
            `strategies.<file>.<class>`.
        arguments: For it, by name; plain values.
        plugins: Classes of `avalanche.training.plugins`, or of your own, each with its arguments.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: L2 coefficient (decoupled for AdamW).
        optimizer: "sgd", "adam" or "adamw".
    """

    settings: ClassVar[frozenset[Setting]] = CLASSIFICATION
    resumable: ClassVar[bool] = False
    expected_failures: ClassVar[Mapping[str, str]] = {
        "resumes_with_the_same_bits": "Avalanche's strategies and plug-ins hold arbitrary objects, "
        "which only pickle could save; an interrupted run begins anew",
    }

    name: str = "Naive"
    arguments: dict[str, Any] = field(default_factory=dict)
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"

    def __post_init__(self) -> None:
        require(self, "lr", above=0)
        require(self, "momentum", at_least=0, at_most=1)
        require(self, "weight_decay", at_least=0)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if scenario.passes != 1:
            raise UserError(
                f"scenario.passes={scenario.passes}: Avalanche's loop takes one step on each "
                "mini-batch. Set scenario.passes=1."
            )
        kind = _strategy_class(self.name)
        parameters = foreign.parameters(kind)
        if "model" not in parameters and "feature_extractor" not in parameters:
            raise UserError(f"strategy.name={self.name} can't run here: {_OWN_MODEL}.")
        parts = [(kind, self.arguments, "strategy.arguments")]
        parts += [(_plugin_class(n), a, f"strategy.plugins.{n}") for n, a in self.plugins.items()]
        for part, arguments, where in parts:
            foreign.check_arguments(part, arguments, _OFFERED, where, _OURS)
            sizes = {"mem_size", "memory_size"} & foreign.parameters(part).keys()
            if not scenario.memory_size and sizes - arguments.keys():
                raise UserError(
                    f"{part.__name__} keeps samples, and scenario.memory_size=0 allows none. "
                    "Allow some, or choose another strategy."
                )

    def setup(self, model: nn.Module, context: Context) -> None:
        if context.precision != "fp32":
            raise UserError(
                f"precision={context.precision}: Avalanche's loop has no mixed precision. Set "
                "precision=fp32."
            )
        self.context, self.model = context, model
        self._seen: set[int] = set()
        self._steps = _Steps(context)
        with quietly():
            from avalanche.training.plugins import EvaluationPlugin

            kind, offered = _strategy_class(self.name), self._offered(model, context)
            plugins = [
                _plugin_class(name)(**foreign.filled(_plugin_class(name), arguments, offered))
                for name, arguments in self.plugins.items()
            ]
            offered["plugins"] = [*plugins, self._steps]
            offered["evaluator"] = EvaluationPlugin()
            if _required("criterion", kind):
                offered["criterion"] = nn.CrossEntropyLoss()
            self._learner = kind(**foreign.filled(kind, self.arguments, offered))

    def _offered(self, model: nn.Module, context: Context) -> dict[str, Any]:
        """What the run has to give, by Avalanche's names."""
        scenario = context.scenario
        named = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        more = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        parts: dict[str, Any] = {}
        if isinstance(model, Classifier):
            parts = {"feature_extractor": model.features, "classifier": model.head}
            parts |= dict.fromkeys(("last_layer_name", "cwr_layer_name"), "head")
        return {
            "model": model,
            "optimizer": named[self.optimizer](
                model.parameters(), lr=self.lr, weight_decay=self.weight_decay, **more
            ),
            "train_mb_size": scenario.batch_size,
            "train_epochs": scenario.epochs,
            "eval_mb_size": scenario.batch_size,
            "device": context.device,
            "mem_size": scenario.memory_size,
            "memory_size": scenario.memory_size,
            "batch_size_mem": context.memory_batch_size,
            "n_classes": context.n_outputs,
            "num_classes": context.n_outputs,
            **parts,
        }

    def learn(self, experience: Experience) -> None:
        if experience.train is None:
            return
        served = _Served(experience.train)
        augment = self.context.generator("augment", torch.device("cpu"))
        with quietly():
            dataset = _dataset(served, experience.train.transform, augment)
            self._steps.watch(served)
            self._learner.train(self._told(dataset, experience), eval_streams=[])
        self._seen |= {*experience.classes}
        self.model = self._learner.model
        self.model.eval()
        if self.memory_samples > self.context.scenario.memory_size:
            raise UserError(
                f"{self.name} keeps {self.memory_samples} samples after {experience.index + 1} "
                f"experiences, and scenario.memory_size={self.context.scenario.memory_size}. Lower "
                "strategy.arguments or strategy.plugins accordingly."
            )

    def _told(self, dataset: Any, experience: Experience) -> Any:
        """The experience as Avalanche knows it: what was before, and nothing that comes."""
        from avalanche.benchmarks import DatasetExperience, EagerCLStream

        # A plain attribute in place of the property: some plug-ins replace the dataset.
        replaceable = type("ToldExperience", (DatasetExperience,), {"dataset": dataset})
        told = replaceable(dataset=dataset)
        told = EagerCLStream("train", [told])[0]
        told.current_experience = experience.index
        told.classes_in_this_experience = {*experience.classes}
        told.previous_classes = set(self._seen)
        told.classes_seen_so_far = self._seen | {*experience.classes}
        told.future_classes = {*range(self.context.n_outputs)} - told.classes_seen_so_far
        told.task_label, told.task_labels = 0, [0]
        return told

    def predict(self, batch: Batch) -> Tensor:
        learner = self._learner
        shared = ("mbatch", "mb_output", "is_training")
        kept = {name: vars(learner)[name] for name in shared}
        training = [module for module in learner.model.modules() if module.training]
        learner.model.eval()
        unknown = torch.zeros(len(batch), dtype=torch.int64, device=batch.inputs.device)
        with quietly():
            learner.is_training = False
            learner.mbatch = [batch.inputs, unknown, unknown]
            learner._before_eval_iteration()
            learner._before_eval_forward()
            learner.mb_output = learner.forward()
            learner._after_eval_forward()
            learner._after_eval_iteration()
        outputs: Tensor = learner.mb_output.float()
        for name, value in kept.items():
            setattr(learner, name, value)
        for module in training:
            module.training = True
        return outputs

    @property
    def memory_samples(self) -> int:
        parts = [self._learner, *self._learner.plugins]
        kept = {id(memory): memory for part in parts for memory in _memories(part)}
        return sum(map(len, kept.values()))

    def facts(self) -> Mapping[str, Any]:
        return {"avalanche": machine.version("avalanche-lib")}


#: What a run has to give: names of `AvalancheStrategy._offered`, and of the loop's parts.
_OFFERED = frozenset(
    {
        *("model", "optimizer", "train_mb_size", "train_epochs", "eval_mb_size", "device"),
        *("plugins", "evaluator", "criterion", "mem_size", "memory_size", "batch_size_mem"),
        *(
            "n_classes",
            "num_classes",
            "feature_extractor",
            "classifier",
            "last_layer_name",
            "cwr_layer_name",
        ),
    }
)
#: Those that the budget and the loop decide, and nobody else.
_OURS = frozenset(
    {
        *("model", "optimizer", "train_mb_size", "train_epochs", "eval_mb_size", "device"),
        *("plugins", "evaluator", "criterion", "eval_every", "peval_mode"),
    }
)


def _required(name: str, kind: Any) -> bool:
    parameter = foreign.parameters(kind).get(name)
    return parameter is not None and parameter.default is inspect.Parameter.empty


class _Steps:
    """A plug-in that tells the suite's loop of every step.

    Args:
        context: Whom to tell.
    """

    supports_distributed = False

    def __init__(self, context: Context) -> None:
        self.context = context

    def watch(self, served: _Served) -> None:
        """Counts the samples of this experience from now on."""
        self._served = served

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """What was read outside of the steps does not count."""
        self._counted = self._served.served

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The batch of the loader, before a method puts its own samples to it."""
        self._loaded = len(strategy.mb_y)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """One step, on those samples of this experience that its loader gave."""
        read, self._counted = self._served.served - self._counted, self._served.served
        self.context.on_step(min(read, self._loaded))


def _memories(part: Any) -> Iterator[Collection[Any]]:
    """What a strategy or plug-in of Avalanche's keeps of the stream."""
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.training.storage_policy import ExemplarsBuffer

    known = vars(part)
    for name, value in known.items():
        if isinstance(value, ExemplarsBuffer):
            yield value.buffer
        elif name == "buffers":  # A-GEM: a dataset for each experience
            yield from (kept for kept in value if isinstance(kept, AvalancheDataset))
        elif name == "memory_x":  # GEM: a tensor for each experience
            yield from value.values()
        elif name == "ext_mem_list_current_index":  # GSS: filled so far
            yield range(value)
        elif name == "buffer" and not isinstance(value, AvalancheDataset):  # MER
            yield from _memories(value)


# Names to things, and only to things that are meant.


def _strategy_class(name: str) -> Any:
    with quietly():
        from avalanche.training.templates.base_sgd import BaseSGDTemplate

    where = "strategy.name"
    found = foreign.found(name, _TRAINING, "strategies", where, "supervised")
    return _of_kind(found, BaseSGDTemplate, name, where)


def _plugin_class(name: str) -> Any:
    with quietly():
        from avalanche.core import BasePlugin

    where = "strategy.plugins"
    found = foreign.found(name, _TRAINING, "strategies", where, "plugins")
    return _of_kind(found, BasePlugin, name, where)


def _of_kind(found: Any, kind: type[Any], name: str, where: str) -> Any:
    if found.__name__ in _REFUSED and found.__module__.startswith("avalanche."):
        raise UserError(f"{where}={name} can't run here: {_REFUSED[found.__name__]}.")
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise UserError(f"{where}={name} is no {kind.__name__} of Avalanche's.")
    return found
