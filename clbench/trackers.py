"""What other programs show of a run: TensorBoard, Weights & Biases, MLflow. Off by default.

A tracker gets copies; the run folder stays the record, and nothing is read back. Whatever goes
wrong in a tracker is a warning in the log, and the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from clbench.errors import UserError
from clbench.machine import isolated_rng
from clbench.results import Matrix, Result, RunFolder, flat

Name = Literal["none", "tensorboard", "wandb", "mlflow"]

_log = logging.getLogger(__name__)

#: Files of a run folder that are worth a copy.
_ARTEFACTS = ("result.json", "config.yaml", "log.txt")
_PROJECT = "clbench"


class Tracker(Protocol):
    """Told by the loop what there is to show."""

    def begin(self, result: Result) -> None:
        """A run begins, perhaps again: its configuration, its data, its machine are known."""

    def curve(self, step: int, values: Mapping[str, float]) -> None:
        """New points of some curves, after so many training steps."""

    def end(self, result: Result) -> None:
        """The run has ended, well or not; its folder has everything."""


class Untracked:
    """Shows nothing."""

    def begin(self, result: Result) -> None:
        """See `Tracker`."""

    def curve(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""

    def end(self, result: Result) -> None:
        """See `Tracker`."""


class Guarded:
    """A tracker that can't harm a run: its first failure is its last word.

    Args:
        make: Makes the tracker, when the run begins.
        say: Where the warning goes, besides Python's log.
    """

    def __init__(self, make: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self._make, self._say = make, say
        self._tracker: Tracker | None = None

    def begin(self, result: Result) -> None:
        """See `Tracker`."""

        def begin() -> None:
            self._tracker = self._make()
            self._tracker.begin(result)

        self._try("begin", begin)

    def curve(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        if self._tracker is not None:
            tracker = self._tracker
            self._try("curve", lambda: tracker.curve(step, values))

    def end(self, result: Result) -> None:
        """See `Tracker`."""
        if self._tracker is not None:
            tracker = self._tracker
            self._try("end", lambda: tracker.end(result))

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            with isolated_rng(0, "tracker"):  # it may be called in the midst of training
                action()
        except (Exception, SystemExit) as error:  # a library may even want to leave
            self._tracker = None
            text = f"the tracker failed ({what}: {type(error).__name__}: {error}); the run goes on"
            _log.warning("%s", text)
            self._say(text)


def guarded(name: Name, folder: RunFolder) -> Tracker:
    """The tracker of a run.

    Args:
        name: Which one.
        folder: Of the run.

    Raises:
        UserError: If its package is not installed.
    """
    if name == "none":
        return Untracked()
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"tracker={name} needs the package {name}, which is not installed: "
            f"pip install 'clbench[{name}]', or set tracker=none."
        )
    return Guarded(lambda: TRACKERS[name](folder), folder.log)


class TensorBoard:
    """Curves, the matrix and the options as TensorBoard shows them.

    `tensorboard --logdir results/runs` shows all runs; the files are in the folder of each.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder.path / "tensorboard"))

    def begin(self, result: Result) -> None:
        """See `Tracker`."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings(result).items())
        self.writer.add_text("configuration", f"| option | value |\n|---|---|\n{rows}")

    def curve(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def end(self, result: Result) -> None:
        """See `Tracker`."""
        self.writer.add_text("accuracy_matrix", markdown(result))
        self.writer.add_text("status", f"{result.status} {result.reason or ''}")
        options = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in settings(result).items()
        }
        found = {f"final/{name}": value for name, value in numbers(result).items()}
        self.writer.add_hparams(options, found, run_name=".")
        self.writer.close()


class WandB:
    """A run of Weights & Biases; offline unless the environment has WANDB_MODE=online.

    `wandb sync results/runs/*/wandb/offline-run-*` sends what was kept offline. The project is
    that of WANDB_PROJECT, or "clbench".

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def begin(self, result: Result) -> None:
        """See `Tracker`."""
        import wandb

        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=result.run["run_id"],
            name=result.run["run_id"],
            group=result.run["scenario"],
            config=settings(result),
            dir=str(self.folder.path),
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def curve(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.run.log(dict(values), step=step)

    def end(self, result: Result) -> None:
        """See `Tracker`."""
        import wandb

        self.run.summary.update({**numbers(result), "status": result.status})
        columns = ["learned", *result.experiences]
        matrix = result.accuracy_matrix
        rows = [[name, *row] for name, row in zip(result.experiences, matrix, strict=False)]
        self.run.log({"accuracy_matrix": wandb.Table(columns=columns, data=rows)})
        artefact: Any = wandb.Artifact(result.run["run_id"], type="run")
        for file in artefacts(self.folder):
            artefact.add_file(str(file))
        self.run.log_artifact(artefact)
        self.run.finish(exit_code=0 if result.status == "complete" else 1)


class MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in `mlflow.db` in the results folder.

    MLflow makes a new database in several steps; where many processes begin at once, make it
    before: `mlflow db upgrade sqlite:///results/mlflow.db`.

    Args:
        folder: Of the run.
    """

    #: Longest value of a parameter that every store takes.
    LONGEST = 500

    def __init__(self, folder: RunFolder) -> None:
        from mlflow.tracking import MlflowClient

        place = folder.path.parents[1].resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place / 'mlflow.db'}"
        self.folder, self.client = folder, MlflowClient(uri)
        self.files = (place / "mlflow").as_uri()

    def begin(self, result: Result) -> None:
        """See `Tracker`."""
        run_id = result.run["run_id"]
        experiment = self._experiment(result.run["scenario"])
        there = self.client.search_runs([experiment], f"tags.run_id = '{run_id}'", max_results=1)
        if there:  # interrupted, and now continued
            self.run = there[0].info.run_id
            self.client.set_terminated(self.run, "RUNNING")
            return
        tags = {"run_id": run_id, "strategy": result.run["strategy"]}
        self.run = self.client.create_run(experiment, tags=tags, run_name=run_id).info.run_id
        for name, value in settings(result).items():
            self.client.log_param(self.run, name, str(value)[: self.LONGEST])

    def _experiment(self, name: str) -> str:
        known = self.client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        place = None if "MLFLOW_TRACKING_URI" in os.environ else self.files
        return str(self.client.create_experiment(name, artifact_location=place))

    def curve(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def end(self, result: Result) -> None:
        """See `Tracker`."""
        for name, value in numbers(result).items():
            self.client.log_metric(self.run, f"final/{name}", value)
        self.client.log_text(self.run, markdown(result), "accuracy_matrix.md")
        for file in artefacts(self.folder):
            self.client.log_artifact(self.run, str(file))
        done = "FINISHED" if result.status == "complete" else "FAILED"
        self.client.set_terminated(self.run, done)


TRACKERS: dict[str, Callable[[RunFolder], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


# What all of them show.


def settings(result: Result) -> dict[str, Any]:
    """What was run, flat: names of options with dots, plain values."""
    names = ("run_id", "scenario", "strategy", "base", "setting", "split", "seed", "precision")
    run = {name: result.run[name] for name in names if result.run.get(name) is not None}
    tuned = flat(result.run.get("tuned") or {}, "tuned.")
    machine = {name: result.environment.get(name) for name in ("device", "threads", "code")}
    return {**run, **flat(result.run["options"]), **tuned, **machine}


def numbers(result: Result) -> dict[str, float]:
    """Metrics and costs that are numbers."""
    aware = {f"task_aware_{name}": value for name, value in result.task_aware_metrics.items()}
    every = {**result.metrics, **aware, **result.costs}
    return {name: float(value) for name, value in every.items() if value is not None}


def points(prefix: str, row: Sequence[float | None]) -> dict[str, float]:
    """One row of a matrix as points of curves, and their mean."""
    known = {i: value for i, value in enumerate(row) if value is not None}
    curves = {f"{prefix}/experience_{i + 1}": value for i, value in known.items()}
    return {**curves, f"{prefix}/mean": sum(known.values()) / max(1, len(known))}


def markdown(result: Result) -> str:
    """The accuracy matrix as a table, in %."""

    def cells(row: Sequence[float | None]) -> str:
        return " | ".join("" if value is None else f"{100 * value:.1f}" for value in row)

    matrix: Matrix = result.accuracy_matrix
    names = [name.replace("|", "\\|") for name in result.experiences]
    lines = [f"| learned | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    lines += [f"| {name} | {cells(row)} |" for name, row in zip(names, matrix, strict=False)]
    return "\n".join(lines)


def artefacts(folder: RunFolder) -> list[Path]:
    """Files of the run folder that are there."""
    return [path for name in _ARTEFACTS if (path := folder.path / name).is_file()]
