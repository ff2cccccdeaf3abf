"""Trackers are told everything, decide nothing, and break nothing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import Command

from clbench import Result, UserError, run, trackers
from clbench.results import RunFolder
from clbench.samples import Batch
from clbench.testing import ToyScenario
from clbench.trackers import Guarded, Tracker, guarded, markdown, numbers, settings
from clbench.training import GradientStrategy
from clbench.types import Experience

TOY = ToyScenario(per_class=10, epochs=2)


class Noisy(GradientStrategy):
    """Draws from the global generator, as dropout does."""

    def loss(self, batch: Batch) -> torch.Tensor:
        outputs = self.forward(batch.inputs + 0.1 * torch.rand(batch.inputs.shape))
        return self.context.objective.loss(outputs, batch.targets)


class Failing(GradientStrategy):
    """Crashes in the second experience."""

    def before(self, experience: Experience) -> None:
        if experience.index == 1:
            raise ZeroDivisionError("a mistake")


class Fake:
    """Notes what it is told, and draws random numbers, which it should better not."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.told = folder, list[tuple[str, Any, Any]]()

    def _note(self, what: str, step: Any, value: Any) -> None:
        torch.rand(1)
        self.told.append((what, step, value))

    def begin(self, result: Result) -> None:
        self._note("begin", None, settings(result))

    def curve(self, step: int, values: Mapping[str, float]) -> None:
        self._note("curve", step, dict(values))

    def end(self, result: Result) -> None:
        files = {path.name for path in trackers.artefacts(self.folder)}
        self._note("end", result.status, files)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    """The trackers that are made from now on under the name "tensorboard"."""
    made: list[Fake] = []

    def make(folder: RunFolder) -> Tracker:
        made.append(Fake(folder))
        return made[-1]

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", make)
    return made


def test_a_tracker_is_told_everything_in_order(fakes: list[Fake], tmp_path: Path) -> None:
    options: dict[str, Any] = {"threads": 1, "evaluate_every": 3, "results_dir": tmp_path}
    found = run(TOY, Noisy(lr=0.05), 2, tracker="tensorboard", **options)
    (fake,) = fakes
    assert [what for what, _, _ in fake.told] == [
        *("begin", "curve", "curve", "curve", "curve", "curve", "curve", "curve", "curve"),
        *("curve", "curve", "end"),
    ]
    asked = fake.told[0][2]
    assert asked["strategy.lr"] == 0.05
    assert asked["seed"] == 2
    assert asked["scenario.backbone.hidden"] == "[32]"
    assert asked["run_id"] == found.run["run_id"]
    rows = [(step, v) for _, step, v in fake.told[1:-1] if "accuracy/mean" in v]
    assert [step for step, _ in rows] == [4, 8, 12]
    for (_, values), row in zip(rows, found.accuracy_matrix, strict=True):
        known = [value for value in row if value is not None]
        assert values == {
            **{f"accuracy/experience_{i + 1}": value for i, value in enumerate(known)},
            "accuracy/mean": pytest.approx(sum(known) / len(known)),
        }
    anytime = [(s, v) for _, s, v in fake.told[1:-1] if "anytime_accuracy/mean" in v]
    assert [step for step, _ in anytime] == [e["step"] for e in found.evaluations]
    assert fake.told[-1][1:] == ("complete", {"result.json", "config.yaml", "log.txt"})


def test_a_tracker_changes_no_number(fakes: list[Fake], tmp_path: Path) -> None:
    options: dict[str, Any] = {"threads": 1, "evaluate_every": 1}
    plain = run(TOY, Noisy(), **options)
    tracked = run(TOY, Noisy(), tracker="tensorboard", results_dir=tmp_path, **options)
    assert fakes
    assert tracked.accuracy_matrix == plain.accuracy_matrix
    assert tracked.evaluations == plain.evaluations
    assert tracked.run["run_id"] == plain.run["run_id"]


def test_a_crash_is_told_too(fakes: list[Fake], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(TOY, Failing(), threads=1, tracker="tensorboard", results_dir=tmp_path)
    assert fakes[0].told[-1][:2] == ("end", "failed")


@pytest.mark.parametrize("moment", ["make", "begin", "curve", "end"])
@pytest.mark.parametrize("error", [OSError("no such host"), SystemExit(1)])
def test_a_tracker_that_fails_fails_no_run(
    moment: str,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[str] = []

    class Broken(Fake):
        """Fails at one moment."""

        def __init__(self, folder: RunFolder) -> None:
            self._note("make", None, None)
            super().__init__(folder)

        def _note(self, what: str, step: Any, value: Any) -> None:  # noqa: ARG002
            calls.append(what)
            if what == moment:
                raise error

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    with caplog.at_level(logging.WARNING):
        found = run(TOY, Noisy(), threads=1, tracker="tensorboard", results_dir=tmp_path)
    assert found.status == "complete"
    assert calls[-1] == moment, "after its failure it is left alone"
    (folder,) = (tmp_path / "runs").iterdir()
    for log in (caplog.text, (folder / "log.txt").read_text()):
        assert log.count("the tracker failed") == 1
        assert f"{type(error).__name__}: {error}" in log


def test_an_interrupt_is_no_failure_of_the_tracker(tmp_path: Path) -> None:
    class Interrupted(Fake):
        """The user presses Ctrl-C while it works."""

        def begin(self, result: Result) -> None:  # noqa: ARG002
            raise KeyboardInterrupt

    folder = RunFolder(tmp_path, "run")
    with pytest.raises(KeyboardInterrupt):
        Guarded(lambda: Interrupted(folder), folder.log).begin(Result(run={}))


def test_a_package_that_is_missing_is_a_mistake_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(UserError, match=r"needs the package wandb.*pip install 'clbench\[wandb\]'"):
        run(TOY, Noisy(), tracker="wandb", results_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_tracker_is_a_mistake(tmp_path: Path, command: Command) -> None:
    done = command("tracker=tensorbord", "strategy=finetune")
    assert done.returncode == 2
    assert "tracker='tensorbord' has the wrong type or value" in done.stderr
    with pytest.raises(UserError, match="give results_dir too"):
        run(TOY, Noisy(), tracker="tensorboard")
    with pytest.raises(UserError, match="tracker='tensorbord' has the wrong type or value"):
        run(TOY, Noisy(), tracker="tensorbord", results_dir=tmp_path)  # type: ignore[arg-type]


def test_nothing_is_imported_unless_it_is_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    assert isinstance(guarded("none", folder), trackers.Untracked)


def test_the_matrix_as_text() -> None:
    result = Result(run={}, experiences=["a", "b|c"], accuracy_matrix=[[1.0, None], [0.25, 0.5]])
    assert markdown(result).splitlines() == [
        "| learned | a | b\\|c |",
        "|---|---|---|",
        "| a | 100.0 |  |",
        "| b\\|c | 25.0 | 50.0 |",
    ]
    assert numbers(Result(run={}, metrics={"x": None, "y": 1.0})) == {"y": 1.0}


# The real ones, offline.

QUICK = ("strategy=finetune", "scenario.epochs=1", "backbone.hidden=[8]", "threads=1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_configuration_curves_and_matrix(work: Path, command: Command) -> None:
    pytest.importorskip("tensorboard")
    accumulators: Any = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    )

    done = command(*QUICK, "tracker=tensorboard")
    assert done.returncode == 0, done.stderr
    assert "tracker failed" not in done.stderr
    (folder,) = (work / "results" / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    events = accumulators.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for i in range(5):
        shown = [e.value for e in events.Scalars(f"accuracy/experience_{i + 1}")]
        assert shown == pytest.approx([row[i] for row in result["accuracy_matrix"][i:]])
    final = events.Scalars("final/average_accuracy")[0].value
    assert final == pytest.approx(result["metrics"]["average_accuracy"])

    def text(tag: str) -> str:
        (event,) = events.Tensors(f"{tag}/text_summary")
        return str(event.tensor_proto.string_val[0].decode())

    assert "| strategy.lr | 0.1 |" in text("configuration")
    assert text("accuracy_matrix").count("\n") == 6
    assert text("status").startswith("complete")


@pytest.mark.slow
def test_weights_and_biases_keeps_a_run_offline(
    work: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    done = command(*QUICK, "tracker=wandb")
    assert done.returncode == 0, done.stderr
    (folder,) = (work / "results" / "runs").iterdir()
    assert "tracker failed" not in (folder / "log.txt").read_text()
    (kept,) = (folder / "wandb").glob("offline-run-*")
    (data,) = kept.glob("*.wandb")
    content = data.read_bytes()
    for word in (b"accuracy/experience_5", b"strategy.lr", b"accuracy_matrix", b"result.json"):
        assert word in content, word


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_a_run_in_its_database(
    work: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking: Any = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for arguments in (QUICK, (*QUICK, "force=true")):
        done = command(*arguments, "tracker=mlflow")
        assert done.returncode == 0, done.stderr
    (folder,) = (work / "results" / "runs").iterdir()
    assert "tracker failed" not in (folder / "log.txt").read_text()
    result = json.loads((folder / "result.json").read_text())
    client = tracking.MlflowClient(f"sqlite:///{work / 'results' / 'mlflow.db'}")
    (one,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert one.info.status == "FINISHED"
    assert one.data.params["strategy.lr"] == "0.1"
    final = one.data.metrics["final/average_accuracy"]
    assert final == pytest.approx(result["metrics"]["average_accuracy"])
    history = client.get_metric_history(one.info.run_id, "accuracy/experience_1")
    assert len(history) == 2 * 5
    listed = {file.path for file in client.list_artifacts(one.info.run_id)}
    assert listed == {"result.json", "config.yaml", "log.txt", "accuracy_matrix.md"}


def test_every_name_has_a_tracker_and_an_extra() -> None:
    from typing import get_args

    from clbench import userspace

    text = (userspace.suite() / "pyproject.toml").read_text()
    names = set(get_args(trackers.Name)) - {"none"}
    assert names == set(trackers.TRACKERS)
    for name in names:
        assert f"\n{name} = [" in text, name
