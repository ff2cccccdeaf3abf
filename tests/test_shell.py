"""Tab completion and help, as the documentation says them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from suite import Command, configured, write_all

MINE = {
    "strategies/mine.py": "from strategies.finetune import Finetune as Mine\n",
    "conf/strategy/mine.yaml": "_target_: strategies.finetune.Finetune\nlr: 0.05\n",
}


@pytest.fixture
def shell(work: Path, environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An environment with the command `clbench`, as an installation makes it."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    write_all(work, MINE)
    script = tmp_path / "bin" / "clbench"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom clbench.__main__ import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return {**environment, "PATH": f"{script.parent}:{os.environ['PATH']}"}


def offered(words: str, shell: dict[str, str]) -> set[str]:
    """What bash would offer after these words and a Tab."""
    script = (
        'eval "$(clbench -sc install=bash)"; complete -p clbench >&2; '
        f"COMP_LINE='{words}' COMP_POINT={len(words)} COMP_CWORD={len(words.split()) - 1}; "
        'hydra_bash_completion; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=shell,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "hydra_bash_completion clbench" in done.stderr
    return set(done.stdout.split())


def test_bash_offers_names_and_those_of_the_working_folder(shell: dict[str, str]) -> None:
    names = {f"strategy={name}" for name in configured("strategy") if name.startswith("m")}
    assert offered("clbench strategy=m", shell) == names | {"strategy=mine"}


def test_bash_offers_the_options_of_what_was_chosen(shell: dict[str, str]) -> None:
    found = offered("clbench strategy=ewc strategy.ewc_", shell)
    assert found == {"strategy.ewc_lambda="}


@pytest.mark.parametrize("kind", ["config", "defaults", "defaults-tree", "searchpath", "all"])
def test_info_explains_a_configuration(command: Command, kind: str) -> None:
    done = command("scenario=glyphs", "strategy=lwf", "--info", kind)
    assert done.returncode == 0, done.stderr
    said = {
        "config": ["temperature: 2.0", "scenario: glyphs"],
        "defaults": ["strategy/lwf"],
        "defaults-tree": ["scenario: glyphs"],
        "searchpath": ["main", "conf"],
        "all": ["Installed Hydra Plugins", "scenario: glyphs"],
    }
    assert not [words for words in said[kind] if words not in done.stdout]


def test_help_names_every_choice(command: Command) -> None:
    done = command("--help")
    assert done.returncode == 0
    for group in ("scenario", "strategy", "backbone", "budget"):
        assert not [name for name in configured(group) if name not in done.stdout]
    assert "memory_size: 200" in done.stdout, "options, as they stand"
