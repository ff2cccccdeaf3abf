"""Shared by all tests: the command line in this process, and a user's working folder."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hypothesis import settings
from suite import Command

from clbench import cli, userspace

# The same examples every time; HYPOTHESIS_PROFILE=default looks for others.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the user's working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what a command changes for its whole process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    # Hydra's --info logs to the output of its time, which is closed when the next test begins.
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    plugins = Plugins.instance()
    classes = {kind: list(known) for kind, known in plugins.plugin_type_to_subclass_list.items()}
    names = dict(plugins.class_name_to_class)
    GlobalHydra.instance().clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    GlobalHydra.instance().clear()
    plugins.plugin_type_to_subclass_list.clear()
    plugins.plugin_type_to_subclass_list.update(classes)
    plugins.class_name_to_class = names
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def command(work: Path, fresh: None, capfd: pytest.CaptureFixture[str]) -> Command:  # noqa: ARG001
    """`python -m clbench` in the working folder, without the two seconds of a new process."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        sys.argv[:] = ["clbench", *arguments]
        capfd.readouterr()
        try:
            code = cli.main()
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 1
        captured = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For a process of its own that uses the same clbench, on one thread."""
    ours = os.pathsep.join(filter(None, (str(userspace.suite()), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": ours, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium of the system; `make test` does not download one."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()
