"""One run is one folder, written once; many folders are one table."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench.discretion import discreet
from clbench.errors import UserError
from clbench.files import sweep, unwritable, write_atomically
from clbench.locks import alone
from clbench.metrics import Evaluation

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
#: Raised when the same configuration gives other numbers than before: old runs are then repeated.
BENCHMARK_VERSION = 1

Matrix = list[list[float | None]]


@dataclass
class Result:
    """What a run leaves behind; `result.json` is its JSON.

    Attributes:
        run: What was run: run_id, scenario, strategy, base, setting, split, seed, options, data.
        experiences: Their names.
        test_sizes: Test samples of each experience.
        accuracy_matrix: [i][j]: accuracy after experience i on experience j; None: not measured.
        task_aware_accuracy_matrix: The same where only an experience's own classes compete.
        metrics: Of `accuracy_matrix`, see `clbench.metrics`.
        task_aware_metrics: Of `task_aware_accuracy_matrix`.
        evaluations: Within experiences, if asked for: step, experience, accuracies.
        scores: Further matrices like `accuracy_matrix`, by the name of the score.
        general: Where the model was taught something before the stream: scores on that, before
            and after each experience; see `clbench.retention`.
        online: Of test-time adaptation: answers as the samples arrived; see `clbench.online`.
        costs: Seconds, samples, bytes, parameters.
        environment: Versions and device.
        scenario_facts: Class names and whatever the scenario found out about its data.
        strategy_facts: Whatever the strategy found out.
        status: "complete", "failed", "diverged", "out of memory" or "timed out".
        reason: Why it is not complete.
        benchmark: `BENCHMARK_VERSION` of the suite that made it.
        schema: Version of this layout.
    """

    run: dict[str, Any]
    experiences: list[str] = field(default_factory=list)
    test_sizes: list[int] = field(default_factory=list)
    accuracy_matrix: Matrix = field(default_factory=list)
    task_aware_accuracy_matrix: Matrix = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    task_aware_metrics: dict[str, float | None] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    scores: dict[str, Matrix] = field(default_factory=dict)
    general: dict[str, Any] = field(default_factory=dict)
    online: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, float | int | None] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    scenario_facts: dict[str, Any] = field(default_factory=dict)
    strategy_facts: dict[str, Any] = field(default_factory=dict)
    status: str = "complete"
    reason: str | None = None
    benchmark: int = BENCHMARK_VERSION
    schema: int = SCHEMA

    def to_json(self) -> str:
        """The text of `result.json`; refuses NaN and infinity.

        A matrix is written one row to a line, so that a person can read it.
        """
        content = {"schema": self.schema, "status": self.status, **vars(self)}
        text = json.dumps(content, indent=1, allow_nan=False)
        rows = re.compile(r"\[\n\s*((?:-?[\d.eE+-]+|null)(?:,\s+(?:-?[\d.eE+-]+|null))*)\s+\]")
        return rows.sub(lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"

    def frame(self) -> pd.DataFrame:
        """The accuracy matrices as a table, which can be joined to those of other runs.

        Returns:
            One row for every measured entry: scenario, strategy, base, seed; `learned`, the
            experience after which, and `tested`, the one on which, as numbers from 0; the name of
            the latter as `experience`; `accuracy`, and `task_aware_accuracy` where it is known.
        """
        import pandas as pd

        run = {name: self.run.get(name) for name in ("scenario", "strategy", "base", "seed")}
        aware = self.task_aware_accuracy_matrix
        rows = [
            {
                **run,
                "learned": i,
                "tested": j,
                "experience": self.experiences[j],
                "accuracy": value,
                **({"task_aware_accuracy": aware[i][j]} if aware else {}),
            }
            for i, row in enumerate(self.accuracy_matrix)
            for j, value in enumerate(row)
            if value is not None
        ]
        return pd.DataFrame(rows)

    @staticmethod
    def from_json(text: str) -> Result:
        """Reads `result.json`.

        Raises:
            ValueError: If it is not a result of this schema.
        """
        content = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if re.search(r"\\u[dD]", text):  # half a character, which JSON can hold, is no text
            content = json.loads(readable(json.dumps(content, ensure_ascii=False)))
        if not isinstance(content, dict) or "schema" not in content:
            raise ValueError("not a result")
        if content["schema"] != SCHEMA:
            raise ValueError(f"written with schema {content['schema']!r}, read is schema {SCHEMA}")
        if not isinstance(content.get("run"), dict):
            raise ValueError("it does not say what was run")
        content.setdefault("benchmark", 1)  # it was not written down at first
        try:
            return Result(**content)
        except TypeError as error:
            raise ValueError(str(error)) from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def run_id(scenario: str, strategy: str, seed: int, identity: Mapping[str, Any]) -> str:
    """The name of a run's folder: the same for the same numbers, on every machine.

    Args:
        scenario: Its name.
        strategy: Its name.
        seed: The run's seed.
        identity: Everything else that decides the numbers, as plain data.
    """
    canonical = json.dumps(
        {"benchmark": BENCHMARK_VERSION, **identity}, sort_keys=True, allow_nan=False
    )
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
    words = [re.sub(r"[^A-Za-z0-9_.+]", "_", word)[:60] for word in (scenario, strategy)]
    return f"{words[0]}-{words[1]}-{digest}-s{seed}"


def with_seed(name: str, seed: int) -> str:
    """The id of the same run with another seed."""
    return f"{name.rpartition('-s')[0]}-s{seed}"


class RunFolder:
    """The folder of one run.

    Args:
        root: The results folder.
        run_id: Name of the run.
    """

    def __init__(self, root: Path, run_id: str) -> None:
        self.path = root / "runs" / run_id
        self.checkpoint = self.path / "checkpoint"
        self.within = self.checkpoint / "within"

    @property
    def result_file(self) -> Path:
        """`result.json`: there once the run has ended."""
        return self.path / "result.json"

    def result(self) -> Result | None:
        """The result of an ended run; None if it has not ended or can't be read."""
        try:
            return Result.from_json(self.result_file.read_text())
        except (OSError, ValueError, RecursionError):
            return None

    def write_config(self, text: str) -> None:
        """Keeps the composed configuration beside the result."""
        write_atomically(self.path / "config.yaml", discreet(text).encode())

    def write_result(self, result: Result) -> None:
        """Publishes the result: from now on the run has ended."""
        if result.reason is not None:
            result.reason = discreet(result.reason)
        write_atomically(self.result_file, result.to_json().encode())

    def log(self, line: str) -> None:
        """Appends a line, with the time, to `log.txt`."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "log.txt").open("a") as file:
                file.write(f"{stamp} {discreet(line)}\n")
        except OSError as error:
            raise unwritable(self.path / "log.txt", error) from error

    def clear(self) -> None:
        """Forgets an earlier attempt; the lock stays with its holder."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()

    def forget_if_unused(self) -> None:
        """Removes the folder if nothing was learned in it."""
        if not (self.checkpoint.exists() or self.result_file.exists()):
            shutil.rmtree(self.path)

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Makes the folder this process's own; the claim dies with the process.

        Raises:
            Busy: If another process has it.
            UserError: If it can't be written, or the file system offers no locks.
        """
        with alone(self.path, self.path.name):
            for folder in (self.path, self.checkpoint, self.within):
                sweep(folder)
            yield


@dataclass(frozen=True)
class Found:
    """A run folder, as it was found.

    Attributes:
        path: Of the folder.
        result: What is in it; None if it has not ended, or can't be read.
        row: For a table: see `read`. Status "unreadable" or "unfinished" where there is no result.
    """

    path: Path
    result: Result | None
    row: dict[str, Any]


def find(root: str | Path = "results") -> list[Found]:
    """All run folders below a results folder, whether they can be read or not, in order.

    Args:
        root: A results folder, or any folder above or below one.

    Raises:
        UserError: If there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"No results folder {root}. Run something first, or name another folder.")
    found = []
    for place, folders, files in os.walk(root):
        folders.sort()
        path = Path(place)
        if "result.json" in files:
            found.append(_opened(path))
        elif path.parent.name == "runs":
            reason = "a checkpoint to go on from" if "checkpoint" in folders else "nothing learned"
            found.append(Found(path, None, _without_result(path, "unfinished", reason)))
    return found


def read(root: str | Path = "results") -> pd.DataFrame:
    """All ended runs below a results folder, one row each.

    Args:
        root: A results folder, or any folder above or below one.

    Returns:
        Columns: run_id, status, scenario, strategy, base, setting, split, seed, precision;
        `cache_features`, where any run learned from kept features, and `compile`, where any
        was compiled;
        `tuned`, the protocol under which hyper-parameters were chosen, `study`, where, and
        "budget.<name>", what that search was allowed; `pretrained`, whether the model began
        trained; `benchmark`, the version of the suite's numbers; every metric; every cost;
        task-aware metrics with the prefix "task_aware_"; options as "scenario.<name>" and
        "strategy.<name>", what identifies the data as "data.<name>"; device, threads and code;
        `reason`; `path`.
        Runs that did not complete keep their row, with empty metrics. A file that is no result
        of this schema is a row with status "unreadable".

    Raises:
        UserError: If there is no such folder.
    """
    return table([found for found in find(root) if found.row["status"] != "unfinished"])


def readable(words: str) -> str:
    """The same words with "?" for what is no text: halves of characters, bytes of odd paths."""
    return words.encode(errors="replace").decode()


def table(found: Sequence[Found]) -> pd.DataFrame:
    """Run folders as rows; see `read`."""
    import pandas as pd

    return pd.DataFrame([each.row for each in found])


def _opened(path: Path) -> Found:
    try:
        result = Result.from_json((path / "result.json").read_text())
        return Found(path, result, _ended(path, result))
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        return Found(path, None, _without_result(path, "unreadable", str(error)))
    except (OverflowError, RecursionError) as error:  # numbers and nesting beyond reason
        return Found(path, None, _without_result(path, "unreadable", str(error)))


def _without_result(path: Path, status: str, reason: str) -> dict[str, Any]:
    return {
        "run_id": readable(path.name),
        "status": status,
        "reason": reason,
        "path": readable(str(path)),
    }


def _ended(path: Path, result: Result) -> dict[str, Any]:
    run = result.run
    for name, kind in (("scenario", str), ("strategy", str), ("seed", int)):
        if not isinstance(run.get(name), kind):
            raise ValueError(f"its {name} is {run.get(name)!r}")
    tuned = dict(run.get("tuned") or {})
    known = (
        *("scenario", "strategy", "base", "setting", "split", "seed"),
        *("precision", "cache_features", "compile"),
    )
    identity = {
        "run_id": run.get("run_id", path.name),
        "status": result.status,
        **flat({name: run[name] for name in known if name in run}),
        **flat({"tuned": tuned.pop("protocol", None), "study": tuned.pop("study", None)}),
        **flat(tuned, "budget."),
        "pretrained": _starts_trained(result.scenario_facts),
        "benchmark": result.benchmark,
    }
    task_aware = {f"task_aware_{name}": v for name, v in result.task_aware_metrics.items()}
    numbers = {**result.metrics, **task_aware, **result.costs}
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}, not a finite number")
    return {
        **identity,
        **{name: value for name, value in numbers.items() if name not in identity},
        **flat(run.get("options", {})),
        **flat(run.get("data", {}), "data."),
        **{k: result.environment.get(k) for k in ("device", "threads", "code")},
        "reason": result.reason,
        "path": readable(str(path)),
    }


def _starts_trained(facts: Mapping[str, Any]) -> bool | None:
    """Whether the model's weights came from elsewhere; None if the run did not get that far."""
    if "backbone" not in facts:
        return None
    return facts["backbone"].get("weights") is not None or "source_model_sha256" in facts


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as dotted names; lists as their JSON text, so that they can be keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return found
