"""The command line: `python -m clbench scenario=... strategy=... seed=...`."""

from __future__ import annotations

import sys

from clbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
