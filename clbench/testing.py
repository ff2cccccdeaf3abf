"""Checks that every strategy and scenario must pass; run them on your own.

from clbench.testing import check_strategy, ToyScenario
check_strategy(Mine(lr=0.1))
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench import protocol
from clbench.classification import ClassIncrementalImages, Images
from clbench.config import build, options
from clbench.machine import isolated_rng
from clbench.nn.backbones import MLP, Backbone, FeatureExtractor, TimmFeatures
from clbench.progress import Silent
from clbench.results import Result, RunFolder
from clbench.samples import TensorSource
from clbench.state import capture
from clbench.types import Context, Experience, Scenario, Split, Strategy, Stream, derive_seed


@dataclass(kw_only=True)
class ToyScenario(ClassIncrementalImages):
    """Six noisy 6x6 patterns in three experiences of two: a run takes a fraction of a second.

    Attributes:
        per_class: Training samples of each class; half as many for testing.
        noise: Standard deviation of the noise, in grey levels.
    """

    backbone: Backbone = field(default_factory=lambda: MLP(hidden=(32,)))
    n_experiences: int = 3
    epochs: int = 5
    batch_size: int = 10
    memory_size: int = 30
    per_class: int = 40
    noise: float = 40.0

    def images(self, split: Split) -> Images:
        generator = torch.Generator().manual_seed(derive_seed(0, f"toy {split.value}"))
        patterns = 255 * torch.rand(6, 1, 6, 6, generator=generator)

        def part(count: int) -> TensorSource:
            targets = torch.arange(6).repeat(count)
            noise = self.noise * torch.randn(6 * count, 1, 6, 6, generator=generator)
            pixels = (patterns[targets] + noise).clamp(0, 255).to(torch.uint8)
            return TensorSource(pixels, targets)

        train, test = part(self.per_class), part(self.per_class // 2)
        return Images(train, test, [f"pattern {i}" for i in range(6)], (0.5,), (0.3,))


@dataclass(kw_only=True)
class ToyViT(Backbone):
    """timm's vision transformer in miniature, for `ToyScenario`: 16 features, two blocks.

    Started at random, with tokens and activations of the size that trained ones have, so that its
    features tell the toy's patterns apart.

    Attributes:
        patch_size: In pixels.
    """

    patch_size: int = 3

    @property
    def is_vision_transformer(self) -> bool:
        return True

    def _assemble(
        self, image_shape: tuple[int, int, int]
    ) -> tuple[FeatureExtractor, dict[str, Tensor]]:
        from timm.models.vision_transformer import VisionTransformer

        channels, *size = image_shape
        model = VisionTransformer(
            img_size=tuple(size),
            patch_size=self.patch_size,
            in_chans=channels,
            num_classes=0,
            embed_dim=16,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        return TimmFeatures(model, model.num_features), {}


Check = Callable[[Strategy, Scenario], None]


def same_seed_same_numbers(strategy: Strategy, scenario: Scenario) -> None:
    """Two runs with one seed agree in every bit of the matrix."""
    assert _run(strategy, scenario).accuracy_matrix == _run(strategy, scenario).accuracy_matrix


def other_seed_other_run(strategy: Strategy, scenario: Scenario) -> None:
    """Another seed changes the class order or the weights."""
    one, two = _learned(strategy, scenario, seed=0), _learned(strategy, scenario, seed=1)
    assert not _equal(_weights(one), _weights(two)), "seeds 0 and 1 end in the same state"


def predict_leaves_no_trace(strategy: Strategy, scenario: Scenario) -> None:
    """Predicting changes neither state nor random numbers."""
    one = _learned(strategy, scenario, experiences=1)
    before = capture(one.strategy), one.random_states()
    for test in one.stream.tests:
        one.strategy.predict(_all(test).unlabelled())
    assert _equal(before[0], capture(one.strategy)), "predict changed the state"
    assert _equal(before[1], one.random_states()), "predict drew random numbers"


def globals_untouched(strategy: Strategy, scenario: Scenario) -> None:
    """Global generators, number format, gradient mode and threads are as before."""

    def look() -> list[Any]:
        numpy: Any = np.random.get_state()
        return [
            torch.get_rng_state(),
            random.getstate(),
            numpy[1].tolist(),
            numpy[2],
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
        ]

    before = look()
    _run(strategy, scenario)
    assert _equal(before, look()), "a run changed global state"


def memory_within_budget(strategy: Strategy, scenario: Scenario) -> None:
    """After every experience no more samples are kept than the budget allows."""
    for count in range(1, len(_stream(scenario).experiences) + 1):
        kept = _learned(strategy, scenario, experiences=count).strategy.memory_samples
        assert kept <= scenario.memory_size, f"{kept} samples kept of {scenario.memory_size}"


def outputs_cover_seen_classes(strategy: Strategy, scenario: Scenario) -> None:
    """Outputs are finite, one column per class of the stream, one row per sample."""
    one = _learned(strategy, scenario)
    outputs = one.strategy.predict(_all(one.stream.tests[0]).unlabelled())
    assert outputs.shape == (len(one.stream.tests[0]), one.stream.n_outputs)
    assert outputs.isfinite().all()


def beats_chance(strategy: Strategy, scenario: Scenario) -> None:
    """The average accuracy at the end is at least one and a half times guessing."""
    result = _run(strategy, scenario)
    final = result.metrics["average_accuracy"]
    chance = 1 / _stream(scenario).n_outputs
    assert final is not None
    assert final >= 1.5 * chance, f"accuracy {final:.3f}, chance {chance:.3f}"


def resumes_with_the_same_bits(strategy: Strategy, scenario: Scenario) -> None:
    """Stopped after any experience and started again, a run ends in the same bits."""
    whole = _run(strategy, scenario)
    for stop in range(1, len(whole.experiences)):
        with tempfile.TemporaryDirectory() as folder:
            where = RunFolder(Path(folder), "run")
            where.path.mkdir(parents=True)
            try:
                _run(strategy, scenario, folder=where, progress=_StopAt(stop))
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("the run was not interrupted")
            rest = _run(strategy, scenario, folder=where)
            assert "resumed" in (where.path / "log.txt").read_text(), "the run began anew"
        assert rest.accuracy_matrix == whole.accuracy_matrix
        assert rest.costs["train_samples"] == whole.costs["train_samples"]


def one_experience_works(strategy: Strategy, scenario: Scenario) -> None:
    """A stream of a single experience is learned and scored."""
    if isinstance(scenario, ClassIncrementalImages):
        result = _run(strategy, replace(scenario, n_experiences=1))
        assert result.metrics["average_accuracy"] is not None
        assert result.metrics["forgetting"] is None


def last_batch_of_one_works(strategy: Strategy, scenario: Scenario) -> None:
    """A last batch of one sample is learned like any other."""
    size = len(_stream(scenario).experiences[0].train or ()) - 1
    _run(strategy, replace(scenario, batch_size=size, epochs=1))


def no_labels_no_learning(strategy: Strategy, scenario: Scenario) -> None:
    """An experience without labelled samples is no error."""
    one = _learned(strategy, scenario, experiences=1)
    one.strategy.learn(Experience(1, "unlabelled", None))


def no_memory_works(strategy: Strategy, scenario: Scenario) -> None:
    """A memory budget of zero is honoured or refused with a message, never ignored."""
    from clbench.errors import UserError

    empty = replace(scenario, memory_size=0)
    try:
        strategy.check(empty)
    except UserError:
        return
    assert _learned(strategy, empty).strategy.memory_samples == 0


def options_build_it_again(strategy: Strategy, scenario: Scenario) -> None:  # noqa: ARG001
    """The recorded options are a configuration that builds an equal strategy."""
    node = {k: v for k, v in options(strategy).items() if k != "_code_"}
    if node["_target_"].split(".")[0] in ("strategies", "clbench"):
        assert build(node, type(strategy), "strategy") == strategy


def says_how_it_differs(strategy: Strategy, scenario: Scenario) -> None:  # noqa: ARG001
    """The docstring has the line "**Differs from the paper:**"."""
    assert "**Differs from the paper:**" in (type(strategy).__doc__ or "")


CHECKS: tuple[Check, ...] = (
    same_seed_same_numbers,
    other_seed_other_run,
    predict_leaves_no_trace,
    globals_untouched,
    memory_within_budget,
    outputs_cover_seen_classes,
    beats_chance,
    resumes_with_the_same_bits,
    one_experience_works,
    last_batch_of_one_works,
    no_labels_no_learning,
    no_memory_works,
    options_build_it_again,
    says_how_it_differs,
)


def check_strategy(strategy: Strategy, scenario: Scenario | None = None) -> None:
    """Runs every check on a strategy.

    A check listed in the strategy's `expected_failures` must fail, and is an error once it
    passes.

    Args:
        strategy: With the hyper-parameters to check; it is copied, not changed.
        scenario: Default: `ToyScenario()`.

    Raises:
        AssertionError: Naming the check that failed.
    """
    for check in CHECKS:
        run_check(check, strategy, scenario or ToyScenario())


def run_check(check: Check, strategy: Strategy, scenario: Scenario) -> None:
    """One check, its expected failure taken into account.

    Raises:
        AssertionError: If it fails, or passes although a failure is declared.
    """
    reason = strategy.expected_failures.get(check.__name__)
    if reason is None:
        check(strategy, scenario)
        return
    try:
        check(strategy, scenario)
    except Exception:  # a crash is a failure too
        return
    raise AssertionError(f"{check.__name__} passes, but is declared to fail: {reason}")


def check_scenario(scenario: Scenario) -> None:
    """Checks a scenario: reproducible, disjoint, complete, a different stream for each seed.

    Raises:
        AssertionError: Naming what is wrong.
    """
    for split in Split:
        one, again, other = (scenario.stream(split, seed) for seed in (0, 0, 1))
        assert len(one.experiences) == len(one.tests), "one test set per experience"
        for a, b, test in zip(one.experiences, again.experiences, one.tests, strict=True):
            assert a.name == b.name
            assert len(test), f"experience {a.index} has no test samples"
            for x, y in ((a.train, b.train), (test, again.tests[a.index])):
                if x is not None and y is not None:
                    assert torch.equal(_all(x).inputs, _all(y).inputs), "not reproducible"
                    assert set(x.targets.tolist()) <= set(a.classes), "a label of no class"
        assert _fingerprint(one) != _fingerprint(other), "seeds 0 and 1 give one stream"
    tune, evaluate = (_contents(scenario.stream(split, 0)) for split in Split)
    assert not tune & evaluate, f"{len(tune & evaluate)} samples are in both splits"


@dataclass
class Learned:
    """A strategy that has learned some experiences, and the stream it met."""

    strategy: Strategy
    stream: Stream
    context: Context

    def random_states(self) -> dict[str, Tensor]:
        """The state of every generator."""
        return {k: g.get_state() for k, g in self.context.generators.items()}


def _learned(
    strategy: Strategy, scenario: Scenario, seed: int = 0, experiences: int | None = None
) -> Learned:
    strategy = copy.deepcopy(strategy)
    with isolated_rng(seed, "check"):
        stream = _stream(scenario, seed)
        model = scenario.model(seed, stream)
        context = Context(
            device=torch.device("cpu"),
            seed=seed,
            scenario=scenario,
            objective=scenario.objective(),
            transform=stream.transform,
            n_outputs=stream.n_outputs,
            stream_batches=stream.batches(scenario),
        )
        strategy.setup(model, context)
        for experience in stream.experiences[:experiences]:
            if strategy.revisits:
                context.seen = list(stream.experiences[: experience.index + 1])
            strategy.learn(experience)
    return Learned(strategy, stream, context)


def _run(
    strategy: Strategy,
    scenario: Scenario,
    folder: RunFolder | None = None,
    progress: Silent | None = None,
) -> Result:
    conditions = protocol.Conditions(device="cpu", threads=1)
    result = protocol.run(
        scenario, copy.deepcopy(strategy), conditions, folder=folder, progress=progress
    )
    assert result.status == "complete", f"the run {result.status}: {result.reason}"
    return result


def _stream(scenario: Scenario, seed: int = 0) -> Stream:
    return scenario.stream(Split.EVALUATE, seed)


class _StopAt(Silent):
    """Interrupts a run when it comes to some experience."""

    def __init__(self, experience: int) -> None:
        self.left = experience

    def start(self, name: str, samples: int) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def _all(samples: Any) -> Any:
    return samples.take(torch.arange(len(samples)))


def _weights(one: Learned) -> Any:
    model = vars(one.strategy).get("model")
    return model.state_dict() if isinstance(model, nn.Module) else capture(one.strategy)


def _fingerprint(stream: Stream) -> list[Any]:
    return [(e.name, e.train.targets.tolist() if e.train else None) for e in stream.experiences]


def _contents(stream: Stream) -> set[bytes]:
    parts = [e.train for e in stream.experiences if e.train is not None] + list(stream.tests)
    return {row.numpy().tobytes() for part in parts for row in _all(part).raw}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
