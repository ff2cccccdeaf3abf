"""Strategies with one fault each, for runs in other processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import Context, Experience


@dataclass(kw_only=True)
class Faulty(GradientStrategy):
    """Counts, in a file, how often it came to where its fault is: in the second experience.

    Attributes:
        note: The file.
        seed: Of the run that has the fault; below 0: all.
    """

    note: str = ""
    seed: int = -1

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.index = 0

    def before(self, experience: Experience) -> None:
        self.index = experience.index

    def loss(self, batch: Batch) -> Tensor:
        if self.index == 1 and self._step == 3 and self.seed in (-1, self.context.seed):
            with Path(self.note).open("a") as file:
                file.write(".")
            self.fault()
        return super().loss(batch)

    def fault(self) -> None:
        """What goes wrong."""


@dataclass(kw_only=True)
class Kills(Faulty):
    """Kills its process, so many times.

    Attributes:
        times: How often.
    """

    times: int = 1

    def fault(self) -> None:
        if Path(self.note).stat().st_size <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)


class Raises(Faulty):
    """Has a mistake in it."""

    def fault(self) -> None:
        raise ZeroDivisionError("a mistake")


class Exhausts(Faulty):
    """Has no memory left on its device."""

    def fault(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


class Allocates(Faulty):
    """Asks for more main memory than there is."""

    def fault(self) -> None:
        self._hoard = torch.empty(2**60)


class Sleeps(Faulty):
    """Sleeps for ever, and a process that it has started does so too."""

    def fault(self) -> None:
        endless = [sys.executable, "-c", "import time; time.sleep(1000)"]
        child = os.posix_spawn(sys.executable, endless, os.environ)
        Path(f"{self.note}.child").write_text(str(child))
        time.sleep(1000)


class Explodes(Faulty):
    """Its loss is infinite from some step on."""

    def loss(self, batch: Batch) -> Tensor:
        loss = super().loss(batch)
        return loss * torch.inf if self.index == 1 else loss


class Tells(Faulty):
    """Says in its error what nobody should know."""

    def fault(self) -> None:
        raise RuntimeError(f"no {os.environ['CLBENCH_TEST_TOKEN']} in {Path.home()}/data")
