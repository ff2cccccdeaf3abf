"""One of two processes of a run, or both of them in turn: what `test_processes` compares."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from suite import composed

from clbench import protocol
from clbench.conditions import Conditions
from clbench.config import build
from clbench.processes.group import Group
from clbench.processes.peers import together
from clbench.testing import ToyScenario
from clbench.text.toy import ToyInstructions
from clbench.toys import ToyViT
from clbench.types import Scenario, Strategy

CASES = [
    *((kind, name) for kind in ("vit", "text") for name in ("replay", "derpp", "ewc", "lwf")),
    *(("mlp", name) for name in ("finetune", "replay", "derpp", "ewc", "lwf")),
    *((kind, "refresh") for kind in ("mlp", "vit", "text")),
]


def scenario(kind: str) -> Scenario:
    """A toy whose batches two processes can't halve."""
    if kind == "text":
        return ToyInstructions(batch_size=7, epochs=2)
    toy = ToyScenario(batch_size=13, epochs=2)
    return replace(toy, backbone=ToyViT()) if kind == "vit" else toy


def numbers(kind: str, name: str) -> dict[str, Any]:
    """What a run leaves that the number of processes must not change."""
    words = [f"strategy={name}"]
    if name == "refresh":
        words.append("strategy@strategy.base=derpp")
    strategy = build(composed(*words)["strategy"], Strategy, "strategy")
    result = protocol.run(scenario(kind), strategy, Conditions(threads=1, device="cpu"))
    assert result.status == "complete", result.reason
    model = strategy.base.model if name == "refresh" else strategy.model  # type: ignore[attr-defined]
    costs = ("forward_samples", "backward_samples", "train_samples", "memory_samples")
    state = {k: v for k, v in vars(strategy).items() if k in ("anchor", "information")}
    anchor = state.get("anchor")
    return {
        "accuracy_matrix": result.accuracy_matrix,
        "costs": {cost: result.costs[cost] for cost in costs},
        "processes": result.environment["processes"],
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "curvature": [] if anchor is None else [float(c.sum()) for c in anchor.curvature()],
    }


def main(folder: Path, rank: int, count: int) -> None:
    """Writes the numbers of all cases."""
    if count == 1:
        found = {f"{kind} {name}": numbers(kind, name) for kind, name in CASES}
    else:
        store = dist.FileStore(  # type: ignore[attr-defined]
            str(folder / "store"), count
        )
        with together(Group(store, rank, count, torch.device("cpu"))):
            found = {f"{kind} {name}": numbers(kind, name) for kind, name in CASES}
    (folder / f"{count}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
