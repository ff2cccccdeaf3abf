"""The loop: who sees what, when it is scored, and what is written down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from clbench import metrics
from clbench.conditions import Conditions, Names, identify
from clbench.config import options
from clbench.errors import Diverged, UserError
from clbench.progress import Silent
from clbench.protocol import run
from clbench.results import Result, RunFolder
from clbench.samples import Batch
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy, Wrapper
from clbench.types import (
    CLASSIFICATION,
    Context,
    Experience,
    Scenario,
    Setting,
    Split,
    Strategy,
)

TOY = ToyScenario(per_class=10, epochs=2, noise=20.0)
CPU = Conditions(device="cpu", threads=1)


@dataclass(kw_only=True)
class Domains(ToyScenario):
    """The toy stream, every domain of which is scored from the beginning."""

    setting: ClassVar[Setting] = Setting.DOMAIN_INCREMENTAL


@dataclass(kw_only=True)
class Watching(Strategy):
    """Learns nothing, always answers class 0, and notes all that it is shown."""

    settings: ClassVar[frozenset[Setting]] = CLASSIFICATION

    def setup(self, model: nn.Module, context: Context) -> None:  # noqa: ARG002
        self._seen: list[Any] = []
        self.context = context

    def learn(self, experience: Experience) -> None:
        self._seen.append(("learn", experience, list(self.context.seen)))

    def predict(self, batch: Batch) -> Tensor:
        self._seen.append(("predict", batch, torch.is_inference_mode_enabled()))
        outputs = torch.zeros(len(batch), self.context.n_outputs)
        outputs[:, 0] = 1
        return outputs

    def noted(self, kind: str) -> list[tuple[Any, Any]]:
        return [(a, b) for name, a, b in self._seen if name == kind]


class Revisiting(Watching):
    """May go back."""

    revisits: ClassVar[bool] = True


class Learner(GradientStrategy):
    """Plain fine-tuning."""


class Around(Wrapper):
    """Changes nothing."""


class Noisy(GradientStrategy):
    """Draws from the global generator, as dropout does, and from one of its own."""

    def loss(self, batch: Batch) -> Tensor:
        noise = torch.rand(batch.inputs.shape)
        noise += torch.rand(batch.inputs.shape, generator=self.context.generator("noise"))
        outputs = self.forward(batch.inputs + 0.1 * noise)
        return self.context.objective.loss(outputs, batch.targets)


def numbers(result: Result) -> dict[str, Any]:
    """What must not differ between two runs of one configuration."""
    content = json.loads(result.to_json())
    for name in ("train_seconds", "evaluate_seconds", "peak_memory_bytes"):
        del content["costs"][name]
    assert isinstance(content, dict)
    return content


@contextmanager
def folder(path: Path) -> Iterator[RunFolder]:
    where = RunFolder(path, "run")
    with where.claim():
        yield where


# What is scored.


def test_only_experiences_that_were_met_are_scored() -> None:
    result = run(TOY, Learner(), CPU)
    for matrix in (result.accuracy_matrix, result.task_aware_accuracy_matrix):
        assert len(matrix) == 3
        for i, row in enumerate(matrix):
            assert [value is None for value in row] == [j > i for j in range(3)]


def test_domains_are_all_scored_from_the_beginning() -> None:
    result = run(Domains(per_class=10, epochs=1), Learner(), CPU)
    assert all(value is not None for row in result.accuracy_matrix for value in row)


def test_the_matrix_of_one_constant_answer() -> None:
    """Class 0 is half of experience 0; task-aware, ties go to the first class of each."""
    result = run(TOY, Watching(), CPU)
    assert result.accuracy_matrix == [[0.5, None, None], [0.5, 0.0, None], [0.5, 0.0, 0.0]]
    assert result.task_aware_accuracy_matrix == [
        *([0.5, None, None], [0.5, 0.5, None], [0.5, 0.5, 0.5]),
    ]
    assert result.test_sizes == [10, 10, 10]
    assert result.metrics == metrics.summary(result.accuracy_matrix, result.test_sizes)
    assert result.metrics["average_accuracy"] == pytest.approx(1 / 6)
    assert result.task_aware_metrics["average_accuracy"] == pytest.approx(0.5)
    assert result.metrics["forgetting"] == 0


def test_everything_that_was_counted_is_written_down() -> None:
    result = run(TOY, Learner(), CPU)
    assert result.costs["train_samples"] == 2 * 60
    weights = 36 * 32 + 32 + 32 * 6 + 6
    assert result.costs["parameters"] == result.costs["trainable_parameters"] == weights
    assert result.costs["forward_flops"] == 2 * (36 * 32 + 32 * 6)
    assert result.costs["memory_samples"] == 0
    assert result.experiences == [e.name for e in TOY.stream(Split.EVALUATE, 0).experiences]
    assert result.scenario_facts["image_shape"] == [1, 6, 6]
    assert result.environment["threads"] == 1
    assert result.run["precision"] == "fp32"


class Finding(Learner):
    """Finds out how often it has learned, and what it was told about the stream."""

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.met: list[int] = []

    def before(self, experience: Experience) -> None:
        self.met.append(experience.index)

    def facts(self) -> dict[str, Any]:
        return {"met": self.met, "batches": self.context.stream_batches}


def test_what_a_strategy_found_out_is_written_down() -> None:
    assert run(TOY, Learner(), CPU).strategy_facts == {}
    found = run(TOY, Finding(), CPU)
    # 20 samples of an experience in batches of 10, two epochs, three experiences.
    assert found.strategy_facts == {"met": [0, 1, 2], "batches": 12}
    assert Result.from_json(found.to_json()) == found
    assert run(TOY, Around(base=Finding()), CPU).strategy_facts == found.strategy_facts
    odd = run(replace(TOY, batch_size=8), Finding(), CPU)
    assert odd.strategy_facts["batches"] == 3 * 2 * 3


# Who sees what.


def test_a_strategy_gets_the_experiences_in_order_and_nothing_of_the_past() -> None:
    strategy = Watching()
    run(TOY, strategy, CPU)
    shown = strategy.noted("learn")
    assert [experience.index for experience, _ in shown] == [0, 1, 2]
    assert all(seen == [] for _, seen in shown)


def test_a_reference_gets_the_past_and_never_the_future() -> None:
    strategy = Revisiting()
    run(TOY, strategy, CPU)
    for experience, seen in strategy.noted("learn"):
        assert [e.index for e in seen] == list(range(experience.index + 1))


def test_predictions_are_made_without_labels_or_gradients() -> None:
    strategy = Watching()
    run(TOY, strategy, CPU)
    batches = strategy.noted("predict")
    assert sum(len(batch) for batch, _ in batches) == 10 + 20 + 30
    for batch, in_inference_mode in batches:
        assert batch.targets.numel() == 0
        assert in_inference_mode


def test_no_test_sample_is_ever_learned() -> None:
    strategy = Watching()
    run(TOY, strategy, CPU)
    trained = {
        row.numpy().tobytes()
        for experience, _ in strategy.noted("learn")
        for row in experience.train.take(torch.arange(len(experience.train))).raw
    }
    tested = {row.numpy().tobytes() for batch, _ in strategy.noted("predict") for row in batch.raw}
    assert len(trained) == 60
    assert not trained & tested


def test_predictions_are_made_in_batches_of_the_size_asked_for() -> None:
    strategy = Watching()
    run(TOY, strategy, replace(CPU, evaluate_batch_size=7))
    assert max(len(batch) for batch, _ in strategy.noted("predict")) == 7
    small = run(TOY, Learner(), replace(CPU, evaluate_batch_size=7))
    assert small.accuracy_matrix == run(TOY, Learner(), CPU).accuracy_matrix


# Evaluations within experiences.


def test_evaluations_come_at_their_steps_and_change_nothing() -> None:
    plain = run(TOY, Noisy(), CPU)
    often = run(TOY, Noisy(), replace(CPU, evaluate_every=3))
    assert often.accuracy_matrix == plain.accuracy_matrix
    assert often.task_aware_accuracy_matrix == plain.task_aware_accuracy_matrix
    assert plain.evaluations == []
    # Two epochs of two batches in each of three experiences are twelve steps.
    assert [e["step"] for e in often.evaluations] == [3, 6, 9, 12]
    assert [e["experience"] for e in often.evaluations] == [0, 1, 2, 2]
    assert [len(e["accuracies"]) for e in often.evaluations] == [1, 2, 3, 3]
    assert often.evaluations[-1]["accuracies"] == often.accuracy_matrix[-1]
    anytime = metrics.anytime_summary(often.evaluations, 3)
    assert anytime
    assert often.metrics == {**plain.metrics, **anytime}


def test_evaluations_change_no_weight() -> None:
    plain, often = Noisy(), Noisy()
    run(TOY, plain, CPU)
    run(TOY, often, replace(CPU, evaluate_every=1, evaluate_samples=3))
    for a, b in zip(plain.model.parameters(), often.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Dreaming(Noisy):
    """Draws from the global generator when it predicts, as dropout left on would."""

    def predict(self, batch: Batch) -> Tensor:
        return super().predict(batch) + torch.rand(1)


def test_numbers_drawn_while_predicting_disturb_nobody() -> None:
    plain, often = Dreaming(), Dreaming()
    state = torch.get_rng_state()
    run(TOY, plain, CPU)
    run(TOY, often, replace(CPU, evaluate_every=1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(plain.model.parameters(), often.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("at_most", "looked_at"), [(1, 1), (3, 3), (4, 4), (7, 5), (10, 10), (99, 10)]
)
def test_evaluations_look_at_no_more_samples_than_asked(at_most: int, looked_at: int) -> None:
    """Evenly spaced: of 10 samples every second makes 5, where at most 7 are asked for."""

    @dataclass(kw_only=True)
    class Counting(GradientStrategy):
        """Notes how many samples it predicts."""

        def setup(self, model: nn.Module, context: Context) -> None:
            super().setup(model, context)
            self._asked: list[int] = []

        def predict(self, batch: Batch) -> Tensor:
            self._asked.append(len(batch))
            return super().predict(batch)

    strategy = Counting()
    conditions = replace(CPU, evaluate_every=4, evaluate_samples=at_most)
    run(TOY, strategy, conditions)
    counts = strategy._asked
    # One evaluation at the end of each experience, just before its row of the matrix.
    assert counts == [n for i in (1, 2, 3) for n in (i * looked_at, i * 10)]


# The same again.


@pytest.mark.parametrize("kind", [Learner, Noisy])
def test_the_same_seed_gives_the_same_numbers(kind: type[GradientStrategy]) -> None:
    torch.manual_seed(1)
    first = run(TOY, kind(), CPU)
    torch.manual_seed(2)
    assert numbers(run(TOY, kind(), CPU)) == numbers(first)


def test_another_seed_gives_another_class_order() -> None:
    orders = {tuple(run(TOY, Watching(), replace(CPU, seed=s)).experiences) for s in range(4)}
    assert len(orders) == 4


def test_the_two_splits_are_different_data() -> None:
    one = run(TOY, Learner(), CPU)
    other = run(TOY, Learner(), replace(CPU, split=Split.TUNE))
    assert one.accuracy_matrix != other.accuracy_matrix
    assert other.run["split"] == "tune"


def test_a_wrapper_that_changes_nothing_changes_no_number() -> None:
    found = run(TOY, Around(base=Noisy()), CPU)
    assert found.accuracy_matrix == run(TOY, Noisy(), CPU).accuracy_matrix


def test_bf16_runs_and_is_written_down() -> None:
    """The rounding may move an accuracy, but not undo what was learned."""
    result = run(TOY, Learner(), replace(CPU, precision="bf16"))
    assert result.status == "complete"
    assert result.run["precision"] == "bf16"
    assert result.run["run_id"] != run(TOY, Learner(), CPU).run["run_id"]
    learned = [row[i] for i, row in enumerate(result.accuracy_matrix)]
    assert all(value is not None and value > 0.5 for value in learned)


# Ends.


class Crashing(GradientStrategy):
    """Crashes in the second experience."""

    def before(self, experience: Experience) -> None:
        if experience.index == 1:
            raise ZeroDivisionError("a mistake")


class Refusing(GradientStrategy):
    """Finds out in the second experience that it can't go on."""

    def before(self, experience: Experience) -> None:
        if experience.index == 1:
            raise UserError("choose something else")


class Diverging(GradientStrategy):
    """Its loss, or its output, stops being a number in the second experience."""

    outputs: ClassVar[bool] = False

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.index = 0

    def before(self, experience: Experience) -> None:
        self.index = experience.index

    def loss(self, batch: Batch) -> Tensor:
        bad = self.index == 1 and not self.outputs
        return super().loss(batch) * (torch.inf if bad else 1)

    def predict(self, batch: Batch) -> Tensor:
        bad = self.index == 1 and self.outputs
        return super().predict(batch) * (torch.nan if bad else 1)


class DivergingOutputs(Diverging):
    """Outputs that are no numbers."""

    outputs: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Diverging, "training loss"), (DivergingOutputs, "output of the model is not finite")],
)
def test_a_diverged_run_has_a_reason_and_no_metrics(
    kind: type[Diverging], reason: str, tmp_path: Path
) -> None:
    with folder(tmp_path) as where:
        result = run(TOY, kind(), CPU, folder=where)
    assert result.status == "diverged"
    assert reason in str(result.reason)
    assert result.metrics == {}
    assert len(result.accuracy_matrix) == 1
    assert result.costs["train_samples"] == 80
    assert where.result() == result
    assert not where.checkpoint.exists()
    assert issubclass(Diverged, Exception)


def test_a_crash_is_written_down_and_goes_on_upwards(tmp_path: Path) -> None:
    with folder(tmp_path) as where, pytest.raises(ZeroDivisionError):
        run(TOY, Crashing(), CPU, folder=where)
    result = where.result()
    assert result is not None
    assert result.status == "failed"
    assert result.reason == "ZeroDivisionError: a mistake"
    assert result.metrics == {}
    assert 'raise ZeroDivisionError("a mistake")' in (where.path / "log.txt").read_text()


def test_a_mistake_goes_upwards_and_is_no_result(tmp_path: Path) -> None:
    with folder(tmp_path) as where, pytest.raises(UserError, match="choose something else"):
        run(TOY, Refusing(), CPU, folder=where)
    assert where.result() is None


def test_an_impossible_pair_is_refused_before_anything_is_loaded() -> None:
    class Unloadable(ToyScenario):
        """Can't be loaded, so nobody may try."""

        setting: ClassVar[Setting] = Setting.INSTRUCTION_TUNING

        def images(self, split: Split) -> Any:
            raise AssertionError(split)

    with pytest.raises(UserError, match="Learner does not work in the instruction_tuning setting"):
        run(Unloadable(), Learner(), CPU)


class StopAt(Silent):
    """Interrupts when an experience begins."""

    def __init__(self, experience: int) -> None:
        self.left = experience

    def start(self, name: str, samples: int) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_run_goes_on_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    conditions = replace(CPU, evaluate_every=3)
    whole = run(TOY, Noisy(), conditions)
    with folder(tmp_path) as where, pytest.raises(KeyboardInterrupt):
        run(TOY, Noisy(), conditions, folder=where, progress=StopAt(stop))
    assert where.result() is None
    with folder(tmp_path) as where:
        rest = run(TOY, Noisy(), conditions, folder=where)
    assert numbers(rest) == numbers(whole)
    assert f"resumed after experience {stop}" in (where.path / "log.txt").read_text()
    assert not where.checkpoint.exists()


def test_a_resumed_run_keeps_its_thread_count(tmp_path: Path) -> None:
    """Another count would give other bits."""
    threads: list[int] = []

    class Counting(Learner):
        """Notes with how many threads it learns."""

        def before(self, experience: Experience) -> None:  # noqa: ARG002
            threads.append(torch.get_num_threads())

    with folder(tmp_path) as where, pytest.raises(KeyboardInterrupt):
        run(TOY, Counting(), replace(CPU, threads=2), folder=where, progress=StopAt(1))
    before = torch.get_num_threads()
    with folder(tmp_path) as where:
        result = run(TOY, Counting(), replace(CPU, threads=1), folder=where)
    assert threads == [2, 2, 2]
    assert result.environment["threads"] == 2
    assert torch.get_num_threads() == before


def test_a_damaged_checkpoint_means_from_the_beginning(tmp_path: Path) -> None:
    with folder(tmp_path) as where, pytest.raises(KeyboardInterrupt):
        run(TOY, Noisy(), CPU, folder=where, progress=StopAt(2))
    (file,) = where.checkpoint.glob("*.pt")
    file.write_bytes(file.read_bytes()[:-1])
    with folder(tmp_path) as where:
        result = run(TOY, Noisy(), CPU, folder=where)
    assert numbers(result) == numbers(run(TOY, Noisy(), CPU))
    assert "resumed" not in (where.path / "log.txt").read_text()


def test_progress_is_told_everything() -> None:
    class Telling(Silent):
        """Notes what it is told."""

        def __init__(self) -> None:
            self.told: list[tuple[str, Any]] = []

        def start(self, name: str, samples: int) -> None:
            self.told.append((name, samples))

        def advance(self, samples: int) -> None:
            self.told.append(("advance", samples))

        def finish(self, summary: str) -> None:
            self.told.append(("finish", summary))

    progress = Telling()
    result = run(TOY, Learner(), CPU, progress=progress)
    starts = [t for t in progress.told if t[0].startswith("experience")]
    assert starts == [(f"experience {i}/3", 40) for i in (1, 2, 3)]
    visited = [samples for kind, samples in progress.told if kind == "advance"]
    assert sum(visited) == result.costs["train_samples"]
    finishes = [text for kind, text in progress.told if kind == "finish"]
    average = result.metrics["average_accuracy"]
    assert finishes[-1] == f"average accuracy {average:.3f} over 3"


# Names.


def test_what_is_run_is_written_down() -> None:
    names = Names("toy", "mine", "learner")
    found = identify(TOY, Around(base=Learner(lr=0.5)), CPU, names)
    assert found["run_id"].startswith("toy-mine.learner-")
    assert found["run_id"].endswith("-s0")
    assert (found["scenario"], found["strategy"], found["base"]) == ("toy", "mine", "learner")
    assert found["setting"] == "class_incremental"
    assert found["options"] == {
        "scenario": options(TOY),
        "strategy": options(Around(base=Learner(lr=0.5))),
    }
    assert found["options"]["strategy"]["base"]["lr"] == 0.5
    assert json.loads(json.dumps(found)) == found


def test_without_names_classes_give_them() -> None:
    assert identify(TOY, Learner(), CPU)["run_id"].startswith("toyscenario-learner-")


DECISIVE: list[tuple[Scenario, Strategy, Conditions]] = [
    (TOY, Learner(lr=0.2), CPU),
    (TOY, Noisy(), CPU),
    (TOY, Around(base=Learner()), CPU),
    (replace(TOY, noise=21.0), Learner(), CPU),
    (replace(TOY, memory_size=31), Learner(), CPU),
    (TOY, Learner(), replace(CPU, seed=1)),
    (TOY, Learner(), replace(CPU, split=Split.TUNE)),
    (TOY, Learner(), replace(CPU, precision="bf16")),
]


@pytest.mark.parametrize(("scenario", "strategy", "conditions"), DECISIVE)
def test_what_decides_numbers_decides_the_id(
    scenario: Scenario, strategy: Strategy, conditions: Conditions
) -> None:
    names = Names("toy", "learner")
    usual = identify(TOY, Learner(), CPU, names)["run_id"]
    assert identify(scenario, strategy, conditions, names)["run_id"] != usual


def test_the_device_does_not_decide_the_id() -> None:
    ids = {
        identify(TOY, Learner(), replace(CPU, device=device))["run_id"]
        for device in ("auto", "cpu", "cuda")
    }
    assert len(ids) == 1


def test_the_content_of_the_user_s_files_decides_the_id() -> None:
    class Filed(ToyScenario):
        """Reads a file."""

        content: ClassVar[str] = "one"

        def fingerprint(self) -> dict[str, str]:
            return {"file": self.content}

    one = identify(Filed(), Learner(), CPU)["run_id"]
    Filed.content = "two"
    assert identify(Filed(), Learner(), CPU)["run_id"] != one


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", -1), ("threads", -1), ("evaluate_every", -1)),
        *(("evaluate_samples", 0), ("evaluate_batch_size", 0)),
    ],
)
def test_conditions_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{name}={value} is out of range"):
        Conditions(**{name: value})
