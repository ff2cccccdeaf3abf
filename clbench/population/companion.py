"""Who a run trains with: nobody, or others in the same process."""

from __future__ import annotations

import time
from contextvars import ContextVar

from torch import nn

from clbench.types import Differentiation


class Companion(Differentiation):
    """A run by itself; a subclass lets others in where there is something to share."""

    def adopt(self, model: nn.Module) -> None:
        """The model of the run is made: from now on its calls may be shared.

        Args:
            model: Changed in place; copies that are made of it later are shared too.
        """

    def clock(self) -> float:
        """Seconds from some moment on, without those that were spent on others."""
        return time.perf_counter()


#: Of the run in this thread.
_PRESENT: ContextVar[Companion] = ContextVar("companion")


def present() -> Companion:
    """The companion of the run in this thread."""
    return _PRESENT.get(Companion())


def introduce(companion: Companion) -> None:
    """From now on it is the companion of the run in this thread."""
    _PRESENT.set(companion)
