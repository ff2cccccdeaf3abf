"""Whether runs train together, and what does not go with that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clbench.errors import UserError
from clbench.machine import choose_device

#: Runs at once where the suite chooses: few enough for the memory of a GPU beside small models.
AUTOMATIC = 16
#: Phases that make several runs of one shape.
PHASES = ("tune", "evaluate", "benchmark")


def choose(tree: Mapping[str, Any]) -> int:
    """How many runs train together; 0: each by itself.

    "auto" is 0 on a CPU, where stacked models were never faster than processes side by side.

    Args:
        tree: A whole configuration.

    Raises:
        UserError: If the options contradict each other.
    """
    population, phase = tree["population"], tree["phase"]
    if population == "auto":
        gpu = phase in PHASES and choose_device(str(tree["device"])).type == "cuda"
        return AUTOMATIC if gpu and not _against(tree) else 0
    if not isinstance(population, int) or isinstance(population, bool) or population < 0:
        raise UserError(f"population={population}: give a number of runs, 0 for none, or auto.")
    if population and phase not in PHASES:
        raise UserError(
            f"population={population} is for the phases that make several runs of one strategy: "
            f"phase={'|'.join(PHASES)}. With phase=run set population=0."
        )
    reason = _against(tree)
    if population and reason:
        raise UserError(f"population={population} does not go with {reason}. Set population=0.")
    return population


def _against(tree: Mapping[str, Any]) -> str | None:
    """The option that asks for something else, and why it can't be both."""
    if tree["workers"] != 1 or tree["engine"]["_target_"] != "clbench.engines.local.Local":
        return "workers= or another engine, whose processes make runs one by one"
    if tree["timeout"]:
        return f"timeout={tree['timeout']}, which is of one run and its process"
    if tree["compile"]:
        return "compile=true, which compiles the model of one run"
    if tree["tracker"] != "none":
        return f"tracker={tree['tracker']}, which follows one run at a time"
    return None
