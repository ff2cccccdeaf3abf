"""The loop: learn an experience, score every experience met so far, save; then the next."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from clbench import checkpoint, interruption, machine, metrics, online, scratch
from clbench.config import options
from clbench.errors import Diverged, TimedOut, UserError
from clbench.interruption import Stop
from clbench.limits import Limits, no_orphans, out_of_memory, require_space
from clbench.midway import Midway
from clbench.online import Online
from clbench.passes import BACKWARD, FORWARD, Passes
from clbench.progress import Progress, Silent
from clbench.results import Matrix, Result, RunFolder, run_id
from clbench.retention import Retention
from clbench.state import capture, restore
from clbench.trackers import Tracker, Untracked, points
from clbench.types import Context, Experience, Scenario, Setting, Split, Strategy, require


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything about a run that is neither scenario nor strategy.

    Attributes:
        seed: Decides class order, initialisation and minibatch order.
        split: Which part of the data.
        device: "auto", "cpu" or "cuda".
        precision: "fp32", or "bf16" for automatic mixed precision.
        threads: CPU threads; 0: chosen by the size of the model.
        evaluate_every: Training steps between evaluations within an experience; 0: none.
        evaluate_samples: Test samples of an experience that these look at, at most.
        evaluate_batch_size: Samples predicted at once.
    """

    seed: int = 0
    split: Split = Split.EVALUATE
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 0
    evaluate_every: int = 0
    evaluate_samples: int = 1000
    evaluate_batch_size: int = 1000

    def __post_init__(self) -> None:
        require(self, "seed", "threads", "evaluate_every", at_least=0)
        require(self, "evaluate_samples", "evaluate_batch_size", at_least=1)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, besides the seed."""
        content = asdict(self)
        del content["seed"], content["device"]
        return {**content, "split": self.split.value}


@dataclass(frozen=True)
class Names:
    """What people call the parts of a run.

    Attributes:
        scenario: Name of its YAML.
        strategy: Name of its YAML.
        base: Of the strategy that the strategy wraps, if it wraps one.
    """

    scenario: str
    strategy: str
    base: str | None = None


def identify(
    scenario: Scenario,
    strategy: Strategy,
    conditions: Conditions,
    names: Names | None = None,
    tuned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The "run" part of a result: what is run, and the id that follows from it.

    Args:
        scenario: Its options.
        strategy: Its hyper-parameters.
        conditions: Of the run.
        names: Of scenario and strategy, for people; default: their classes'.
        tuned: Where the hyper-parameters come from, plain data; None: nobody tuned them.
    """
    chosen = {"scenario": options(scenario), "strategy": options(strategy)}
    names = names or Names(type(scenario).__name__.lower(), type(strategy).__name__.lower())
    label = ".".join(filter(None, (names.strategy, names.base)))
    data = dict(scenario.fingerprint())
    identity = {**chosen, "data": data, **conditions.identity()}
    if tuned is not None:
        identity["tuned"] = dict(tuned)
    return {
        "run_id": run_id(names.scenario, label, conditions.seed, identity),
        "scenario": names.scenario,
        "strategy": names.strategy,
        "base": names.base,
        "setting": scenario.setting.value,
        "split": conditions.split.value,
        "seed": conditions.seed,
        "precision": conditions.precision,
        "options": chosen,
        "data": data,
        "tuned": None if tuned is None else dict(tuned),
    }


def run(
    scenario: Scenario,
    strategy: Strategy,
    conditions: Conditions = Conditions(),
    *,
    names: Names | None = None,
    tuned: Mapping[str, Any] | None = None,
    folder: RunFolder | None = None,
    progress: Progress | None = None,
    tracker: Tracker | None = None,
    limits: Limits | None = None,
) -> Result:
    """Runs one strategy through one stream.

    Args:
        scenario: The stream, the model and the budget.
        strategy: The method; not set up yet.
        conditions: Seed, split, device, ...
        names: Of scenario and strategy, for people.
        tuned: Where the hyper-parameters come from; see `identify`.
        folder: Where checkpoints and the result go; None: nowhere.
        progress: Told how far the run is.
        tracker: Told what there is to show.
        limits: What it may take; default: as long as it takes.

    Returns:
        The result: complete, or diverged, out of memory or timed out, with the reason.

    Raises:
        UserError: If the pair can't work or the disk refuses.
        KeyboardInterrupt, Interrupted: When a signal has stopped it, where it can be continued.
    """
    strategy.check(scenario)
    scenario.check(conditions.split)
    result = Result(run=identify(scenario, strategy, conditions, names, tuned))
    tracker, limits = tracker or Untracked(), limits or Limits()
    progress = progress or Silent()
    with interruption.watched(signals=folder is not None) as stop:
        loop = _Loop(
            scenario, strategy, conditions, result, folder, progress, tracker, limits, stop
        )
        _attempt(loop, limits)
        if folder:
            folder.write_result(result)
            folder.log(f"{result.status}" + (f": {result.reason}" if result.reason else ""))
            if result.status != "timed out":
                checkpoint.discard(folder.within)
                checkpoint.discard(folder.checkpoint)
        tracker.end(result)
        stop.obey_signal()  # too late for this run, but not for those after it
    return result


def _attempt(loop: _Loop, limits: Limits) -> None:
    """Runs the loop; what ends it before its end is the result's status and reason.

    Raises:
        Exception: Whatever else a strategy raises, when it is written down.
    """
    result = loop.result
    try:
        with no_orphans():
            loop.run()
        return
    except Diverged as error:
        result.status, result.reason = "diverged", str(error)
    except TimedOut:
        result.status = "timed out"
        result.reason = f"it took longer than timeout={limits.timeout:g} seconds"
        loop.costs["timeout"] = limits.timeout
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        memory = out_of_memory(error)
        result.status, result.reason = "out of memory" if memory else "failed", text
        result.strategy_facts = {}
        if loop.folder:
            loop.folder.log(traceback.format_exc())
        if not memory:
            if loop.folder:
                loop.folder.write_result(result)
            loop.tracker.end(result)
            raise
    result.costs = dict(loop.costs)
    result.metrics, result.task_aware_metrics = {}, {}


class _Loop:
    """The state of one run in progress."""

    def __init__(
        self,
        scenario: Scenario,
        strategy: Strategy,
        conditions: Conditions,
        result: Result,
        folder: RunFolder | None,
        progress: Progress,
        tracker: Tracker,
        limits: Limits,
        stop: Stop,
    ) -> None:
        self.scenario, self.strategy, self.conditions = scenario, strategy, conditions
        self.result, self.folder, self.progress, self.tracker = result, folder, progress, tracker
        self.limits, self.stop = limits, stop
        self.device = machine.choose_device(conditions.device)
        self.objective = scenario.objective()
        self.step = 0
        self.began = self.started = time.perf_counter()
        self.elapsed = self.evaluating = 0.0
        self.costs: dict[str, float | int] = {
            "train_seconds": 0.0,
            "evaluate_seconds": 0.0,
            "train_samples": 0,
            FORWARD: 0,
            BACKWARD: 0,
        }
        self.passes = Passes(self.costs)
        self.pending: dict[str, Any] | None = None
        self.midway = Midway(
            folder.within if folder and strategy.resumable else None,
            limits.checkpoint_every,
            stop,
            self._first_step,
            self._within,
            self._go_on,
            folder.log if folder else lambda _: None,
        )

    def run(self) -> None:
        """Every experience: learn, score, save."""
        seed = self.conditions.seed
        with machine.isolated_rng(seed, "stream"):
            stream = self.scenario.stream(self.conditions.split, seed)
        with machine.isolated_rng(seed, "model"):
            model = self.scenario.model(seed, stream)
        self.stream = stream.to(self.device)
        model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        threads = self._describe(model)
        self.tracker.begin(self.result)
        with (
            machine.thread_count(threads),
            machine.deterministic(),
            self.passes.watch(model),
        ):
            self._set_up(model)
            start = self._resume()
            self._watch(model)
            for experience in self.stream.experiences[start:]:
                self._enter(experience)
                if self.strategy.revisits:
                    self.context.seen = list(self.stream.experiences[: experience.index + 1])
                if self.online:
                    self._adapt(experience)
                else:
                    self._learn(experience)
                self._score(experience)
                self._save(experience)
                self.stop.obey()
        self._conclude(model)

    def _describe(self, model: torch.nn.Module) -> int:
        """Facts about stream, model and machine for the record; returns the thread count."""
        arriving = [arrivals.samples for arrivals in self.stream.arrivals[:1]]
        first = self.stream.experiences[0].train or (*arriving, *self.stream.tests)[0]
        sample = first.take(torch.zeros(1, dtype=torch.int64, device=self.device))
        flops = machine.forward_flops(model, sample.inputs)
        threads = machine.choose_threads(self.conditions.threads, flops * self.scenario.batch_size)
        parameters = sum(p.numel() for p in model.parameters())
        self.costs |= {"parameters": parameters, "forward_flops": flops}
        self.result.experiences = [e.name for e in self.stream.experiences]
        self.result.test_sizes = [len(t) for t in self.stream.tests]
        self.result.scenario_facts = {**self.stream.facts, **self.scenario.model_facts(model)}
        self.result.environment = dict(machine.environment(self.device, threads))
        return threads

    def _set_up(self, model: torch.nn.Module) -> None:
        machine.reset_peak_memory(self.device)
        self.context = Context(
            device=self.device,
            seed=self.conditions.seed,
            scenario=self.scenario,
            objective=self.objective,
            transform=self.stream.transform,
            n_outputs=self.stream.n_outputs,
            source=self.stream.source,
            stream_batches=self.stream.batches(self.scenario),
            precision=self.conditions.precision,
            on_step=self._on_step,
        )
        self.online: Online | None = None
        self.retention: Retention | None = None
        if self.stream.arrivals:
            self.online = Online(self.stream, self.strategy, self.context)
            self.online.look(model)
        elif self.stream.source_test is not None:
            size = self.conditions.evaluate_batch_size
            self.retention = Retention(self.stream, self.context, size)
            with self._scoring():
                self.retention.look(model)
        with machine.isolated_rng(self.conditions.seed, "setup"):
            self.strategy.setup(model, self.context)
        if self.online:
            self.online.begin()

    def _adapt(self, experience: Experience) -> None:
        """Answers what arrives without labels, and learns from it what the strategy can."""
        assert self.online
        count = len(self.stream.experiences)
        samples = len(self.stream.arrivals[experience.index].samples)
        self.progress.start(f"experience {experience.index + 1}/{count}", samples)
        machine.synchronise(self.device)
        self.began, self.evaluating = time.perf_counter(), 0.0
        rng = machine.isolated_rng(self.conditions.seed, f"adapt {experience.index}")
        with rng, self.passes.counting(True):
            for answered in self.online.meet(experience.index):
                self.step += 1
                self.costs["train_samples"] += answered
                self.progress.advance(answered)
            self.midway.leave()
        self._clock()

    def _learn(self, experience: Experience) -> None:
        visits = 0 if experience.train is None else len(experience.train) * self.scenario.epochs
        count = len(self.stream.experiences)
        self.progress.start(f"experience {experience.index + 1}/{count}", visits)
        self.experience = experience
        machine.synchronise(self.device)
        self.began, self.evaluating = time.perf_counter(), 0.0
        rng = machine.isolated_rng(self.conditions.seed, f"learn {experience.index}")
        with rng, self.passes.counting(True):
            self.strategy.learn(experience)
            self.midway.leave()
        self._clock()

    def _clock(self) -> None:
        """Counts the seconds since the last time as training."""
        machine.synchronise(self.device)
        now = time.perf_counter()
        self.costs["train_seconds"] += now - self.began - self.evaluating
        self.began, self.evaluating = now, 0.0

    def _score(self, experience: Experience) -> None:
        """A new row of every matrix."""
        if not self.stream.tests:
            self.progress.finish("answered")
            return
        began = time.perf_counter()
        everything = self.scenario.setting != Setting.CLASS_INCREMENTAL
        upto = len(self.stream.tests) if everything else experience.index + 1
        scores = self._scores(upto)
        if self.online:
            self.online.snapshot()
        if self.retention:
            with self._scoring():
                self.retention.measure(self.strategy.predict)
        unknown = [None] * (len(self.stream.tests) - upto)
        _require_finite(scores)
        for name, matrix in self._matrices(scores).items():
            matrix.append([*scores[name], *unknown])
        self.costs["evaluate_seconds"] += time.perf_counter() - began
        for name, row in scores.items():
            self.tracker.curve(self.step, points(name, row))
        met = scores["accuracy"][: experience.index + 1]
        summary = f"average accuracy {sum(met) / len(met):.3f} over {len(met)}"
        self.progress.finish(summary)
        if self.folder:
            self.folder.log(f"experience {experience.index + 1}: {summary}")

    def _matrices(self, scores: Mapping[str, Any]) -> Mapping[str, Matrix]:
        """Where the rows of each score go."""
        known = {
            "accuracy": self.result.accuracy_matrix,
            "task_aware_accuracy": self.result.task_aware_accuracy_matrix,
        }
        more = self.result.scores
        return {n: known[n] if n in known else more.setdefault(n, []) for n in scores}

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Whatever happens here costs no training and leaves no trace in random numbers."""
        rng = machine.isolated_rng(self.conditions.seed, "score")
        with torch.inference_mode(), rng, self.passes.counting(False):
            yield

    def _scores(self, upto: int, at_most: int = 0) -> Mapping[str, list[float]]:
        tests = list(self.stream.tests[:upto])
        if at_most:
            tests = [
                t.subset(torch.arange(0, len(t), -(-len(t) // at_most), device=self.device))
                for t in tests
            ]
        # What normalises with the statistics of a batch is scored on batches as they arrive.
        size = self.conditions.evaluate_batch_size
        size = self.scenario.batch_size if self.online else size
        with self._scoring():
            return self.objective.score(
                self.strategy.predict, tests, self.stream.experiences[:upto], size
            )

    def _on_step(self, samples: int) -> None:
        """After every training step: count, show, and evaluate when it is time."""
        if self.midway.replaying:
            return
        self.step += 1
        self.costs["train_samples"] += samples
        self.progress.advance(samples)
        if self.midway.folder is None:
            self.stop.obey()  # waiting longer would save nothing
        every = self.conditions.evaluate_every
        if every and self.step % every == 0:
            began = time.perf_counter()
            scores = self._scores(self.experience.index + 1, self.conditions.evaluate_samples)
            self.result.evaluations.append(
                {
                    "step": self.step,
                    "experience": self.experience.index,
                    "accuracies": scores["accuracy"],
                }
            )
            self.costs["evaluate_seconds"] += time.perf_counter() - began
            self.tracker.curve(self.step, points("anytime_accuracy", scores["accuracy"]))
            self.evaluating += time.perf_counter() - began

    def _watch(self, model: torch.nn.Module) -> None:
        """From here on there is something to lose: signals wait for a safe point, time counts."""
        self.stop.saves = True
        if self.limits.timeout:
            spent = self.elapsed + time.perf_counter() - self.started
            self.stop.limit(self.limits.timeout - spent)
        if self.folder and self.strategy.resumable:
            kept = (e.train for e in self.stream.experiences[:1] if e.train is not None)
            sample = sum(s.source.gather(s.index[:1]).nbytes for s in kept)
            require_space(self.folder.path, model, self.scenario.memory_size * sample)

    def _enter(self, experience: Experience) -> None:
        """An experience begins; within it, perhaps, the run goes on."""
        saved = self.pending if experience.index == (self.pending or {}).get("experience") else None
        self.pending = None
        self.midway.enter(experience.index, saved)
        self.context.proceed = self.midway.proceed

    def _save(self, experience: Experience) -> None:
        last = experience.index + 1 == len(self.stream.experiences)
        if self.folder is None or last or not self.strategy.resumable:
            return
        content = {
            **self._progress(),
            "next": experience.index + 1,
            "strategy": capture(self.strategy),
            "accuracy_matrix": self.result.accuracy_matrix,
            "task_aware_accuracy_matrix": self.result.task_aware_accuracy_matrix,
            "scores": self.result.scores,
            "retention": self.retention.record() if self.retention else None,
        }
        checkpoint.save(self.folder.checkpoint, content)
        checkpoint.discard(self.folder.within)

    def _progress(self) -> dict[str, Any]:
        """What changes with every step, but for the strategy."""
        return {
            "run": self.result.run,
            "environment": self.result.environment,
            "elapsed": self.elapsed + time.perf_counter() - self.started,
            "step": self.step,
            "threads": torch.get_num_threads(),
            "generators": {k: g.get_state() for k, g in self.context.generators.items()},
            "costs": self.costs,
            "online": self.online.state_dict() if self.online else None,
            "evaluations": self.result.evaluations,
        }

    def _within(self) -> dict[str, Any]:
        """All state in the midst of an experience."""
        self._clock()
        return {**self._progress(), "scratch": scratch.capture(self.strategy, self.constants)}

    def _first_step(self) -> None:
        self.constants = scratch.constants(self.strategy)

    def _go_on(self, saved: Mapping[str, Any]) -> None:
        """Puts back what changes with every step."""
        scratch.restore(self.strategy, saved["scratch"])
        self._put_back(saved)
        self.began, self.evaluating = time.perf_counter(), 0.0

    def _put_back(self, saved: Mapping[str, Any]) -> None:
        """`_progress`, but for the generators of the whole machine."""
        self.step = saved["step"]
        self.costs.update(saved["costs"])
        self.result.evaluations = saved["evaluations"]
        if self.online:
            self.online.load_state_dict(saved["online"])
        for key, state in saved["generators"].items():
            purpose, _, kind = key.rpartition("@")
            self.context.generator(purpose, torch.device(kind)).set_state(state.cpu())

    def _resume(self) -> int:
        """Continues an interrupted run; returns the experience to learn next."""
        if self.folder and not self.strategy.resumable:
            self.folder.log("this strategy can't be saved: if interrupted, the run begins anew")
        if self.folder is None or not self.strategy.resumable:
            return 0
        saved = checkpoint.load_for(self.result.run, self.folder.checkpoint, self.device)
        self.pending = checkpoint.load_for(self.result.run, self.folder.within, self.device)
        for found, place in ((saved, self.folder.checkpoint), (self.pending, self.folder.within)):
            if found is None and checkpoint.remains(place):
                self.folder.log(f"the checkpoint in {place.name} is damaged, and not used")
        newest = self.pending or saved
        if newest is not None:
            self._same_machine(newest)
        if saved is None:
            return 0
        self.result.accuracy_matrix = saved["accuracy_matrix"]
        self.result.task_aware_accuracy_matrix = saved["task_aware_accuracy_matrix"]
        self.result.scores = saved["scores"]
        restore(self.strategy, saved["strategy"])
        self._put_back(saved)
        if self.retention:
            self.retention.load_record(saved["retention"])
        self.folder.log(f"resumed after experience {saved['next']}")
        return int(saved["next"])

    def _same_machine(self, saved: Mapping[str, Any]) -> None:
        """As many threads as before, which decide bits; says what else is not as before."""
        assert self.folder
        self.elapsed = saved.get("elapsed", 0.0)
        before, now = saved.get("environment", {}), self.result.environment
        torch.set_num_threads(saved["threads"])
        now["threads"] = saved["threads"]
        changed = [f"{k} {before[k]} -> {now.get(k)}" for k in before if before[k] != now.get(k)]
        if changed:
            self.folder.log(f"resumed on another machine or version: {', '.join(changed)}")

    def _conclude(self, model: torch.nn.Module) -> None:
        """Metrics, what the strategy found out, and the remaining costs."""
        self.result.strategy_facts = dict(self.strategy.facts())
        sizes = self.result.test_sizes
        general = self.retention.record() if self.retention else {}
        baseline = general.get("tests_before", {}).get("accuracy")
        if self.result.accuracy_matrix:
            self.result.metrics = metrics.summary(self.result.accuracy_matrix, sizes, baseline)
        if self.scenario.setting is Setting.INSTRUCTION_TUNING:
            self.result.general = general
            self.result.metrics |= metrics.instruction_summary(
                self.result.accuracy_matrix, self.result.scores, general
            )
        if self.result.task_aware_accuracy_matrix:
            self.result.task_aware_metrics = metrics.summary(
                self.result.task_aware_accuracy_matrix, sizes
            )
        if self.result.evaluations:
            self.result.metrics |= metrics.anytime_summary(self.result.evaluations, len(sizes))
        if self.online:
            self.result.online = self.online.record()
            self.result.metrics |= online.metrics(self.result.online)
            self.costs |= self.online.costs(self.costs["train_seconds"])
        _require_finite({**self.result.metrics, **self.result.task_aware_metrics})
        self.result.costs = {
            **self.costs,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory_samples": self._kept(),
            "peak_memory_bytes": machine.peak_memory(self.device),
        }

    def _kept(self) -> int:
        """Samples of the stream that the strategy could go back to at the end."""
        if not self.strategy.revisits:
            return self.strategy.memory_samples
        return sum(len(e.train) for e in self.stream.experiences if e.train is not None)


def _require_finite(numbers: Mapping[str, Any]) -> None:
    """A score or metric that is no number ends the run, before it is averaged with others."""
    for name, found in numbers.items():
        for value in found if isinstance(found, list) else [found]:
            if value is not None and not math.isfinite(value):
                raise Diverged(f"{name} is {value}")
