"""Signals that ask a run to stop, and the clock that does: flags, obeyed where it is safe."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
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

    Args:
        agree: The largest code of all processes of the run.
    """

    def __init__(self, agree: Callable[[int], int] = int) -> None:
        self.saves = False
        self._agree, self._agreed = agree, 0
        self._owner = os.getpid()
        self._signal: int | None = None
        self._expired = False

    @property
    def asked(self) -> bool:
        """It should stop at the next safe point; all processes of the run ask at the same time."""
        own = int(self._expired) if self._signal is None else 1 + self._signal
        self._agreed = self._agree(own)
        return self._agreed > 0

    def heed(self) -> None:
        """`obey` whatever is asked now."""
        if self.asked:
            self.obey()

    def obey(self) -> None:
        """Leaves, if the run was asked to when `asked` was last looked at.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            Interrupted: After another signal.
            TimedOut: When the time is up.
        """
        if self._agreed > 1:
            _leave(self._agreed - 1)
        if self._agreed:
            raise TimedOut

    def obey_signal(self) -> None:
        """Leaves after a signal, at once, whatever the clock and other processes say."""
        if self._signal is not None:
            _leave(self._signal)

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


def _leave(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(signal.Signals(number).name)


@contextmanager
def watched(signals: bool, agree: Callable[[int], int] = int) -> Iterator[Stop]:
    """Signals and clock of a run, in the block; outside, they do what they did before.

    Args:
        signals: Flags for signals too; without a place to save to, they are better obeyed.
        agree: See `Stop`.
    """
    stop = Stop(agree)
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
