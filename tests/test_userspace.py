"""The user's working folder beside the suite: found, merged, and never in its way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from suite import Command, write_all

from clbench import userspace
from clbench.config import build
from clbench.errors import UserError
from clbench.results import read
from clbench.testing import check_scenario, check_strategy
from clbench.types import Scenario, Strategy

MINE = {
    "strategies/mine.py": '''
from dataclasses import dataclass
from clbench.samples import Batch
from clbench.training import GradientStrategy
from torch import Tensor


@dataclass(kw_only=True)
class Mine(GradientStrategy):
    """Fine-tuning on a scaled loss. **Differs from the paper:** there is none."""

    strength: float = 1.0

    def loss(self, batch: Batch) -> Tensor:
        return self.strength * super().loss(batch)
''',
    "conf/strategy/mine.yaml": """# Mine
_target_: strategies.mine.Mine
strength: 0.5
lr: 0.1
momentum: 0.0
weight_decay: 0.0
optimizer: sgd
schedule: constant
clip: 0.0
""",
}
STRIPES = {
    "scenarios/stripes.py": '''
from dataclasses import dataclass
import torch
from clbench.classification import ClassIncrementalImages, Images
from clbench.samples import TensorSource
from clbench.types import Split


@dataclass(kw_only=True)
class Stripes(ClassIncrementalImages):
    """One bright row a class. Source: drawn. Licence: none."""

    def images(self, split: Split) -> Images:
        generator = torch.Generator().manual_seed(1 + list(Split).index(split))
        targets = torch.arange(4).repeat(30)
        pixels = torch.randint(128, (120, 1, 4, 4), generator=generator, dtype=torch.uint8)
        pixels[torch.arange(120), :, targets] += 120
        train = TensorSource(pixels[:80], targets[:80])
        test = TensorSource(pixels[80:], targets[80:])
        return Images(train, test, ["1", "2", "3", "4"], (0.5,), (0.3,))
''',
    "conf/scenario/stripes.yaml": """# Stripes
defaults:
  - /backbone@_global_.backbone: mlp

_target_: scenarios.stripes.Stripes
backbone: ${backbone}
head: linear
n_experiences: 2
crop_padding: 0
flip: false
epochs: 2
batch_size: 8
memory_size: 8
memory_batch_size: 0
online: false
passes: 1
""",
}
SHORT = ("scenario.epochs=1", "progress=false")


def test_a_user_s_strategy_is_listed_and_runs_like_the_suite_s(
    work: Path, command: Command
) -> None:
    write_all(work, MINE)
    assert "mine" in command("--help").stdout
    done = command("strategy=mine", *SHORT)
    assert done.returncode == 0, done.stderr
    (row,) = read(work / "results").to_dict("records")
    assert row["status"] == "complete"
    assert row["strategy"] == "mine"
    assert row["strategy.strength"] == 0.5
    assert len(row["strategy._code_"]) == 16


def test_a_user_s_option_is_checked_like_the_suite_s(work: Path, command: Command) -> None:
    write_all(work, MINE)
    done = command("strategy=mine", "strategy.strenght=2", *SHORT)
    assert done.returncode == 2
    assert "No option 'strategy.strenght'. Did you mean 'strategy.strength'?" in done.stderr


def test_an_edited_strategy_is_another_run(work: Path, command: Command) -> None:
    write_all(work, MINE)
    assert command("strategy=mine", *SHORT).returncode == 0
    path = work / "strategies" / "mine.py"
    path.write_text(path.read_text().replace("self.strength *", "2 * self.strength *"))
    del sys.modules["strategies.mine"]
    for cached in work.rglob("*.pyc"):
        cached.unlink()
    done = command("strategy=mine", *SHORT)
    assert "there already" not in done.stderr
    assert len(read(work / "results")) == 2


@pytest.mark.usefixtures("fresh")
def test_a_user_s_strategy_passes_the_suite_s_checks(work: Path) -> None:
    write_all(work, MINE)
    userspace.join(work)
    check_strategy(build({"_target_": "strategies.mine.Mine"}, Strategy, "strategy"))


def test_a_user_s_scenario_is_listed_and_runs_like_the_suite_s(
    work: Path, command: Command
) -> None:
    write_all(work, STRIPES)
    assert "stripes" in command("--help").stdout
    done = command("scenario=stripes", "progress=false")
    assert done.returncode == 0, done.stderr
    assert read(work / "results")["scenario"].tolist() == ["stripes"]


@pytest.mark.usefixtures("fresh")
def test_a_user_s_scenario_passes_the_suite_s_checks(work: Path) -> None:
    write_all(work, STRIPES)
    userspace.join(work)
    backbone = {"_target_": "clbench.nn.backbones.MLP", "hidden": [8]}
    node = {"_target_": "scenarios.stripes.Stripes", "backbone": backbone, "n_experiences": 2}
    check_scenario(build(node, Scenario, "scenario"))


def test_both_of_the_user_s_work_together(work: Path, command: Command) -> None:
    write_all(work, MINE | STRIPES)
    done = command("scenario=stripes", "strategy=mine", "progress=false")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"strategies/__init__.py": ""}, ["strategies/__init__.py", "Delete it"]),
        ({"scenarios/__init__.py": ""}, ["scenarios/__init__.py", "Delete it"]),
        ({"strategies/replay.py": ""}, ["strategies/replay.py", "Rename yours"]),
        ({"scenarios/digits.py": ""}, ["scenarios/digits.py", "Rename yours"]),
        ({"conf/strategy/replay.yaml": "a: 1"}, ["strategy/replay.yaml", "Rename yours"]),
        ({"conf/scenario/digits.yaml": "a: 1"}, ["scenario/digits.yaml", "Rename yours"]),
        ({"conf/backbone/mlp.yaml": "a: 1"}, ["backbone/mlp.yaml", "Rename yours"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_that_would_hide_the_suite_s_is_refused(
    files: dict[str, str], said: list[str], work: Path, command: Command
) -> None:
    write_all(work, files)
    done = command(*SHORT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in said)
    assert not (work / "results").exists()


def test_a_configuration_of_the_user_s_that_hides_config_yaml_is_not_used(
    work: Path, command: Command
) -> None:
    write_all(work, {"conf/config.yaml": "phase: nothing\n"})
    assert command("--cfg", "job").stdout.startswith("phase: run")


def test_a_stray_file_does_not_become_a_library(work: Path, environment: dict[str, str]) -> None:
    """`python -m` puts the working folder first; nothing there may be taken for a package."""
    stray = "raise SystemExit('imported from the working folder')\n"
    names = ("torch", "numpy", "yaml", "omegaconf", "hydra", "rich", "pydantic", "sklearn")
    write_all(work, {f"{name}.py": stray for name in names} | MINE)
    done = subprocess.run(
        [sys.executable, "-m", "clbench", "strategy=mine", *SHORT],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read(work / "results")) == 1


@pytest.mark.usefixtures("fresh")
def test_join_puts_the_folder_last_and_once(work: Path) -> None:
    sys.path.insert(0, "")
    sys.path.insert(1, str(work))
    before = [p for p in sys.path if p not in ("", str(work))]
    assert userspace.join(work) is None
    assert userspace.join(work) is None
    assert sys.path == [*before, str(work)]


@pytest.mark.usefixtures("fresh")
def test_join_gives_the_user_s_configuration_and_never_the_suite_s(work: Path) -> None:
    (work / "conf").mkdir()
    assert userspace.join(work) == work.resolve() / "conf"
    assert userspace.join(userspace.suite()) is None


@pytest.mark.usefixtures("fresh")
def test_a_link_to_the_suite_is_the_suite(work: Path) -> None:
    (work / "link").symlink_to(userspace.suite())
    assert userspace.join(work / "link") is None


@pytest.mark.usefixtures("fresh")
def test_join_refuses_before_it_changes_anything(work: Path) -> None:
    write_all(work, {"strategies/__init__.py": ""})
    before = list(sys.path)
    with pytest.raises(UserError):
        userspace.join(work)
    assert sys.path == before
