"""Golden results: a tiny run of every strategy, whose numbers are committed.

    python tests/golden_runs.py             # records all of them anew
    python tests/golden_runs.py ewc mas     # records some

A patch that may change numbers records them and shows the difference to the reviewer.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from suite import composed, configured

from clbench import protocol
from clbench.conditions import Conditions
from clbench.config import build
from clbench.results import BENCHMARK_VERSION
from clbench.testing import ALIKE, toy_for
from clbench.types import Scenario, Strategy

FILE = Path(__file__).with_name("golden.json")
#: Another library's code decides its numbers.
LEFT_OUT = ("avalanche",)


def here() -> str:
    """The platform: no answer turns where this is the same."""
    release = ".".join(torch.__version__.split(".")[:2])
    return f"{platform.machine()}, torch {release}"


def named() -> list[str]:
    """The strategies that have golden results."""
    return [name for name in configured("strategy") if name not in LEFT_OUT]


def runs(name: str) -> dict[str, dict[str, Any]]:
    """The numbers of one strategy, as its YAML has it, by the toy that it ran on.

    Returns:
        For each kind of setting in which it works: the accuracy matrix, the number of test
        samples of each experience, and the norm of all weights that it ended with.
    """
    found = {}
    for kind in ALIKE:
        strategy = build(composed(f"strategy={name}")["strategy"], Strategy, "strategy")
        if kind & strategy.settings:
            try:
                toy = toy_for(strategy, kind)
            except AssertionError:  # its base works in no such setting
                continue
            found[type(toy).__name__] = _run(strategy, toy)
    return found


def _run(strategy: Strategy, toy: Scenario) -> dict[str, Any]:
    result = protocol.run(toy, strategy, Conditions(threads=1))
    assert result.status == "complete", result.reason
    return {
        "accuracy_matrix": result.accuracy_matrix,
        "test_sizes": result.test_sizes,
        "online_error": result.metrics.get("online_error"),
        "weights": _norm(strategy),
    }


def _norm(strategy: Strategy) -> float:
    """The Euclidean norm of what is learned, over all modules that the strategy holds."""
    modules = [m for m in vars(strategy).values() if isinstance(m, torch.nn.Module)]
    modules = modules or [vars(strategy)["base"].model]  # a wrapper's is its base's
    unique = {id(p): p for m in modules for p in m.parameters()}
    return float(sum(p.detach().double().square().sum() for p in unique.values())) ** 0.5


def recorded() -> dict[str, Any]:
    """What is committed: `benchmark`, `platform` and `runs`."""
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def record(names: list[str]) -> None:
    """Writes the numbers of these strategies, or of all; whatever else is there must fit."""
    torch.set_num_threads(1)
    old = recorded()["runs"] if names else {}
    new = {**old, **{name: runs(name) for name in names or named()}}
    content = {
        "benchmark": BENCHMARK_VERSION,
        "platform": here(),
        "runs": dict(sorted(new.items())),
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content["runs"].items()]
    head = json.dumps({"benchmark": content["benchmark"], "platform": content["platform"]})[:-1]
    FILE.write_text(f'{head}, "runs": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    record(sys.argv[1:])
