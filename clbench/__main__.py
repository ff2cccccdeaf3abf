"""The command line: `python -m clbench scenario=... strategy=... seed=...`."""

from __future__ import annotations

import sys
from pathlib import Path

from clbench import userspace


def main() -> int:
    """Runs the command line; returns the exit code."""
    userspace.search_last(Path.cwd())  # before anything is imported that lies elsewhere
    from clbench.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
