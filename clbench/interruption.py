"""Signals that ask a run to stop, and the clock that does: flags, obeyed where it is safe."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from clbench.errors import Interrupted, TimedOut

#: Schedulers send one of these some time before they kill.
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
#: Seconds between the end of the time and the end of patience: a step may take that long.
GRACE = 10.0
_ONCE = b"\nStopping where it can be continued; Ctrl-C again stops at once.\n"


class Stop:
    """Whether a run should stop, and why.

    Attributes:
        saves: There is something that a safe point could save; before, a signal ends it at once.
    """

    def __init__(self) -> None:
        self.saves = False
        self._owner = os.getpid()
        self._signal: int | None = None
        self._expired = False

    @property
    def asked(self) -> bool:
        """It should stop at the next safe point."""
        return self._signal is not None or self._expired

    def obey(self) -> None:
        """Leaves, if the run was asked to.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            Interrupted: After another signal.
            TimedOut: When the time is up.
        """
        self.obey_signal()
        if self._expired:
            raise TimedOut

    def obey_signal(self) -> None:
        """`obey`, whatever the clock says."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            raise Interrupted(signal.Signals(self._signal).name)

    def on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The handler: sets the flag, and no more."""
        if os.getpid() != self._owner:  # a forked child, whom nobody asks to save anything
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        again = self._signal == number == signal.SIGINT
        self._signal = number
        if again or not self.saves:
            self.obey_signal()
        if number == signal.SIGINT and os.isatty(2):
            os.write(2, _ONCE)

    def on_alarm(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The clock: sets the flag; the next time it goes off, nothing is waited for."""
        if self._expired:
            raise TimedOut
        self._expired = True

    def limit(self, seconds: float) -> None:
        """Starts the clock, where signals reach this thread.

        Args:
            seconds: Left; then as many as `GRACE` for a safe point.
        """
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), GRACE)


@contextmanager
def watched(signals: bool) -> Iterator[Stop]:
    """Signals and clock of a run, in the block; outside, they do what they did before.

    Args:
        signals: Flags for signals too; without a place to save to, they are better obeyed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [n for n in (*PREEMPTIONS, signal.SIGINT) if signals]
    # What is ignored stays so (nohup), and so does what is not Python's.
    kept = [n for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, stop.on_signal) for number in kept}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop.on_alarm)
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def at_once() -> Iterator[None]:
    """In the block, a preemption ends what no run watches over: composing, loading, reporting.

    Raises:
        Interrupted: When a signal comes.
    """
    with watched(signals=True) as stop:
        assert not stop.saves
        yield
