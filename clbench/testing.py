"""Checks that every strategy and scenario must pass; run them on your own.

from clbench.testing import check_strategy, ToyScenario
check_strategy(Mine(lr=0.1))
"""

from __future__ import annotations

import copy
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench import protocol
from clbench.classification import ClassIncrementalImages, relabelled
from clbench.conditions import Conditions
from clbench.config import build, options
from clbench.corrupted import CorruptedImages
from clbench.errors import Interrupted, UserError
from clbench.machine import isolated_rng
from clbench.progress import Silent
from clbench.results import Result, RunFolder
from clbench.samples import Batch, Samples
from clbench.state import capture
from clbench.text.instructions import InstructionScenario
from clbench.text.toy import ToyInstructions as ToyInstructions
from clbench.toys import ToyDrift as ToyDrift
from clbench.toys import ToyScenario as ToyScenario
from clbench.toys import ToyViT as ToyViT
from clbench.training import Trainer
from clbench.types import (
    CLASSIFICATION,
    Context,
    Experience,
    Scenario,
    Setting,
    Split,
    Strategy,
    Stream,
)

Check = Callable[[Strategy, Scenario], None]
#: The first one on which a strategy says that it works is the one it is checked on.
TOYS: tuple[Scenario, ...] = (
    ToyScenario(),
    ToyScenario(backbone=ToyViT()),
    ToyDrift(),
    ToyInstructions(),
)
#: Settings so alike that a strategy that works in several of them is checked in one.
ALIKE: tuple[frozenset[Setting], ...] = (
    CLASSIFICATION,
    frozenset({Setting.INSTRUCTION_TUNING}),
    frozenset({Setting.TEST_TIME_ADAPTATION}),
)


def same_seed_same_numbers(strategy: Strategy, scenario: Scenario) -> None:
    """Two runs with one seed agree in every bit of what is measured."""
    assert _numbers(_run(strategy, scenario)) == _numbers(_run(strategy, scenario))


def other_seed_other_run(strategy: Strategy, scenario: Scenario) -> None:
    """Another seed changes the class order or the weights."""
    one, two = _learned(strategy, scenario, seed=0), _learned(strategy, scenario, seed=1)
    assert not _equal(_weights(one), _weights(two)), "seeds 0 and 1 end in the same state"


def predict_leaves_no_trace(strategy: Strategy, scenario: Scenario) -> None:
    """Predicting changes neither state nor random numbers."""
    one = _learned(strategy, scenario, experiences=1)
    before = capture(one.strategy), one.random_states()
    with torch.inference_mode():
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
    """Outputs are finite, one column per class of the stream, one row per sample.

    Where a sample has several labels, one row for each of them.
    """
    one = _learned(strategy, scenario)
    outputs = one.strategy.predict(_all(one.stream.tests[0]).unlabelled())
    assert outputs.shape == (*one.stream.tests[0].targets.shape, one.stream.n_outputs)
    assert outputs.isfinite().all()


def beats_chance(strategy: Strategy, scenario: Scenario) -> None:
    """Accuracy, at the end and of what arrives, is at least one and a half times guessing."""
    metrics = _run(strategy, scenario).metrics
    chance = _chance(_stream(scenario))
    final, error = metrics["average_accuracy"], metrics.get("online_error")
    assert final is not None
    assert final >= 1.5 * chance, f"accuracy {final:.3f}, chance {chance:.3f}"
    assert error is None or 1 - error >= 1.5 * chance, f"online error {error:.3f}"


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
        assert _numbers(rest) == _numbers(whole)
        assert rest.costs["train_samples"] == whole.costs["train_samples"]


def resumes_within_an_experience(strategy: Strategy, scenario: Scenario) -> None:
    """Asked to stop in the midst of two experiences, a run goes on twice and ends in the same bits.

    A strategy with a loop of its own stops when it has learned the experience.
    """
    whole = _run(strategy, scenario)
    with tempfile.TemporaryDirectory() as folder:
        where = RunFolder(Path(folder), "run")
        where.path.mkdir(parents=True)
        for preempted in (_PreemptedAt(1, 2), _PreemptedAt(len(whole.experiences) - 1)):
            try:
                rest = _run(strategy, scenario, folder=where, progress=preempted)
            except Interrupted:
                continue
            break  # a method of a single pass does not come half-way through all epochs
        else:
            rest = _run(strategy, scenario, folder=where)
        log = (where.path / "log.txt").read_text()
    assert "resumed" in log or not strategy.resumable, "the run began anew, or never stopped"
    assert _numbers(rest) == _numbers(whole)
    assert rest.strategy_facts == whole.strategy_facts
    for name in ("train_samples", "forward_samples", "backward_samples"):
        assert rest.costs[name] == whole.costs[name], f"{name} differ"
    kind = type(strategy)
    loop = issubclass(kind, Trainer) and kind.learn is Trainer.learn and kind.fit is Trainer.fit
    if loop or scenario.setting is Setting.TEST_TIME_ADAPTATION:
        assert "resumed within experience 2 after 2 steps" in log, log


def one_experience_works(strategy: Strategy, scenario: Scenario) -> None:
    """A stream of a single experience is learned and scored."""
    single: Scenario | None = None
    if isinstance(scenario, ClassIncrementalImages):
        single = replace(scenario, n_experiences=1)
    elif isinstance(scenario, CorruptedImages):
        single = replace(scenario, corruptions=scenario.chosen(Split.EVALUATE)[:1])
    elif isinstance(scenario, InstructionScenario):
        single = replace(scenario, order=(_stream(scenario).experiences[0].name,))
    if single is not None:
        result = _run(strategy, single)
        assert result.metrics["average_accuracy"] is not None
        assert result.metrics["forgetting"] is None


def last_batch_of_one_works(strategy: Strategy, scenario: Scenario) -> None:
    """A last batch of one sample is learned, or answered, like any other."""
    stream = _stream(scenario)
    first = stream.arrivals[0].samples if stream.arrivals else stream.experiences[0].train
    _run(strategy, replace(scenario, batch_size=len(first or ()) - 1, epochs=1))


def no_labels_no_learning(strategy: Strategy, scenario: Scenario) -> None:
    """An experience without labelled samples is no error."""
    one = _learned(strategy, scenario, experiences=1)
    one.strategy.learn(Experience(1, "unlabelled", None))


def no_memory_works(strategy: Strategy, scenario: Scenario) -> None:
    """A memory budget of zero is honoured or refused with a message, never ignored."""
    empty = replace(scenario, memory_size=0)
    try:
        strategy.check(empty)
    except UserError:
        return
    assert _learned(strategy, empty).strategy.memory_samples == 0


def keeps_features_as_it_says(strategy: Strategy, scenario: Scenario) -> None:
    """Learns the same from kept features, but for one answer in a test; or is refused them."""
    kept = Conditions(device="cpu", threads=1, cache_features=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mine = protocol.run(
                scenario, copy.deepcopy(strategy), kept, cache_dir=Path(folder)
            ).accuracy_matrix
        except UserError:
            assert not strategy.keeps_features, "it says that it keeps features, but it can't"
            return
    assert strategy.keeps_features, "it keeps features, but does not say so"
    pairs = zip(mine, _run(strategy, scenario).accuracy_matrix, strict=True)
    one = 1.5 / min(len(test) for test in _stream(scenario).tests)
    worst = max(abs((a or 0) - (b or 0)) for rows in pairs for a, b in zip(*rows, strict=True))
    assert worst < one, f"kept features change accuracies by up to {worst:.3f}"


def options_build_it_again(strategy: Strategy, scenario: Scenario) -> None:  # noqa: ARG001
    """The recorded options are a configuration that builds an equal strategy."""
    node = {k: v for k, v in options(strategy).items() if k != "_code_"}
    if node["_target_"].split(".")[0] in ("strategies", "clbench"):
        assert build(node, type(strategy), "strategy") == strategy


def says_how_it_differs(strategy: Strategy, scenario: Scenario) -> None:  # noqa: ARG001
    """The docstring has the line "**Differs from the paper:**"."""
    assert "**Differs from the paper:**" in (type(strategy).__doc__ or "")


def predicting_changes_no_answer(strategy: Strategy, scenario: Scenario) -> None:
    """A strategy that is asked to predict between its batches answers them as one that is not."""
    one, other = _set_up(strategy, scenario), _set_up(strategy, scenario)
    for mine, same in zip(one.arriving(), other.arriving(), strict=True):
        alone = one.answer(mine)
        with torch.inference_mode():
            other.strategy.predict(_all(other.stream.tests[0]).unlabelled())
        assert torch.equal(alone, other.answer(same)), "predict changed a later answer"


def answers_every_sample(strategy: Strategy, scenario: Scenario) -> None:
    """Answers are finite, in fp32, one row for each sample; the batch is left as it was."""
    one = _set_up(strategy, scenario)
    for batch in one.arriving():
        before = batch.inputs.clone(), batch.raw.clone()
        answers = one.answer(batch)
        assert answers.shape == (len(batch), one.stream.n_outputs)
        assert answers.dtype == torch.float32
        assert answers.isfinite().all()
        assert _equal(before, (batch.inputs, batch.raw)), "adapt changed its batch"


def labels_are_out_of_reach(strategy: Strategy, scenario: Scenario) -> None:
    """Other labels of what arrives and of what is held out change no answer."""
    one, other = (_set_up(strategy, s) for s in (scenario, _mislabelled(scenario)))
    for mine, same in zip(one.arriving(), other.arriving(), strict=True):
        assert torch.equal(one.answer(mine), other.answer(same)), "an answer depends on labels"


def reset_forgets_everything(strategy: Strategy, scenario: Scenario) -> None:
    """Reset puts back every bit, however often: state, random numbers, and so the answers."""
    one = _set_up(strategy, scenario)
    start = capture(one.strategy), one.random_states()
    first = [one.answer(batch) for batch in one.arriving(0)]
    for _ in range(2):
        for index in range(len(one.stream.arrivals)):
            for batch in one.arriving(index):
                one.answer(batch)
        one.strategy.reset()
        assert _equal(start[0], capture(one.strategy)), "reset left a trace in the state"
        now = one.random_states()
        assert _equal(start[1], {k: now[k] for k in start[1]}), "reset left random numbers"
        again = [one.answer(batch) for batch in one.arriving(0)]
        assert _equal(first, again), "answers differ after a reset"
        one.strategy.reset()


def batches_of_one_work(strategy: Strategy, scenario: Scenario) -> None:
    """Samples that arrive alone are answered."""
    one = _set_up(strategy, scenario)
    for batch in one.arriving(0, size=1)[:8]:
        assert one.answer(batch).isfinite().all()


def one_class_works(strategy: Strategy, scenario: Scenario) -> None:
    """A stream of samples of a single class is answered."""
    one = _set_up(strategy, scenario)
    for arrivals in one.stream.arrivals:
        samples = arrivals.samples
        of_first = (samples.targets == samples.targets[0]).nonzero().flatten()
        for batch in samples.subset(of_first).batches(torch.arange(len(of_first)), 4):
            assert one.answer(batch).isfinite().all()


def missing_source_is_no_crash(strategy: Strategy, scenario: Scenario) -> None:
    """Without samples of the source it works, or says that it needs them."""
    try:
        one = _set_up(strategy, scenario, source=False)
    except UserError:
        return
    one.answer(one.arriving(0)[0])


_LABELLED = frozenset(Setting) - {Setting.TEST_TIME_ADAPTATION}
_UNLABELLED = frozenset({Setting.TEST_TIME_ADAPTATION})

#: Every check, with the settings that it is about.
CHECKS: Mapping[Check, frozenset[Setting]] = {
    same_seed_same_numbers: frozenset(Setting),
    other_seed_other_run: _LABELLED,
    predict_leaves_no_trace: frozenset(Setting),
    globals_untouched: frozenset(Setting),
    memory_within_budget: _LABELLED,
    outputs_cover_seen_classes: frozenset(Setting),
    beats_chance: frozenset(Setting),
    resumes_with_the_same_bits: frozenset(Setting),
    resumes_within_an_experience: frozenset(Setting),
    one_experience_works: frozenset(Setting),
    last_batch_of_one_works: frozenset(Setting),
    no_labels_no_learning: frozenset(Setting),
    no_memory_works: _LABELLED,
    keeps_features_as_it_says: _LABELLED,
    options_build_it_again: frozenset(Setting),
    says_how_it_differs: frozenset(Setting),
    predicting_changes_no_answer: _UNLABELLED,
    answers_every_sample: _UNLABELLED,
    labels_are_out_of_reach: _UNLABELLED,
    reset_forgets_everything: _UNLABELLED,
    batches_of_one_work: _UNLABELLED,
    one_class_works: _UNLABELLED,
    missing_source_is_no_crash: _UNLABELLED,
}


def checks_for(strategy: Strategy | type[Strategy]) -> tuple[Check, ...]:
    """The checks that are about a setting in which the strategy works."""
    return tuple(check for check, settings in CHECKS.items() if settings & strategy.settings)


def toy_for(strategy: Strategy, settings: frozenset[Setting] = frozenset(Setting)) -> Scenario:
    """The first toy of one of these settings on which the strategy says that it works.

    Raises:
        AssertionError: With what it says about each, if there is none.
    """
    reasons = []
    for toy in (toy for toy in TOYS if toy.setting in settings):
        try:
            strategy.check(toy)
        except UserError as reason:
            reasons.append(str(reason))
        else:
            return toy
    raise AssertionError(f"no toy scenario works: {' '.join(reasons)}")


def kinds_for(check: Check, strategy: Strategy | type[Strategy]) -> list[frozenset[Setting]]:
    """The kinds of settings that a check is about and in which the strategy works."""
    kinds = (kind & CHECKS[check] & strategy.settings for kind in ALIKE)
    return [kind for kind in kinds if kind]


def _toys(check: Check, strategy: Strategy) -> list[Scenario]:
    """A toy of each kind of settings; a wrapped method may not work in all that its wrapper can."""
    found, refusals = [], []
    for kind in kinds_for(check, strategy):
        try:
            found.append(toy_for(strategy, kind))
        except AssertionError as refusal:
            refusals.append(refusal)
    if not found:
        raise refusals[0]
    return found


def check_strategy(strategy: Strategy, scenario: Scenario | None = None) -> None:
    """Runs every check on a strategy that is about the scenario's setting.

    A check listed in the strategy's `expected_failures` must fail, and is an error once it
    passes.

    Args:
        strategy: With the hyper-parameters to check; it is copied, not changed.
        scenario: Default: the one of `TOYS` that suits.

    Raises:
        AssertionError: Naming the check that failed.
    """
    for check in checks_for(strategy):
        if scenario is None:
            for toy in _toys(check, strategy):
                run_check(check, strategy, toy)
        elif scenario.setting in CHECKS[check]:
            run_check(check, strategy, scenario)


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
                    labels = x.targets[x.targets >= 0].tolist()
                    assert set(labels) <= set(a.classes), "a label of no class"
        assert _fingerprint(one) != _fingerprint(other), "seeds 0 and 1 give one stream"
    tune, evaluate = (_contents(scenario.stream(split, 0)) for split in Split)
    assert not tune & evaluate, f"{len(tune & evaluate)} samples are in both splits"


@dataclass
class Learned:
    """A strategy that is set up and may have learned some experiences, and the stream it met."""

    strategy: Strategy
    stream: Stream
    context: Context

    def random_states(self) -> dict[str, Tensor]:
        """The state of every generator."""
        return {k: g.get_state() for k, g in self.context.generators.items()}

    def arriving(self, experience: int | None = None, size: int = 0) -> list[Batch]:
        """What arrives in one experience or in all, in batches of `size` or of the scenario's."""
        size = size or self.context.scenario.batch_size
        every = self.stream.arrivals
        some = every if experience is None else [every[experience]]
        order = [torch.arange(len(arrivals.samples)) for arrivals in some]
        return [b for a, o in zip(some, order, strict=True) for b in a.samples.batches(o, size)]

    def answer(self, batch: Batch) -> Tensor:
        """What `adapt` answers; the same global random numbers each time."""
        with isolated_rng(0, "answer"):
            return self.strategy.adapt(batch.unlabelled()).detach()


def _set_up(strategy: Strategy, scenario: Scenario, seed: int = 0, source: bool = True) -> Learned:
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
            source=stream.source if source else None,
        )
        strategy.setup(model, context)
    return Learned(strategy, stream, context)


def _learned(
    strategy: Strategy, scenario: Scenario, seed: int = 0, experiences: int | None = None
) -> Learned:
    one = _set_up(strategy, scenario, seed)
    with isolated_rng(seed, "learn"):
        for experience in one.stream.experiences[:experiences]:
            if strategy.revisits:
                one.context.seen = list(one.stream.experiences[: experience.index + 1])
            if one.stream.arrivals:
                for batch in one.arriving(experience.index):
                    one.answer(batch)
            else:
                one.strategy.learn(experience)
    return one


def _mislabelled(scenario: Scenario) -> Scenario:
    """The same scenario with a wrong label for everything that arrives or is held out."""

    def stream(split: Split, seed: int) -> Stream:
        right = scenario.stream(split, seed)

        shifted = torch.arange(1, right.n_outputs + 1) % right.n_outputs

        def wrong(samples: Samples) -> Samples:
            return Samples(relabelled(samples.source, shifted), samples.index, samples.transform)

        return replace(
            right,
            tests=[wrong(test) for test in right.tests],
            arrivals=[replace(a, samples=wrong(a.samples)) for a in right.arrivals],
            source_test=None if right.source_test is None else wrong(right.source_test),
        )

    other = copy.copy(scenario)
    vars(other)["stream"] = stream
    return other


def _numbers(result: Result) -> Any:
    """What is measured, but for times."""
    online = copy.deepcopy(result.online)
    online.get("source_model", {}).pop("seconds_per_sample", None)
    return result.accuracy_matrix, result.scores, result.general, online


def _run(
    strategy: Strategy,
    scenario: Scenario,
    folder: RunFolder | None = None,
    progress: Silent | None = None,
) -> Result:
    conditions = Conditions(device="cpu", threads=1)
    result = protocol.run(
        scenario, copy.deepcopy(strategy), conditions, folder=folder, progress=progress
    )
    assert result.status == "complete", f"the run {result.status}: {result.reason}"
    return result


def _chance(stream: Stream) -> float:
    """Accuracy of guessing a class, or of always giving the answer that is right most often."""
    if stream.tests[0].targets.ndim == 1:
        return 1 / stream.n_outputs
    answers = [tuple(answer) for test in stream.tests for answer in test.targets.tolist()]
    return max(Counter(answers).values()) / len(answers)


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


class _PreemptedAt(Silent):
    """Sends the signal of a scheduler after some step of some experience, or half-way through."""

    def __init__(self, experience: int, step: int = 0) -> None:
        self.experience, self.step, self.sent = experience, step, False

    def start(self, name: str, samples: int) -> None:
        self.now = int(name.split()[1].split("/")[0]) - 1
        self.taken, self.seen, self.half = 0, 0, samples / 2

    def advance(self, samples: int) -> None:
        self.taken, self.seen = self.taken + 1, self.seen + samples
        due = self.taken == self.step if self.step else self.seen >= self.half
        if due and self.now == self.experience and not self.sent:
            self.sent = True
            if not callable(signal.getsignal(signal.SIGUSR1)):
                raise Interrupted  # in a thread nobody could hear it
            signal.raise_signal(signal.SIGUSR1)


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
