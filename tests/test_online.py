"""What is measured of answers to unlabelled streams."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from clbench.adaptation import Adaptation
from clbench.classification import Images
from clbench.conditions import Conditions
from clbench.corrupted import CorruptedImages
from clbench.errors import Diverged, UserError
from clbench.nn.backbones import ConvNet
from clbench.online import CALIBRATION_BINS, Tally, metrics
from clbench.protocol import run
from clbench.results import Result, RunFolder
from clbench.samples import Batch, TensorSource
from clbench.types import Split

CPU = Conditions(device="cpu")


def logits(confidence: float, answer: int) -> list[float]:
    """Two classes, this softmax confidence for the answer."""
    odds = math.log(confidence / (1 - confidence))
    return [odds, 0.0] if answer == 0 else [0.0, odds]


def test_errors_calibration_and_collapse_by_hand() -> None:
    tally = Tally(n_rows=2, n_outputs=2, device=torch.device("cpu"))
    outputs = torch.tensor([logits(0.9, 0), logits(0.9, 0), logits(0.6, 1), logits(0.7, 1)])
    tally.add(outputs, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1]))
    scores = tally.scores()
    assert scores["error"] == pytest.approx([1 / 3, 0.0])
    # Row 0: two answers of confidence 0.9 of which one is right, one of 0.6 which is.
    expected = 2 / 3 * abs(0.5 - 0.9) + 1 / 3 * abs(1.0 - 0.6)
    assert scores["calibration_error"] == pytest.approx([expected, 0.3], abs=1e-6)
    assert scores["collapse"] == pytest.approx([2 / 3, 1.0])
    assert scores["samples"] == [3, 1]


def test_a_certain_answer_falls_into_the_last_interval() -> None:
    tally = Tally(1, 2, torch.device("cpu"))
    tally.add(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]), torch.tensor([0]))
    assert tally.bins[0, 0].nonzero().flatten().tolist() == [CALIBRATION_BINS - 1]
    assert tally.scores()["calibration_error"] == [0.0]


def test_a_row_without_samples_has_no_scores() -> None:
    scores = Tally(1, 2, torch.device("cpu")).scores()
    assert scores["error"] == [None]
    assert scores["samples"] == [0]


def test_source_forgetting_is_against_the_model_as_it_came() -> None:
    record: dict[str, Any] = {
        "by_domain": {"error": [0.2, None, 0.4], "calibration_error": [], "collapse": [None]},
        "source_model": {"source_accuracy": 0.9},
        "source_accuracy": [0.85, 0.6],
    }
    found = metrics(record)
    assert found["online_error"] == pytest.approx(0.3)
    assert found["source_forgetting"] == pytest.approx(0.3)
    assert found["source_accuracy"] == 0.6
    assert found["collapse"] is None


@dataclass(kw_only=True)
class Patterns(CorruptedImages):
    """Four noisy 8x8 patterns, three corruptions."""

    corruptions: tuple[str, ...] = ("contrast", "brightness", "pixelate")
    backbone: ConvNet
    batch_size: int = 8
    source_epochs: int = 2

    def clean(self) -> Images:
        generator = torch.Generator().manual_seed(0)
        patterns = 255 * torch.rand(4, 1, 8, 8, generator=generator)

        def part(count: int) -> TensorSource:
            targets = torch.arange(4).repeat(count)
            noise = 20 * torch.randn(4 * count, 1, 8, 8, generator=generator)
            return TensorSource((patterns[targets] + noise).clamp(0, 255).byte(), targets)

        return Images(part(20), part(25), list("abcd"), (0.5,), (0.3,))


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Patterns:
    cache = tmp_path_factory.mktemp("cache")
    return Patterns(backbone=ConvNet(widths=(8, 8)), cache_dir=cache)


@dataclass(kw_only=True)
class Watching(Adaptation):
    """Answers class 0 and counts; notes what it is shown."""

    answers: ClassVar[int] = 0

    def prepare(self) -> None:
        self.steps = 0
        self._seen: list[tuple[Batch, int]] = []

    def adapt(self, batch: Batch) -> Tensor:
        self._seen.append((batch, self.steps))
        self.steps += 1
        return self.predict(batch)

    def predict(self, batch: Batch) -> Tensor:
        outputs = torch.zeros(len(batch), self.context.n_outputs)
        outputs[:, self.answers] = 5
        return outputs


def test_an_experience_is_answered_once_without_labels(scenario: Patterns) -> None:
    strategy = Watching()
    result = run(scenario, strategy, CPU)
    batches = [batch for batch, _ in strategy._seen]
    # 100 test images, a fifth to tune on, a fifth of the others held out.
    assert [len(batch) for batch in batches] == [8] * 8 * 3
    assert all(batch.targets.numel() == 0 for batch in batches)
    rows = torch.cat([batch.index for batch in batches])
    assert len(rows.unique()) == len(rows) == 3 * 64
    assert result.online["by_domain"]["samples"] == [64, 64, 64]
    assert result.metrics["online_error"] == pytest.approx(0.75)
    assert result.metrics["collapse"] == 1.0
    assert result.costs["train_samples"] == 192


def test_held_out_images_never_arrive(scenario: Patterns) -> None:
    stream = scenario.stream(Split.EVALUATE, 0)
    arriving = {int(i) for a in stream.arrivals for i in a.samples.index}
    tested = {int(i) for test in stream.tests for i in test.index}
    assert len(tested) == 3 * 16
    assert not arriving & tested


def test_the_splits_share_no_image_and_no_corruption(scenario: Patterns) -> None:
    images = scenario.clean()
    parts = [torch.cat(scenario.positions(images, split)) for split in Split]
    assert len(parts[0]) + len(parts[1]) == 100
    assert not set(parts[0].tolist()) & set(parts[1].tolist())
    assert not set(scenario.chosen(Split.TUNE)) & set(scenario.chosen(Split.EVALUATE))


def test_the_matrix_has_the_frozen_strategy_on_every_domain(scenario: Patterns) -> None:
    result = run(scenario, Watching(), CPU)
    assert result.accuracy_matrix == [[0.25] * 3] * 3
    assert result.metrics["forgetting"] == 0.0
    assert result.online["source_accuracy"] == [0.25] * 4


@pytest.mark.parametrize(
    ("reset", "expected"),
    [
        ("never", list(range(24))),
        ("experience", [*range(8), *range(8), *range(8)]),
        ("batch", [0] * 24),
    ],
)
def test_the_engine_resets_when_the_stream_says_so(
    scenario: Patterns, reset: Any, expected: list[int]
) -> None:
    strategy = Watching()
    run(replace(scenario, reset=reset), strategy, CPU)
    assert [steps for _, steps in strategy._seen] == expected


def test_a_mixed_stream_has_all_domains_in_every_experience(scenario: Patterns) -> None:
    stream = replace(scenario, arrival="mixed").stream(Split.EVALUATE, 0)
    assert [len(a.samples) for a in stream.arrivals] == [64] * 3
    assert all(set(a.domains.tolist()) == {0, 1, 2} for a in stream.arrivals)
    everything = torch.cat([a.samples.index for a in stream.arrivals])
    assert len(everything.unique()) == 192
    assert len({id(test) for test in stream.tests}) == 1
    # Row and domain belong together: a segment of rows is one corruption.
    for arrivals in stream.arrivals:
        assert torch.equal(arrivals.samples.index // 80, arrivals.domains)


def test_a_gradual_domain_shows_every_image_at_every_severity(scenario: Patterns) -> None:
    stream = replace(scenario, arrival="gradual", severity=3).stream(Split.EVALUATE, 0)
    first = stream.arrivals[0].samples.index
    assert len(first) == 5 * 64
    assert (first // 80).split(64)[0].unique().tolist() == [0]
    assert [part.unique().tolist() for part in (first // 80).split(64)] == [[0], [1], [2], [1], [0]]
    assert (stream.tests[0].index // 80).unique().tolist() == [2]


def test_a_repeated_stream_is_tested_once_for_each_domain(scenario: Patterns) -> None:
    stream = replace(scenario, repeats=3).stream(Split.EVALUATE, 0)
    assert [e.name for e in stream.experiences][3:5] == ["contrast (2)", "brightness (2)"]
    assert len(stream.tests) == 9
    assert len({id(test) for test in stream.tests}) == 3
    moved = stream.to(torch.device("cpu"))
    assert len({id(test) for test in moved.tests}) == 3


def test_correlated_labels_come_in_runs(scenario: Patterns) -> None:
    stream = replace(scenario, labels="correlated", delta=0.0).stream(Split.EVALUATE, 0)
    targets = stream.arrivals[0].samples.targets
    assert int((targets[1:] != targets[:-1]).sum()) == 3


def test_without_held_out_images_only_the_answers_count(scenario: Patterns) -> None:
    result = run(replace(scenario, held_out=0.0), Watching(), CPU)
    assert result.online["by_domain"]["samples"] == [80, 80, 80]
    assert result.metrics["online_error"] == pytest.approx(0.75)
    assert result.metrics["source_accuracy"] is None
    assert result.metrics.get("average_accuracy") is None


def test_the_source_model_is_made_once_and_knows_the_clean_images(scenario: Patterns) -> None:
    fresh = replace(scenario, source_epochs=30)
    one, two = (fresh.model(seed, fresh.stream(Split.EVALUATE, seed)) for seed in (0, 1))
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    test = fresh.stream(Split.EVALUATE, 0).source_test
    assert test is not None
    batch = test.take(torch.arange(len(test)))
    with torch.no_grad():
        right = (one(batch.inputs).argmax(1) == batch.targets).double().mean()
    assert right > 0.5  # twice chance


def test_weights_without_a_head_are_refused(scenario: Patterns, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "features.safetensors"
    save_file(ConvNet(widths=(8, 8)).build((1, 8, 8)).state_dict(), file)
    with pytest.raises(UserError, match="load_head=true"):
        run(replace(scenario, backbone=ConvNet(widths=(8, 8), weights=str(file))), Watching(), CPU)


@dataclass(kw_only=True)
class Broken(Watching):
    """Not a number from the second batch on."""

    def predict(self, batch: Batch) -> Tensor:
        return super().predict(batch) * (float("nan") if self.steps > 1 else 1)


def test_an_answer_that_is_no_number_ends_the_run_as_diverged(scenario: Patterns) -> None:
    result = run(scenario, Broken(), CPU)
    assert result.status == "diverged"
    assert "not finite" in str(result.reason)


@dataclass(kw_only=True)
class Floats(Patterns):
    """Stored as floats, one of them no number."""

    def corrupted(self, *arguments: Any) -> Any:
        pixels = super().corrupted(*arguments).astype(np.float32)
        pixels[3] = np.nan
        return pixels


def test_an_input_that_is_no_number_is_refused(scenario: Patterns) -> None:
    broken = Floats(backbone=scenario.backbone, cache_dir=scenario.cache_dir)
    with pytest.raises(UserError, match="not a finite number"):
        run(replace(broken, held_out=0.0), Watching(), CPU)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"corruptions": ("contrastt",)}, "Did you mean 'contrast'"),
        ({"labels": "correlated", "arrival": "mixed"}, "does not go with"),
        ({"severity": 6}, "severity=6"),
    ],
)
def test_options_that_cannot_be_are_refused(
    scenario: Patterns, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        replace(scenario, **options)


def test_more_samples_than_there_are_are_refused(scenario: Patterns) -> None:
    with pytest.raises(UserError, match="64 images"):
        replace(scenario, samples=65).stream(Split.EVALUATE, 0)


def test_fewer_samples_are_balanced_and_always_the_same(scenario: Patterns) -> None:
    fewer = replace(scenario, samples=12)
    one, two = (fewer.stream(Split.EVALUATE, seed) for seed in (0, 1))
    assert one.arrivals[0].samples.targets.bincount().tolist() == [3, 3, 3, 3]
    assert {*one.arrivals[0].samples.index.tolist()} == {*two.arrivals[0].samples.index.tolist()}
    assert one.arrivals[0].samples.index.tolist() != two.arrivals[0].samples.index.tolist()


class Stop(Exception):
    """The process is gone."""


@dataclass(kw_only=True)
class Killed(Watching):
    """Dies in the second experience."""

    dies: ClassVar[bool] = True

    def adapt(self, batch: Batch) -> Tensor:
        if self.dies and self.steps == 10:
            raise Stop
        return super().adapt(batch)


def test_a_killed_run_goes_on_with_what_it_counted(scenario: Patterns, tmp_path: Path) -> None:
    whole = run(scenario, Watching(), CPU)
    folder = RunFolder(tmp_path, "run")
    with pytest.raises(Stop):
        run(scenario, Killed(), CPU, folder=folder)
    folder.result_file.unlink()
    Killed.dies = False
    result: Result = run(scenario, Killed(), CPU, folder=folder)
    assert result.online["by_domain"] == whole.online["by_domain"]
    assert result.online["source_accuracy"] == whole.online["source_accuracy"]
    assert result.accuracy_matrix == whole.accuracy_matrix


def test_every_part_of_a_model_can_be_put_back(scenario: Patterns) -> None:
    class Drifting(Watching):
        def prepare(self) -> None:
            super().prepare()
            self.optimizer = torch.optim.Adam(self.model.parameters(), 0.1)

        def adapt(self, batch: Batch) -> Tensor:
            self.model.train()
            loss = self.forward(batch.inputs).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            torch.rand(1, generator=self.context.generator("noise"))
            return super().adapt(batch)

    strategy = Drifting()
    run(replace(scenario, samples=16), strategy, CPU)
    before = [p.detach().clone() for p in strategy.model.parameters()]
    strategy.reset()
    after = list(strategy.model.parameters())
    fresh = scenario.model(0, scenario.stream(Split.EVALUATE, 0))
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, strategy.model.state_dict()[key]), key
    assert strategy.optimizer.state_dict()["state"] == {}
    assert strategy.steps == 0
    drawn = torch.rand(1, generator=strategy.context.generator("noise"))
    strategy.reset()
    assert torch.equal(drawn, torch.rand(1, generator=strategy.context.generator("noise")))


def test_diverged_is_not_a_user_error() -> None:
    assert not issubclass(Diverged, UserError)
