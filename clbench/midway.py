"""A run is saved in the midst of an experience, and goes on from there, bit for bit.

A loop that learns asks at its top, before every step, whether to take it. Now and then, or when
somebody wants the run to stop, that is where it is saved. A run that goes on learns the experience
from its beginning again, but takes none of the steps that were taken: the loop draws their batches
once more, which brings the loader to its place, and then everything is put back as it was.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench import checkpoint
from clbench.errors import UserError
from clbench.interruption import Stop
from clbench.scratch import Unlike


class Midway:
    """Safe points within one experience after another.

    Args:
        folder: Where it is saved; None: nowhere.
        minutes: Between two times that it is; 0: only when the run should stop.
        stop: Whether it should.
        begin: Told when the first step of an experience is about to be taken.
        save: All state of the run, as tensors and plain data.
        load: Puts it back.
        log: Told what happened.
    """

    def __init__(
        self,
        folder: Path | None,
        minutes: float,
        stop: Stop,
        begin: Callable[[], None],
        save: Callable[[], dict[str, Any]],
        load: Callable[[Mapping[str, Any]], None],
        log: Callable[[str], None],
    ) -> None:
        self.folder, self.stop, self.log = folder, stop, log
        self._begin, self._save, self._load = begin, save, load
        self._seconds = 60 * minutes
        self._pending: dict[str, Any] | None = None
        self._experience = self._steps = 0
        self._last = time.monotonic()

    @property
    def replaying(self) -> bool:
        """What happens now has happened before, and is not to be counted again."""
        return self._pending is not None

    def enter(self, experience: int, saved: dict[str, Any] | None = None) -> None:
        """An experience begins, or begins again up to where it was saved."""
        self._experience, self._steps, self._pending = experience, 0, saved
        self._last = time.monotonic()

    def proceed(self) -> bool:
        """A loop is about to take a step; False: it was taken before, and is in the state.

        Raises:
            KeyboardInterrupt, Interrupted, TimedOut: If the run should stop; it is saved then.
        """
        if not self._steps:
            self._begin()
        if self._pending is not None:
            if self._steps < self._pending["steps"]:
                self._steps += 1
                return False
            self._go_on(self._pending)
        else:
            asked = self.stop.asked
            if asked or self._due():
                self._keep()
            if asked:
                self.stop.obey()
        self._steps += 1
        return True

    def leave(self) -> None:
        """The experience is learned.

        Raises:
            UserError: If it ended before it came to where it was saved.
        """
        if self._pending is not None:
            self._give_up(f"it has {self._steps} steps now")

    def _due(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._last >= self._seconds

    def _keep(self) -> None:
        if self.folder is None:
            return
        try:
            content = self._save()
        except TypeError as error:
            self.log(f"not saved within the experience: {error}")
            self._seconds = 0
            return
        content |= {"experience": self._experience, "steps": self._steps, **_random_states()}
        checkpoint.save(self.folder, content)
        self.log(f"saved within experience {self._experience + 1} after {self._steps} steps")
        self._last = time.monotonic()

    def _go_on(self, saved: dict[str, Any]) -> None:
        try:
            self._load(saved)
        except Unlike as error:
            self._give_up(str(error))
        _set_random_states(saved)
        self._pending = None
        self._last = time.monotonic()
        self.log(f"resumed within experience {self._experience + 1} after {self._steps} steps")

    def _give_up(self, reason: str) -> None:
        if self.folder is not None:
            checkpoint.discard(self.folder)
        raise UserError(
            f"The run can't go on from within experience {self._experience + 1}: {reason}. What "
            f"was saved there ({self.folder}) is removed; the same command goes on from the "
            "experience before."
        )


def _random_states() -> dict[str, Any]:
    """Of the global generators, which dropout and foreign code draw from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return {"random": states}


def _set_random_states(saved: Mapping[str, Any]) -> None:
    states = saved["random"]
    torch.set_rng_state(states["torch"].cpu())
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    if torch.cuda.is_initialized() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
