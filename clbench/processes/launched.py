"""What a launcher such as torchrun says about the processes of a run, in the environment."""

from __future__ import annotations

import os

from clbench.errors import UserError


def count() -> int:
    """How many processes a launcher has started for this run; 1: there was none."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdecimal() and "RANK" in os.environ else 1


def number() -> int:
    """Which of them this is, from 0; the first one leads."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def speaker() -> str:
    """What stands before the messages of a process that does not lead."""
    return f"process {number()} of {count()}: " if number() else ""


def refuse(phase: str, alone: bool) -> None:
    """Refuses what several processes can't do together.

    Args:
        phase: Of the command.
        alone: Nothing else is done beside it.

    Raises:
        UserError: With what works.
    """
    if count() > 1 and (phase != "run" or not alone):
        raise UserError(
            f"{count()} processes share one run: phase=run, without -m, workers= and another "
            "engine. Start searches, sweeps and reports without torchrun."
        )
