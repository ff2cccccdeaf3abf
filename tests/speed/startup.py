"""How long a process takes to its first training step: `python tests/speed/startup.py`. No test."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

#: A user's strategy that ends its process after its first training step.
FIRST_STEP = """
import os
from dataclasses import dataclass
from strategies.replay import Replay

@dataclass(kw_only=True)
class FirstStep(Replay):
    def update(self, loss):
        super().update(loss)
        os._exit(0)
"""
#: The least a script does before the end of its first step on the same data.
PLAIN_STEP = """
import os
import torch
from sklearn.datasets import load_digits
x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
model = torch.nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
torch.nn.functional.cross_entropy(model(x[:32].float()), y[:32]).backward()
optimizer.step()
os._exit(0)
"""


def taken(command: Sequence[str], folder: Path) -> float:
    """Seconds from the start of a process to its end."""
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure(repeats: int) -> dict[str, list[float]]:
    """Start-up times in turns, the first of each, which warms the file cache, left out."""
    suite = [sys.executable, "-m", "clbench"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("strategies", "conf/strategy"):
            (folder / part).mkdir(parents=True)
        (folder / "strategies" / "first_step.py").write_text(FIRST_STEP)
        target = "_target_: strategies.first_step.FirstStep\n"
        (folder / "conf" / "strategy" / "first_step.yaml").write_text(target)
        options = ["scenario=digits", "strategy=first_step", "progress=false", "force=true"]
        commands = {
            "clbench --help": [*suite, "--help"],
            "clbench, first step on digits": [*suite, *options],
            "plain script, first step on digits": [sys.executable, "-c", PLAIN_STEP],
            "import torch": [sys.executable, "-c", "import torch"],
        }
        rounds = [{n: taken(c, folder) for n, c in commands.items()} for _ in range(1 + repeats)]
    return {n: [r[n] for r in rounds[1:]] for n in commands}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    lines = measure(parser.parse_args().rounds)
    print("| start-up | seconds |\n|---|---|")
    for name, seconds in lines.items():
        middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
        print(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    print()
    for name, seconds in lines.items():
        print(json.dumps({"startup": name, "seconds": seconds}))


if __name__ == "__main__":
    main()
