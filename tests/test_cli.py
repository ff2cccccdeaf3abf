"""The command line: every mistake is one line, every run is done once, nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from suite import Command, composed, configured, write_all

from clbench import userspace
from clbench.results import read

QUICK = ("scenario.epochs=1", "progress=false")

HEADER = """
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import time
import torch
from clbench.training import GradientStrategy
from clbench.types import CLASSIFICATION, Setting
"""
#: Stops where a file says so, and draws from every kind of generator that a run has.
STOPPING = {
    "strategies/stopping.py": HEADER
    + '''
def stop(place):
    if Path("pause").exists() and Path("pause").read_text() == place:
        Path("paused").touch()
        time.sleep(600)
    if Path("interrupt").exists() and Path("interrupt").read_text() == place:
        raise KeyboardInterrupt


@dataclass(kw_only=True)
class Stopping(GradientStrategy):
    """Fine-tuning on noisy inputs. **Differs from the paper:** there is none."""

    def setup(self, model, context):
        super().setup(model, context)
        self.steps = 0

    def before(self, experience):
        self._experience = experience.index
        stop(f"before {experience.index}")

    def loss(self, batch):
        mine = self.context.generator("noise")
        noise = torch.rand(batch.inputs.shape, generator=mine) + torch.rand(batch.inputs.shape)
        self.steps += 1
        stop(f"within {self._experience} after {self.steps} steps")
        return self.context.objective.loss(self.forward(batch.inputs + noise), batch.targets)
''',
    "conf/strategy/stopping.yaml": "_target_: strategies.stopping.Stopping\nlr: 0.1\n",
}
CRASHING = {
    "strategies/crashing.py": HEADER
    + '''
@dataclass(kw_only=True)
class Crashing(GradientStrategy):
    """Crashes for one seed. **Differs from the paper:** there is none."""

    def before(self, experience):
        if self.context.seed == 1 and experience.index == 1 and Path("crash").exists():
            raise ZeroDivisionError("one of the strategy's own mistakes")
''',
    "conf/strategy/crashing.yaml": "_target_: strategies.crashing.Crashing\nlr: 0.1\n",
}
UNLABELLED = {
    "strategies/unlabelled.py": HEADER
    + '''
@dataclass(kw_only=True)
class Unlabelled(GradientStrategy):
    """For unlabelled streams. **Differs from the paper:** there is none."""

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.TEST_TIME_ADAPTATION})
''',
    "conf/strategy/unlabelled.yaml": "_target_: strategies.unlabelled.Unlabelled\nlr: 0.1\n",
}


def results(folder: Path) -> list[dict[str, Any]]:
    """Every result.json below a folder."""
    return [json.loads(f.read_text()) for f in sorted(folder.rglob("result.json"))]


def run_folder(results_dir: Path) -> Path:
    (folder,) = (results_dir / "runs").iterdir()
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Mistakes.

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown scenario": (["scenario=digts"], ["No scenario 'digts'", "Did you mean 'digits'?"]),
    "unknown strategy": (["strategy=finetun"], ["'finetun'", "Did you mean 'finetune'?", "replay"]),
    "unknown backbone": (["backbone=resnet18x"], ["No backbone", "Did you mean 'resnet18'?"]),
    "no strategy": (["strategy="], ["No strategy ''", "replay"]),
    "unknown option": (["sed=1"], ["No option 'sed'", "Did you mean 'seed'?"]),
    "unknown option added": (["+sed=1"], ["No option 'sed'", "Did you mean 'seed'?"]),
    "unknown option forced": (["++strategy.lrr=1"], ["lrr", "Did you mean 'lr'?"]),
    "unknown option of the strategy": (
        ["strategy=finetune", "strategy.selection=reservoir"],
        ["No option 'strategy.selection'", "strategy.schedule"],
    ),
    "unknown option of the strategy added": (
        ["+strategy.lrr=1"],
        ["strategy.lrr", "Did you mean 'lr'?"],
    ),
    "unknown option of the scenario": (
        ["scenario.epoch=1"],
        ["'scenario.epoch'", "Did you mean 'scenario.epochs'?"],
    ),
    "unknown option of the backbone": (
        ["backbone.hiden=[3]"],
        ["'backbone.hiden'", "Did you mean 'backbone.hidden'?"],
    ),
    "unknown phase": (["phase=rum"], ["No phase 'rum'", "Did you mean 'run'?", "report"]),
    "text for a number": (["strategy.lr=high"], ["strategy.lr='high'", "valid number"]),
    "number for a whole number": (["scenario.epochs=1.5"], ["scenario.epochs=1.5", "integer"]),
    "nothing for a number": (["seed=null"], ["seed=None", "integer"]),
    "number for a list": (["backbone.hidden=3"], ["backbone.hidden=3", "valid array"]),
    "unknown word": (["strategy.optimizer=sdg"], ["strategy.optimizer='sdg'", "'sgd'"]),
    "unknown split": (["split=test"], ["split='test'", "'tune' or 'evaluate'"]),
    "unknown device": (["device=tpu"], ["device='tpu'", "'cuda'"]),
    "text for a switch": (["force=maybe"], ["force='maybe'", "boolean"]),
    "nothing for a folder": (["results_dir=null"], ["results_dir=None", "string"]),
    "a missing option": (["~results_dir"], ["lacks results_dir"]),
    "a rate below zero": (["strategy.lr=-0.1"], ["lr=-0.1", "above 0"]),
    "not a number": (["strategy.lr=nan"], ["strategy.lr=nan", "finite"]),
    "an infinite rate": (["strategy.lr=inf"], ["strategy.lr=inf", "finite"]),
    "no epochs": (["scenario.epochs=0"], ["epochs=0", "at least 1"]),
    "a seed below zero": (["seed=-1"], ["seed=-1", "at least 0"]),
    "no samples in a batch": (["evaluate_batch_size=0"], ["evaluate_batch_size=0", "at least 1"]),
    "online with epochs": (
        ["scenario.online=true", "scenario.epochs=5"],
        ["scenario.online=true", "scenario.epochs=5", "Set scenario.epochs=1"],
    ),
    "passes without online": (["scenario.passes=2"], ["scenario.online=true"]),
    "an impossible pair": (
        ["strategy=unlabelled"],
        ["Unlabelled does not work in the class_incremental", "test_time_adaptation"],
    ),
    "nothing to wrap": (["strategy@strategy.base=replay"], ["wraps no other"]),
    "no value": (["seed"], ["Can't read 'seed'", "key=value"]),
    "unfinished value": (["strategy.lr=choice("], ["Can't read 'strategy.lr=choice('"]),
    "a function for a class": (["strategy._target_=os.system"], ["os.system is refused"]),
    "a scenario for a strategy": (
        ["strategy._target_=scenarios.digits.Digits"],
        ["scenarios.digits.Digits is no Strategy"],
    ),
    "a class that is not there": (
        ["strategy._target_=strategies.ewcc.EWC"],
        ["strategies/ewcc.py"],
    ),
    "no scenario": (["scenario=null"], ["needs the name of one of its choices"]),
    "a reference to nothing": (["strategy.lr=${nowhere}"], ["strategy.lr: ", "'nowhere'"]),
    "a report without runs": (["phase=report"], ["No results folder results", "Run something"]),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_message_and_nothing_is_written(
    arguments: list[str], said: list[str], work: Path, command: Command
) -> None:
    write_all(work, UNLABELLED)
    before = listing(work)
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [word for word in said if word not in done.stderr] == [], done.stderr
    assert [p for p in listing(work) if "__pycache__" not in p] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_a_mistake(work: Path, command: Command) -> None:
    done = command("device=cuda", *QUICK)
    assert done.returncode == 2
    assert done.stderr == (
        "error: device=cuda: PyTorch sees no CUDA device here. Use device=auto or cpu.\n"
    )
    assert listing(work) == []


@pytest.mark.parametrize("arguments", [["seed=0,1"], ["-m", "strategy.lr=interval(0,1)"]])
def test_what_hydra_refuses_is_said_in_its_words(
    arguments: list[str], work: Path, command: Command
) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert listing(work) == []


def test_a_mistake_found_while_loading_leaves_no_run(work: Path, command: Command) -> None:
    done = command("scenario.n_experiences=3", *QUICK)
    assert done.returncode == 2
    assert "does not divide the 10 classes. Use one of 1, 2, 5, 10." in done.stderr
    assert list((work / "results" / "runs").iterdir()) == []


@pytest.mark.parametrize("where", ["occupied", "occupied/below", "occupied/below/deep"])
def test_a_results_folder_that_can_t_be_is_refused(
    where: str, work: Path, command: Command
) -> None:
    (work / "occupied").write_text("a file")
    done = command(f"results_dir={where}", *QUICK)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Can't write ")
    assert "a part of the path is a file; choose another folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert listing(work) == ["occupied"]


def test_a_mistake_in_a_process_of_its_own_has_its_exit_code(
    work: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clbench", "strategy=nothing_like_it"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: No strategy 'nothing_like_it'. ")


# Asking.


def test_help_lists_choices_and_options(command: Command) -> None:
    done = command("--help")
    assert done.returncode == 0
    for group in ("scenario", "strategy", "backbone"):
        line = next(li for li in done.stdout.splitlines() if li.startswith(f"{group}:"))
        assert line.partition(": ")[2].split(", ") == configured(group)
    for option in composed():
        assert f"\n{option}:" in done.stdout


def test_cfg_shows_the_composed_configuration_and_runs_nothing(
    work: Path, command: Command
) -> None:
    done = command("strategy=finetune", "strategy.lr=0.25", "--cfg", "job")
    assert done.returncode == 0
    shown = OmegaConf.to_container(OmegaConf.create(done.stdout), resolve=True)
    assert shown == composed("strategy=finetune", "strategy.lr=0.25")
    assert listing(work) == []


# Running.


def test_a_run_leaves_one_folder_and_is_not_run_twice(work: Path, command: Command) -> None:
    first = command(*QUICK)
    assert first.returncode == 0, first.stderr
    folder = run_folder(work / "results")
    assert listing(folder) == [".lock", "config.yaml", "log.txt", "result.json"]
    assert listing(work) == [
        "results",
        "results/runs",
        *sorted(
            [str(folder.relative_to(work)), *(str(f.relative_to(work)) for f in folder.iterdir())]
        ),
    ]
    assert str(folder.relative_to(work)) in first.stdout
    bytes_of = {path: path.read_bytes() for path in folder.iterdir()}
    second = command(*QUICK)
    assert second.returncode == 0
    assert "This run is there already; force=true repeats it." in second.stderr
    assert second.stdout == first.stdout
    assert {path: path.read_bytes() for path in folder.iterdir()} == bytes_of


def test_the_folder_keeps_the_configuration_that_was_run(work: Path, command: Command) -> None:
    command("strategy=finetune", "strategy.lr=0.25", "seed=3", *QUICK)
    kept = OmegaConf.to_container(OmegaConf.load(run_folder(work / "results") / "config.yaml"))
    assert kept == composed("strategy=finetune", "strategy.lr=0.25", "seed=3", *QUICK)
    (result,) = results(work)
    assert result["run"]["seed"] == 3
    assert result["run"]["options"]["strategy"]["lr"] == 0.25
    assert result["run"]["options"]["scenario"]["epochs"] == 1


def test_force_repeats_a_run_with_the_same_numbers(work: Path, command: Command) -> None:
    command(*QUICK)
    file = run_folder(work / "results") / "result.json"
    original = json.loads(file.read_text())
    file.write_text(json.dumps({**original, "accuracy_matrix": [], "reason": "tampered"}))
    (file.parent / "stray.txt").write_text("from an earlier attempt")
    command(*QUICK)
    assert json.loads(file.read_text())["reason"] == "tampered"
    done = command("force=true", *QUICK)
    assert done.returncode == 0
    assert "there already" not in done.stderr
    repeated = json.loads(file.read_text())
    for key in ("run", "accuracy_matrix", "task_aware_accuracy_matrix", "metrics", "reason"):
        assert repeated[key] == original[key]
    assert not (file.parent / "stray.txt").exists()


def test_a_result_that_can_t_be_read_is_run_again(work: Path, command: Command) -> None:
    command(*QUICK)
    file = run_folder(work / "results") / "result.json"
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:200])
    done = command(*QUICK)
    assert done.returncode == 0
    assert "there already" not in done.stderr
    assert json.loads(file.read_text())["accuracy_matrix"] == whole["accuracy_matrix"]


@pytest.mark.parametrize(
    "other",
    ["seed=1", "split=tune", "strategy.lr=0.2", "scenario.epochs=2", "precision=bf16"],
)
def test_what_decides_numbers_makes_another_run(other: str, work: Path, command: Command) -> None:
    command("strategy=finetune", *QUICK)
    command("strategy=finetune", *QUICK, other)
    assert len(list((work / "results" / "runs").iterdir())) == 2


def test_what_decides_no_numbers_makes_the_same_run(work: Path, command: Command) -> None:
    command("strategy=finetune", "scenario.epochs=1", "progress=false")
    done = command(
        "strategy=finetune", "scenario.epochs=1", "progress=true", "device=cpu", "data_dir=x"
    )
    assert "there already" in done.stderr
    assert len(list((work / "results" / "runs").iterdir())) == 1


def test_progress_is_one_plain_line_an_experience(command: Command) -> None:
    done = command("strategy=finetune", "scenario.epochs=1")
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 5
    for index, line in enumerate(lines, start=1):
        assert line.startswith(
            f"digits finetune seed 0 · experience {index}/5: average accuracy 0."
        )


def test_a_diverged_run_is_a_reason_and_never_a_number(work: Path, command: Command) -> None:
    done = command("strategy=finetune", "strategy.lr=1e6", *QUICK)
    assert done.returncode == 1
    assert "error: the run diverged: the training loss is" in done.stderr
    (result,) = results(work)
    assert result["status"] == "diverged"
    assert "training loss" in result["reason"]
    assert result["metrics"] == {}
    assert not (run_folder(work / "results") / "checkpoint").exists()
    again = command("strategy=finetune", "strategy.lr=1e6", *QUICK)
    assert again.returncode == 1
    assert "there already" in again.stderr
    assert command("phase=report").returncode == 0
    board = (work / "results" / "leaderboard" / "leaderboard.md").read_text()
    assert "| finetune | - | 0 (1 diverged) | no |" in board
    assert "nan" not in board.replace(result["reason"], "").lower()


def test_a_crash_is_kept_with_its_traceback_and_repeated(work: Path, command: Command) -> None:
    write_all(work, {**CRASHING, "crash": ""})
    with pytest.raises(ZeroDivisionError):
        command("strategy=crashing", "seed=1", *QUICK)
    (result,) = results(work)
    assert result["status"] == "failed"
    assert result["reason"] == "ZeroDivisionError: one of the strategy's own mistakes"
    assert len(result["accuracy_matrix"]) == 1
    assert "Traceback" in (run_folder(work / "results") / "log.txt").read_text()
    (work / "crash").unlink()
    done = command("strategy=crashing", "seed=1", *QUICK)
    assert done.returncode == 0
    (result,) = results(work)
    assert result["status"] == "complete"
    assert result["reason"] is None
    assert len(result["accuracy_matrix"]) == 5


# Sweeps.


def test_a_sweep_runs_every_combination(work: Path, command: Command) -> None:
    done = command("-m", "strategy=finetune,replay", "seed=0,1", *QUICK)
    assert done.returncode == 0, done.stderr
    table = read(work / "results")
    assert sorted(zip(table["strategy"], table["seed"], strict=True)) == [
        *(("finetune", 0), ("finetune", 1), ("replay", 0), ("replay", 1)),
    ]
    assert listing(work)[:2] == ["results", "results/runs"], "nothing of Hydra's is left"


@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_flag_of_a_sweep_may_stand_anywhere(place: int, work: Path, command: Command) -> None:
    arguments = ["strategy=finetune", *QUICK, "seed=0,1"]
    assert command(*arguments[:place], "--multirun", *arguments[place:]).returncode == 0
    assert len(results(work)) == 2


def test_one_job_s_mistake_does_not_stop_the_others(work: Path, command: Command) -> None:
    done = command("-m", "strategy=finetune", "scenario.n_experiences=3,5,2", *QUICK)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert read(work / "results")["scenario.n_experiences"].tolist() == [5, 2] or (
        read(work / "results")["scenario.n_experiences"].tolist() == [2, 5]
    )


def test_one_job_s_divergence_does_not_stop_the_others(work: Path, command: Command) -> None:
    done = command("-m", "strategy=finetune", "strategy.lr=1e6,0.1", *QUICK)
    assert done.returncode == 1
    assert sorted(read(work / "results")["status"]) == ["complete", "diverged"]


def test_one_job_s_crash_does_not_stop_the_others(work: Path, command: Command) -> None:
    write_all(work, {**CRASHING, "crash": ""})
    with pytest.raises(ZeroDivisionError):
        command("-m", "strategy=crashing", "seed=0,1,2", *QUICK)
    table = read(work / "results").set_index("seed")["status"]
    assert table.to_dict() == {0: "complete", 1: "failed", 2: "complete"}


def test_a_choice_that_is_not_there_stops_a_sweep_before_it_begins(
    work: Path, command: Command
) -> None:
    done = command("-m", "strategy=finetune,finetun", *QUICK)
    assert done.returncode == 2
    assert "Did you mean 'finetune'?" in done.stderr
    assert listing(work) == []


def test_the_same_sweep_again_runs_only_what_is_missing(work: Path, command: Command) -> None:
    command("strategy=finetune", "seed=1", *QUICK)
    done = command("-m", "strategy=finetune", "seed=0,1,2", *QUICK)
    assert done.stderr.count("there already") == 1
    assert len(results(work)) == 3


# Stopping and going on.


@contextmanager
def stopped(work: Path, place: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that runs until a place in the middle, and is then killed."""
    (work / "pause").write_text(place)
    process = subprocess.Popen(
        [sys.executable, "-m", "clbench", "strategy=stopping", *QUICK],
        cwd=work,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (work / "paused").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()
        (work / "pause").unlink()
        (work / "paused").unlink(missing_ok=True)


PLACES = {
    "between experiences": ("before 2", "resumed after experience 2"),
    "within an experience": ("within 3 after 21 steps", "resumed after experience 3"),
    "before anything is saved": ("within 0 after 3 steps", None),
}


@pytest.mark.parametrize(("place", "logged"), PLACES.values(), ids=PLACES.keys())
def test_a_killed_run_goes_on_to_the_same_numbers(
    place: str, logged: str | None, work: Path, command: Command, environment: dict[str, str]
) -> None:
    write_all(work, STOPPING)
    whole = command("strategy=stopping", "results_dir=whole", *QUICK)
    assert whole.returncode == 0, whole.stderr
    with stopped(work, place, environment):
        busy = command("strategy=stopping", *QUICK)
        assert busy.returncode == 75
        assert busy.stderr.startswith("error: Another process is running digits-stopping-")
        assert command("strategy=stopping", "force=true", *QUICK).returncode == 75
    assert results(work / "results") == []
    done = command("strategy=stopping", *QUICK)
    assert done.returncode == 0, done.stderr
    (expected,), (found,) = results(work / "whole"), results(work / "results")
    for key in ("run", "accuracy_matrix", "task_aware_accuracy_matrix", "metrics", "experiences"):
        assert found[key] == expected[key]
    assert found["costs"]["train_samples"] == expected["costs"]["train_samples"]
    log = (run_folder(work / "results") / "log.txt").read_text()
    assert (logged or "experience 1") in log
    assert ("resumed" in log) == (logged is not None)
    assert listing(run_folder(work / "results")) == [
        *(".lock", "config.yaml", "log.txt", "result.json"),
    ]


def test_an_interrupted_run_says_so_and_goes_on(work: Path, command: Command) -> None:
    write_all(work, {**STOPPING, "interrupt": "before 2"})
    done = command("strategy=stopping", *QUICK)
    assert done.returncode == 130
    assert done.stderr == ("Interrupted. The same command continues from the last experience.\n")
    assert (run_folder(work / "results") / "checkpoint").is_dir()
    (work / "interrupt").unlink()
    assert command("strategy=stopping", *QUICK).returncode == 0
    assert "resumed after experience 2" in (run_folder(work / "results") / "log.txt").read_text()


def test_an_interrupt_ends_a_sweep(work: Path, command: Command) -> None:
    write_all(work, {**STOPPING, "interrupt": "before 1"})
    done = command("-m", "strategy=stopping", "seed=0,1,2", *QUICK)
    assert done.returncode == 130
    assert len(list((work / "results" / "runs").iterdir())) == 1


def test_force_forgets_what_was_interrupted(work: Path, command: Command) -> None:
    write_all(work, {**STOPPING, "interrupt": "before 2"})
    command("strategy=stopping", *QUICK)
    (work / "interrupt").unlink()
    assert command("strategy=stopping", "force=true", *QUICK).returncode == 0
    assert "resumed" not in (run_folder(work / "results") / "log.txt").read_text()


# The report.


def test_the_report_is_made_from_the_runs(work: Path, command: Command) -> None:
    command("-m", "strategy=finetune,replay", "seed=0,1", *QUICK)
    done = command("phase=report")
    assert done.returncode == 0
    written = [Path(line) for line in done.stdout.split()]
    assert Path("results/leaderboard/leaderboard.md") in written
    assert all(path.is_file() for path in written)
    board = (work / "results" / "leaderboard" / "leaderboard.md").read_text()
    assert "## digits" in board
    for strategy in ("finetune", "replay"):
        (row,) = [li for li in board.splitlines() if f"| {strategy} |" in li]
        assert "| 2 | no |" in row


def test_the_working_folder_may_be_the_checkout(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(userspace.suite())
    done = command("strategy=finetune", f"results_dir={tmp_path / 'results'}", *QUICK)
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path / "results")) == 1
    assert os.getcwd() == str(userspace.suite())
