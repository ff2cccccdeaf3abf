"""The loop: learn an experience, score every experience met so far, save; then the next."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clbench import checkpoint, compiling, features, interruption, machine
from clbench.account import Account
from clbench.conditions import Conditions, Names, identify
from clbench.errors import Diverged, TimedOut, UserError
from clbench.interruption import Stop
from clbench.limits import Limits, no_orphans, out_of_memory, require_space
from clbench.population.companion import present
from clbench.progress import Progress, Silent
from clbench.results import Result, RunFolder
from clbench.saving import Saving
from clbench.scoring import Scoring
from clbench.trackers import Tracker, Untracked, points
from clbench.types import Context, Experience, Scenario, Strategy


def run(
    scenario: Scenario,
    strategy: Strategy,
    conditions: Conditions | None = None,
    *,
    names: Names | None = None,
    tuned: Mapping[str, Any] | None = None,
    folder: RunFolder | None = None,
    progress: Progress | None = None,
    tracker: Tracker | None = None,
    limits: Limits | None = None,
    cache_dir: Path | None = None,
) -> Result:
    """Runs one strategy through one stream.

    Args:
        scenario: The stream, the model and the budget.
        strategy: The method; not set up yet.
        conditions: Seed, split, device, ...; default: seed 0 on the split to evaluate.
        names: Of scenario and strategy, for people.
        tuned: Where the hyper-parameters come from; see `identify`.
        folder: Where checkpoints and the result go; None: nowhere.
        progress: Told how far the run is.
        tracker: Told what there is to show.
        limits: What it may take; default: as long as it takes.
        cache_dir: Where kept features lie, if any are; None: the user's cache folder.

    Returns:
        The result: complete, or diverged, out of memory or timed out, with the reason.

    Raises:
        UserError: If the pair can't work or the disk refuses.
        KeyboardInterrupt, Interrupted: When a signal has stopped it, where it can be continued.
    """
    conditions = conditions or Conditions()
    strategy.check(scenario)
    scenario.check(conditions.split)
    if conditions.cache_features:
        features.check(scenario, strategy)
    if conditions.compile:
        compiling.check(scenario, conditions)
        compiling.check_machine(machine.choose_device(conditions.device))
    result = Result(run=identify(scenario, strategy, conditions, names, tuned))
    tracker, limits = tracker or Untracked(), limits or Limits()
    progress = progress or Silent()
    companion = present()
    companion.check(scenario)
    kept = companion.told(lambda: folder is not None)
    with interruption.watched(kept, companion.agree) as stop:
        seams = folder, progress, tracker, limits, stop, cache_dir
        _attempt(_Loop(scenario, strategy, conditions, result, *seams))
        if folder:
            folder.write_result(result)
            folder.log(f"{result.status}" + (f": {result.reason}" if result.reason else ""))
            if result.status != "timed out":
                checkpoint.discard(folder.within)
                checkpoint.discard(folder.checkpoint)
        tracker.end(result)
        stop.obey_signal()  # too late for this run, but not for those after it
    return result


def _attempt(loop: _Loop) -> None:
    """Runs the loop; what ends it before its end is the result's status and reason.

    Raises:
        Exception: Whatever else a strategy raises, when it is written down.
    """
    result, limits = loop.result, loop.limits
    try:
        with no_orphans():
            loop.run()
        return
    except Diverged as error:
        result.status, result.reason = "diverged", str(error)
    except TimedOut:
        result.status = "timed out"
        result.reason = f"it took longer than timeout={limits.timeout:g} seconds"
        loop.account.costs["timeout"] = limits.timeout
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
    result.costs = dict(loop.account.costs)
    result.metrics, result.task_aware_metrics = {}, {}


@dataclass
class _Loop:
    """The state of one run in progress."""

    scenario: Scenario
    strategy: Strategy
    conditions: Conditions
    result: Result
    folder: RunFolder | None
    progress: Progress
    tracker: Tracker
    limits: Limits
    stop: Stop
    cache_dir: Path | None

    def __post_init__(self) -> None:
        self.device = machine.choose_device(self.conditions.device)
        self.companion = present()
        self.account = Account(self.device, self.companion.clock)

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
        if self.conditions.cache_features:
            with machine.thread_count(threads), machine.deterministic():
                model = self._embed(model)
        self.tracker.begin(self.result)
        with (
            machine.thread_count(threads),
            machine.deterministic(),
            self.account.passes.watch(model),
            self._compiled(model),
        ):
            self._set_up(model)
            start = self.saving.resume()
            self._watch(model)
            for experience in self.stream.experiences[start:]:
                self.experience = experience
                self.saving.enter(experience)
                if self.strategy.revisits:
                    self.context.seen = list(self.stream.experiences[: experience.index + 1])
                if self.scoring.online:
                    self._adapt(experience)
                else:
                    self._learn(experience)
                self._score(experience)
                self.companion.compare(model)
                if experience.index + 1 < len(self.stream.experiences):
                    self.saving.after(experience)
                self.stop.heed()
        self._conclude(model)

    def _describe(self, model: torch.nn.Module) -> int:
        """Facts about stream, model and machine for the record; returns the thread count."""
        arriving = [arrivals.samples for arrivals in self.stream.arrivals[:1]]
        first = self.stream.experiences[0].train or (*arriving, *self.stream.tests)[0]
        sample = first.take(torch.zeros(1, dtype=torch.int64, device=self.device))
        flops = machine.forward_flops(model, sample.inputs)
        work = flops * self.scenario.batch_size / self.companion.processes
        threads = self.companion.told(
            partial(machine.choose_threads, self.conditions.threads, work)
        )
        parameters = sum(p.numel() for p in model.parameters())
        self.account.costs |= {"parameters": parameters, "forward_flops": flops}
        self.result.experiences = [e.name for e in self.stream.experiences]
        self.result.test_sizes = [len(t) for t in self.stream.tests]
        self.result.scenario_facts = {**self.stream.facts, **self.scenario.model_facts(model)}
        environment = machine.environment(self.device, threads)
        self.result.environment = {**environment, "processes": self.companion.processes}
        return threads

    def _embed(self, model: torch.nn.Module) -> torch.nn.Module:
        """Features in place of the images; what making or reading them takes is a cost apart."""
        began = time.perf_counter()
        self.stream, head = features.kept(
            self.scenario, self.stream, model, self.conditions.precision, self.cache_dir
        )
        self.account.costs["feature_seconds"] = time.perf_counter() - began
        return head

    def _compiled(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        if not self.conditions.compile:
            return nullcontext()
        self.account.costs["compile_seconds"] = 0.0
        sizes = compiling.batch_sizes(self.scenario)
        return compiling.compiled(model, sizes, self.account.compile)

    def _set_up(self, model: torch.nn.Module) -> None:
        machine.reset_peak_memory(self.device)
        self.context = Context(
            device=self.device,
            seed=self.conditions.seed,
            scenario=self.scenario,
            objective=self.scenario.objective(),
            transform=self.stream.transform,
            n_outputs=self.stream.n_outputs,
            source=self.stream.source,
            stream_batches=self.stream.batches(self.scenario),
            precision=self.conditions.precision,
            on_step=self._on_step,
            differentiation=self.companion,
        )
        self.scoring = Scoring(
            self.stream, self.strategy, self.context, self.conditions, self.result, self.account
        )
        self.saving = Saving(
            self.strategy,
            self.context,
            self.result,
            self.scoring,
            self.account,
            self.folder,
            self.limits,
            self.stop,
            self.companion,
        )
        self.scoring.look(model)
        with machine.isolated_rng(self.conditions.seed, "setup"):
            self.companion.adopt(model)
            self.strategy.setup(model, self.context)
        if self.scoring.online:
            self.scoring.online.begin()

    def _watch(self, model: torch.nn.Module) -> None:
        """From here on there is something to lose: signals wait for a safe point, time counts."""
        self.stop.saves = True
        if self.limits.timeout:
            self.stop.limit(self.limits.timeout - self.account.elapsed)
        if self.saving.folder:
            kept = (e.train for e in self.stream.experiences[:1] if e.train is not None)
            sample = sum(s.source.gather(s.index[:1]).nbytes for s in kept)
            require_space(self.saving.folder.path, model, self.scenario.memory_size * sample)
        elif self.folder:
            self.folder.log("this strategy can't be saved: if interrupted, the run begins anew")

    def _adapt(self, experience: Experience) -> None:
        """Answers what arrives without labels, and learns from it what the strategy can."""
        assert self.scoring.online
        count = len(self.stream.experiences)
        samples = len(self.stream.arrivals[experience.index].samples)
        self.progress.start(f"experience {experience.index + 1}/{count}", samples)
        self.account.begin()
        rng = machine.isolated_rng(self.conditions.seed, f"adapt {experience.index}")
        with rng, self.account.passes.counting(True):
            for answered in self.scoring.online.meet(experience.index):
                self.account.step += 1
                self.account.costs["train_samples"] += answered
                self.progress.advance(answered)
            self.saving.midway.leave()
        self.account.train()

    def _learn(self, experience: Experience) -> None:
        visits = 0 if experience.train is None else len(experience.train) * self.scenario.epochs
        count = len(self.stream.experiences)
        self.progress.start(f"experience {experience.index + 1}/{count}", visits)
        self.account.begin()
        rng = machine.isolated_rng(self.conditions.seed, f"learn {experience.index}")
        with rng, self.account.passes.counting(True):
            self.strategy.learn(experience)
            self.saving.midway.leave()
        self.account.train()

    def _score(self, experience: Experience) -> None:
        """A new row of every matrix, shown."""
        if not self.stream.tests:
            self.progress.finish("answered")
            return
        scores = self.scoring.measure(experience)
        for name, row in scores.items():
            self.tracker.curve(self.account.step, points(name, row))
        met = scores["accuracy"][: experience.index + 1]
        summary = f"average accuracy {sum(met) / len(met):.3f} over {len(met)}"
        self.progress.finish(summary)
        if self.folder:
            self.folder.log(f"experience {experience.index + 1}: {summary}")

    def _on_step(self, samples: int) -> None:
        """After every training step: count, show, and evaluate when it is time."""
        if self.saving.midway.replaying:
            return
        self.account.step += 1
        self.account.costs["train_samples"] += samples
        self.progress.advance(samples)
        if not self.saving.keeps:
            self.stop.heed()  # waiting longer would save nothing
        every = self.conditions.evaluate_every
        if every and self.account.step % every == 0:
            with self.account.apart():
                accuracies = self.scoring.glance(self.experience)
                self.tracker.curve(self.account.step, points("anytime_accuracy", accuracies))

    def _conclude(self, model: torch.nn.Module) -> None:
        """Metrics, what the strategy found out, and the remaining costs."""
        self.result.strategy_facts = dict(self.strategy.facts())
        self.scoring.conclude()
        self.result.costs = {
            **self.account.costs,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "memory_samples": self._kept(),
            "peak_memory_bytes": machine.peak_memory(self.device),
        }

    def _kept(self) -> int:
        """Samples of the stream that the strategy could go back to at the end."""
        if not self.strategy.revisits:
            return self.strategy.memory_samples
        return sum(len(e.train) for e in self.stream.experiences if e.train is not None)
