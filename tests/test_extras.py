"""What is optional says which extra to install, and there is such an extra."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clbench import huggingface, trackers, userspace
from clbench.engines.ray import Ray
from clbench.engines.slurm import Slurm
from clbench.errors import UserError
from clbench.nn.robustbench import RobustBench
from clbench.results import RunFolder
from clbench.text.optional import needed

ROOT = userspace.suite()


def tracked(name: trackers.Name) -> Callable[[Path], object]:
    return lambda folder: trackers.guarded(name, RunFolder(folder, "run"))


#: By package: what needs it, and what the message tells to install.
OPTIONAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensorboard": (tracked("tensorboard"), "clbench[tensorboard]"),
    "wandb": (tracked("wandb"), "clbench[wandb]"),
    "mlflow": (tracked("mlflow"), "clbench[mlflow]"),
    "transformers": (lambda _: needed("transformers"), "clbench[text]"),
    "tokenizers": (lambda _: needed("tokenizers"), "clbench[text]"),
    "peft": (lambda _: needed("peft"), "clbench[text]"),
    "rouge_score": (lambda _: needed("rouge_score"), "clbench[text]"),
    "datasets": (
        lambda folder: huggingface.opened(str(folder), None, None),
        "clbench[huggingface]",
    ),
    "ray": (lambda _: Ray().open(1, "cpu"), "clbench[ray]"),
    "submitit": (lambda _: Slurm().open(1, "cpu"), "clbench[slurm]"),
    "robustbench": (lambda _: RobustBench().build((3, 32, 32)), "pip install robustbench"),
}


@pytest.mark.parametrize(("package", "case"), OPTIONAL.items(), ids=OPTIONAL)
def test_a_missing_package_names_what_to_install(
    package: str,
    case: tuple[Callable[[Path], object], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    use, told = case
    with pytest.raises(UserError) as refusal:
        use(tmp_path)
    assert told in str(refusal.value)
    assert package in str(refusal.value)


def test_every_extra_that_a_message_names_is_there() -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", section.partition("\n[")[0], re.M))
    sources = [p for kind in ("clbench", *userspace.PLUGINS) for p in (ROOT / kind).rglob("*.py")]
    named = {name for p in sources for name in re.findall(r"clbench\[(\w+)\]", p.read_text())}
    assert {"text", "huggingface"} <= named <= extras
    assert set(trackers.TRACKERS) <= extras
