"""Who a run trains with: nobody, runs in the same process, or processes that share its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TypeVar

from torch import Tensor, nn

from clbench.types import Differentiation, Scenario

Found = TypeVar("Found")


class Companion(Differentiation):
    """A run by itself; a subclass lets others in where there is something to share.

    Attributes:
        leads: This process writes what the run leaves, and says how far it is.
        processes: That do this run together.
    """

    leads = True
    processes = 1

    @property
    def part(self) -> slice | None:
        """Rows that this process has computed in the latest call of the model; None: all."""
        return None

    def adopt(self, model: nn.Module) -> None:
        """The model of the run is made: from now on its calls may be shared.

        Args:
            model: Changed in place; copies that are made of it later are shared too.
        """

    def check(self, scenario: Scenario) -> None:
        """Refuses what can't be done together.

        Raises:
            UserError: With what works.
        """

    def clock(self) -> float:
        """Seconds from some moment on, without those that were spent on others."""
        return time.perf_counter()

    def told(self, find: Callable[[], Found]) -> Found:
        """What the process that leads finds; it alone is asked."""
        return find()

    def agree(self, code: int) -> int:
        """The largest code of all processes; each asks at the same time."""
        return code

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes; each asks at the same time."""
        return list(tensors)

    def compare(self, model: nn.Module) -> None:
        """Makes sure that all processes have the same weights.

        Raises:
            RuntimeError: If they have not.
        """


#: Of the run in this thread.
_PRESENT: ContextVar[Companion] = ContextVar("companion")


def present() -> Companion:
    """The companion of the run in this thread."""
    return _PRESENT.get(Companion())


def introduce(companion: Companion) -> None:
    """From now on it is the companion of the run in this thread."""
    _PRESENT.set(companion)
