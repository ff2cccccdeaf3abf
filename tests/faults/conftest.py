"""What the tests of faults need of the machine; what is missing is a skip with its reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import Cluster

from clbench import userspace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = os.geteuid() == 0
    nightly = bool(os.environ.get("CLBENCH_NIGHTLY"))
    for item in items:
        if item.get_closest_marker("needs_root") and not root:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("nightly") and not nightly:
            reason = "takes minutes and a scheduler: set CLBENCH_NIGHTLY=1"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def strace() -> str:
    """The program that makes system calls fail."""
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed")
    return found


@pytest.fixture
def namespaces() -> str:
    """The program that gives a process mounts or a network of its own."""
    found = shutil.which("unshare")
    if found is None:
        pytest.skip("unshare is not installed")
    return found


@pytest.fixture
def alone(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """An environment in which Ray leaves nothing on this machine, and finds nothing."""
    pytest.importorskip("ray", reason="ray is not installed: the extra ray")
    # Not in pytest's own folder: its path is too long for a socket.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        mine = {k: v for k, v in environment.items() if not k.startswith("RAY_")}
        yield {**mine, "RAY_TMPDIR": folder, "HOME": folder, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def cluster(alone: dict[str, str]) -> Iterator[Cluster]:
    """Two nodes, started elsewhere than where commands are given."""
    alone = {**alone, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-the-tests-" + 32 * "0"}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "ray_cluster.py"), "2"],
        env=alone,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    try:
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield Cluster(process, {**alone, "RAY_ADDRESS": address})
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(60)
        finally:
            process.kill()


@pytest.fixture(scope="session", autouse=True)
def plugins_are_found() -> None:
    """The suite's strategies, for processes that start elsewhere."""
    userspace.join(userspace.suite())
