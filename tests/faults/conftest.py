"""What the tests of faults need of the machine; what is missing is a skip with its reason."""

from __future__ import annotations

import os
import shutil

import pytest

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


@pytest.fixture(scope="session", autouse=True)
def plugins_are_found() -> None:
    """The suite's strategies, for processes that start elsewhere."""
    userspace.join(userspace.suite())
