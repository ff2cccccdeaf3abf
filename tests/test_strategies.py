"""Every strategy of the suite against every check; and every check against a broken strategy."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from omegaconf import OmegaConf
from suite import composed, configured
from torch import Tensor, nn
from torch.nn import functional as F

from clbench import userspace
from clbench.adaptation import Adaptation
from clbench.config import build, target_class
from clbench.nn.batch_statistics import affine_parameters, normalise_by_batch, train_only
from clbench.nn.entropy import entropy
from clbench.nn.memory import Memory
from clbench.samples import Batch
from clbench.state import capture
from clbench.testing import (
    CHECKS,
    Check,
    ToyDrift,
    ToyScenario,
    check_strategy,
    checks_for,
    kinds_for,
    run_check,
    toy_for,
)
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario, Setting, Split, Strategy

TEXT = frozenset({Setting.INSTRUCTION_TUNING})
BY_NAME: dict[str, Check] = {check.__name__: check for check in CHECKS}


def applicable(name: str) -> Sequence[tuple[Check, frozenset[Setting]]]:
    """The checks about a strategy's settings; all, where its class can't even be imported."""
    tree = OmegaConf.load(userspace.configuration() / "strategy" / f"{name}.yaml")
    try:
        kind = target_class({"_target_": tree._target_}, Strategy, name)
    except Exception:  # what is wrong is told by each of its tests, not by those of all strategies
        return tuple(CHECKS.items())
    return [(check, settings) for check in checks_for(kind) for settings in kinds_for(check, kind)]


@pytest.mark.parametrize(
    ("name", "check", "settings"),
    [
        pytest.param(
            name, check, settings, id=f"{name}-{check.__name__}" + "-text" * (settings == TEXT)
        )
        for name in configured("strategy")
        for check, settings in applicable(name)
    ],
)
def test_conformance(name: str, check: Check, settings: frozenset[Setting]) -> None:
    if settings == TEXT:
        pytest.importorskip("transformers", reason="the extra `text` is not installed")
    strategy = suite_strategy(name)
    run_check(check, strategy, toy_for(strategy, settings))


@cache
def suite_strategy(name: str) -> Strategy:
    return build(composed(f"strategy={name}")["strategy"], Strategy, "strategy")


@pytest.mark.parametrize("name", configured("strategy"))
def test_expected_failures_are_of_checks_that_exist_and_give_a_reason(name: str) -> None:
    strategy = suite_strategy(name)
    assert strategy.expected_failures.keys() <= BY_NAME.keys()
    assert all(len(reason.split()) > 3 for reason in strategy.expected_failures.values())


# Each check must be able to fail: strategies with one fault each.


@dataclass(kw_only=True)
class Sound(GradientStrategy):
    """Replay without a fault; the broken ones differ from it in one place.

    **Differs from the paper:** there is none.
    """

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.memory = Memory(self.room(context.scenario.memory_size), context)

    def room(self, size: int) -> int:
        return size

    def loss(self, batch: Batch) -> Tensor:
        if not len(self.memory):
            return super().loss(batch)
        recalled = self.memory.draw(self.context.memory_batch_size)
        outputs = self.forward(torch.cat((batch.inputs, recalled.inputs)))
        targets = torch.cat((batch.targets, recalled.targets))
        return self.context.objective.loss(outputs, targets)

    def observe(self, batch: Batch) -> None:
        self.memory.add(batch)

    @property
    def memory_samples(self) -> int:
        return len(self.memory)


ENTROPY = itertools.count()


class OtherNumbersEveryTime(Sound):
    """Draws from a generator that nobody seeds. **Differs from the paper:** no paper."""

    def before(self, experience: Experience) -> None:
        super().before(experience)
        unseeded = torch.Generator().manual_seed(next(ENTROPY))
        for parameter in self.model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=unseeded))


class SameNumbersForEverySeed(Sound):
    """Starts all runs alike and learns nothing. **Differs from the paper:** no paper."""

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)

    def update(self, loss: Tensor) -> None:
        pass


class CountsPredictions(Sound):
    """State that changes when it predicts. **Differs from the paper:** no paper."""

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.predictions = 0

    def predict(self, batch: Batch) -> Tensor:
        self.predictions += 1
        return super().predict(batch)


class PredictsInTrainingMode(Sound):
    """Batch statistics move when it predicts. **Differs from the paper:** no paper."""

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(nn.Sequential(nn.BatchNorm2d(1), model), context)

    def predict(self, batch: Batch) -> Tensor:
        self.model.train()
        outputs = self.forward(batch.inputs)
        self.model.eval()
        return outputs


class DrawsWhenItPredicts(Sound):
    """Uses up random numbers of training. **Differs from the paper:** no paper."""

    def predict(self, batch: Batch) -> Tensor:
        torch.rand(1, generator=self.context.generator("shuffle"))
        return super().predict(batch)


class DrawsGlobally(Sound):
    """Takes numbers from everybody's generator. **Differs from the paper:** no paper."""

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        torch.rand(1)


class LeavesGradientsOff(Sound):
    """Switches off gradients for everybody. **Differs from the paper:** no paper."""

    def learn(self, experience: Experience) -> None:
        with torch.enable_grad():
            super().learn(experience)
        torch.set_grad_enabled(False)


class KeepsOneTooMany(Sound):
    """Its memory is larger than the budget. **Differs from the paper:** no paper."""

    def room(self, size: int) -> int:
        return size + 1 if size else 0


class OneOutputTooMany(Sound):
    """An output that is no class. **Differs from the paper:** no paper."""

    def predict(self, batch: Batch) -> Tensor:
        return nn.functional.pad(super().predict(batch), (0, 1))


class AlwaysTheSameAnswer(Sound):
    """Learns but does not say so. **Differs from the paper:** no paper."""

    def predict(self, batch: Batch) -> Tensor:
        return torch.zeros_like(super().predict(batch))


class ForgetsItsMemory(Sound):
    """Keeps under an underscore what it needs. **Differs from the paper:** no paper."""

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self._memory = self.memory
        del self.memory

    def __getattr__(self, name: str) -> Memory:
        if name == "memory" and "_memory" in vars(self):
            kept = vars(self)["_memory"]
            assert isinstance(kept, Memory)
            return kept
        raise AttributeError(name)


class Hidden:
    """What nobody can save."""

    steps = 0


class HidesItsSteps(Sound):
    """Counts them where no state tells. **Differs from the paper:** no paper."""

    def before(self, experience: Experience) -> None:  # noqa: ARG002
        self._hidden = Hidden()

    def loss(self, batch: Batch) -> Tensor:
        self._hidden.steps += 1
        return super().loss(batch) / self._hidden.steps


class NeedsASecondExperience(Sound):
    """Divides by the classes still to come. **Differs from the paper:** no paper."""

    def before(self, experience: Experience) -> None:
        assert 1 / (self.context.n_outputs - len(experience.classes)) > 0


class NeedsTwoSamples(Sound):
    """The deviation of one sample is no number. **Differs from the paper:** no paper."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + 0 * batch.inputs.std(0).sum()


class NeedsLabels(Sound):
    """Looks at samples that are not there. **Differs from the paper:** no paper."""

    def learn(self, experience: Experience) -> None:
        assert experience.train is not None
        super().learn(experience)


class KeepsOneWithoutBudget(Sound):
    """Takes no memory for an oversight. **Differs from the paper:** no paper."""

    def room(self, size: int) -> int:
        return max(size, 1)


@dataclass(kw_only=True)
class ChangesItsOptions(Sound):
    """Its options are not what was configured. **Differs from the paper:** no paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight_decay += 0.001


class TrainsWhatItKeeps(Sound):
    """Says that it leaves features as they are. **Differs from the paper:** no paper."""

    @property
    def keeps_features(self) -> bool:
        return True


class SaysNothing(Sound):
    """Replay, perhaps; who knows."""


@dataclass(kw_only=True)
class SoundDrift(Adaptation):
    """Entropy minimisation without a fault; the broken ones differ from it in one place.

    **Differs from the paper:** there is none.
    """

    def prepare(self) -> None:
        normalise_by_batch(self.model)
        scales = train_only(self.model, affine_parameters(self.model).values())
        self.descent = torch.optim.SGD(scales, 0.01, momentum=0.9)
        noise = self.context.generator("noise")
        self.average = torch.rand(self.context.n_outputs, generator=noise) / 100

    def adapt(self, batch: Batch) -> Tensor:
        noise = torch.randn(len(batch), generator=self.context.generator("noise"))
        outputs = self.forward(batch.inputs)
        (entropy(outputs) * (1 + noise / 10)).mean().backward()
        self.descent.step()
        self.descent.zero_grad()
        self.average.lerp_(outputs.detach().softmax(1).mean(0), 0.1)
        return outputs - self.average

    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs) - self.average


class LearnsFromQuestions(SoundDrift):
    """Where it hides that, no state tells. **Differs from the paper:** no paper."""

    def prepare(self) -> None:
        super().prepare()
        self._asked = 0

    def adapt(self, batch: Batch) -> Tensor:
        return super().adapt(batch) * (1 + self._asked / 100)

    def predict(self, batch: Batch) -> Tensor:
        self._asked += 1
        return super().predict(batch)


class ScoresInDoubles(SoundDrift):
    """Nobody asked for that precision. **Differs from the paper:** no paper."""

    def adapt(self, batch: Batch) -> Tensor:
        return super().adapt(batch).double()


class ChangesItsBatch(SoundDrift):
    """Saves a copy where it may not. **Differs from the paper:** no paper."""

    def adapt(self, batch: Batch) -> Tensor:
        outputs = super().adapt(batch)
        batch.inputs.mul_(0)
        return outputs


class LooksLabelsUp(SoundDrift):
    """Makes the stream again and finds its batch there. **Differs from the paper:** no paper."""

    def adapt(self, batch: Batch) -> Tensor:
        samples = self.context.scenario.stream(Split.EVALUATE, 0).arrivals[0].samples
        return F.one_hot(samples.source.targets[batch.index], self.context.n_outputs).float()


class KeepsItsAverage(SoundDrift):
    """Resets all but one number. **Differs from the paper:** no paper."""

    def reset(self) -> None:
        kept = self.average
        super().reset()
        self.average = kept


class KeepsItsRandomNumbers(SoundDrift):
    """Goes on where it was. **Differs from the paper:** no paper."""

    def reset(self) -> None:
        kept = self.context.generator("noise").get_state()
        super().reset()
        self.context.generator("noise").set_state(kept)


class NeedsCompany(SoundDrift):
    """The deviation of one sample is no number. **Differs from the paper:** no paper."""

    def adapt(self, batch: Batch) -> Tensor:
        return super().adapt(batch) + 0 * batch.inputs.std(0).sum()


class NeedsTwoClasses(SoundDrift):
    """Refuses a batch of which it says the same. **Differs from the paper:** no paper."""

    def adapt(self, batch: Batch) -> Tensor:
        outputs = super().adapt(batch)
        assert len(batch) == 1 or len(outputs.argmax(1).unique()) > 1
        return outputs


class TakesTheSourceForGranted(SoundDrift):
    """Nobody told it that there may be none. **Differs from the paper:** no paper."""

    def prepare(self) -> None:
        super().prepare()
        self.known = len(self.context.source.targets)  # type: ignore[union-attr]


#: The fault, and every check that must notice it.
FAULTS: Mapping[type[Strategy], set[str]] = {
    OtherNumbersEveryTime: {
        *("same_seed_same_numbers", "resumes_with_the_same_bits", "resumes_within_an_experience"),
    },
    SameNumbersForEverySeed: {"other_seed_other_run", "beats_chance"},
    CountsPredictions: {"predict_leaves_no_trace"},
    PredictsInTrainingMode: {"predict_leaves_no_trace"},
    DrawsWhenItPredicts: {"predict_leaves_no_trace"},
    DrawsGlobally: {"globals_untouched"},
    LeavesGradientsOff: {"globals_untouched"},
    KeepsOneTooMany: {"memory_within_budget"},
    OneOutputTooMany: {"outputs_cover_seen_classes"},
    AlwaysTheSameAnswer: {"beats_chance"},
    ForgetsItsMemory: {"resumes_with_the_same_bits"},
    HidesItsSteps: {"resumes_within_an_experience"},
    NeedsASecondExperience: {"one_experience_works"},
    NeedsTwoSamples: {"last_batch_of_one_works"},
    NeedsLabels: {"no_labels_no_learning"},
    KeepsOneWithoutBudget: {"no_memory_works"},
    ChangesItsOptions: {"options_build_it_again"},
    TrainsWhatItKeeps: {"keeps_features_as_it_says"},
    SaysNothing: {"says_how_it_differs"},
    LearnsFromQuestions: {
        *("predicting_changes_no_answer", "resumes_with_the_same_bits"),
        "resumes_within_an_experience",
    },
    ScoresInDoubles: {"answers_every_sample"},
    ChangesItsBatch: {"answers_every_sample"},
    LooksLabelsUp: {"labels_are_out_of_reach"},
    KeepsItsAverage: {"reset_forgets_everything"},
    KeepsItsRandomNumbers: {"reset_forgets_everything"},
    NeedsCompany: {"batches_of_one_work", "last_batch_of_one_works"},
    NeedsTwoClasses: {"one_class_works"},
    TakesTheSourceForGranted: {"missing_source_is_no_crash"},
}
QUICK = ToyScenario(per_class=10, epochs=3, noise=20.0)
DRIFT = ToyDrift()


def quick(kind: type[Strategy]) -> Scenario:
    return DRIFT if DRIFT.setting in kind.settings else QUICK


@pytest.fixture
def plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the classes of this file look like a file of the user's in strategies/."""
    name = "strategies.with_faults"
    module = ModuleType(name)
    kinds: list[type[Strategy]] = [Sound, SoundDrift, *FAULTS]
    for kind in kinds:
        monkeypatch.setattr(kind, "__module__", name)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("plugged_in")
@pytest.mark.parametrize("kind", [Sound, SoundDrift])
def test_a_sound_strategy_passes(kind: type[Strategy]) -> None:
    check_strategy(kind(), quick(kind))


@pytest.mark.usefixtures("plugged_in")
@pytest.mark.parametrize("kind", FAULTS, ids=[kind.__name__ for kind in FAULTS])
def test_a_fault_is_noticed_by_its_check_and_by_no_other(kind: type[Strategy]) -> None:
    noticed = set()
    for check in checks_for(kind):
        try:
            check(kind(), quick(kind))
        except Exception:
            noticed.add(check.__name__)
        finally:
            torch.set_grad_enabled(True)
    assert noticed == FAULTS[kind]


def test_every_check_has_a_fault_that_it_notices() -> None:
    assert set().union(*FAULTS.values()) == BY_NAME.keys()


def test_a_check_is_run_where_its_setting_is() -> None:
    assert toy_for(Sound()).setting in Sound.settings
    assert isinstance(toy_for(SoundDrift()), ToyDrift)
    with pytest.raises(AssertionError, match=r"no toy scenario works: Sound.* does not work"):
        toy_for(Sound(), SoundDrift.settings)
    assert not set(checks_for(SoundDrift)) >= set(checks_for(Sound))
    assert set(checks_for(Sound)) | set(checks_for(SoundDrift)) == CHECKS.keys()


class Excused(KeepsOneTooMany):
    """**Differs from the paper:** no paper."""

    expected_failures: ClassVar[Mapping[str, str]] = {"memory_within_budget": "on purpose"}


class Mended(Sound):
    """**Differs from the paper:** no paper."""

    expected_failures: ClassVar[Mapping[str, str]] = {"memory_within_budget": "it was so once"}


class ExcusedCrash(NeedsASecondExperience):
    """**Differs from the paper:** no paper."""

    expected_failures: ClassVar[Mapping[str, str]] = {"one_experience_works": "divides by zero"}


@pytest.mark.parametrize("kind", [Excused, ExcusedCrash])
def test_a_declared_failure_is_accepted(kind: type[Sound]) -> None:
    for name in kind.expected_failures:
        run_check(BY_NAME[name], kind(), QUICK)


def test_a_declared_failure_that_passes_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"memory_within_budget passes.*it was so once"):
        run_check(BY_NAME["memory_within_budget"], Mended(), QUICK)


def test_checks_leave_the_strategy_as_it_was() -> None:
    strategy = Sound()
    before = dict(vars(strategy))
    check_strategy(strategy, QUICK)
    assert vars(strategy) == before
    assert capture(strategy) == {}
