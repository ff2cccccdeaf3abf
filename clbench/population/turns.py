"""Work that goes on in turns: a thread that is waited for, until it waits itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from clbench.population.generators import GlobalGenerators


class Turns:
    """A thread that works only while somebody waits for it, with global generators of its own.

    Random numbers, `no_grad`, autocast and the number of threads are then the thread's, as if it
    were alone in its process.

    Args:
        work: What to do.

    Attributes:
        request: What it waits for; None while it works.
        ended: It has, and `found` or `error` says how.
        found: What the work returned.
        error: What it raised.
        seconds: That it has worked, or was charged with.
        answered: Requests that were.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.request: Any = None
        self.ended = False
        self.found: Any = None
        self.error: BaseException | None = None
        self.seconds, self.answered = 0.0, 0
        self._work, self._answer = work, None
        self._working, self._began = False, 0.0
        self._generators = GlobalGenerators()
        # Each lock is the other side's leave to go on.
        self._go, self._wait = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._wait.acquire()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def go_on(self, answer: Any = None) -> None:
        """Lets it work until it asks or ends.

        Args:
            answer: To its request; an exception is raised there.
        """
        if self.request is None:
            self._thread.start()
        self.request, self._answer = None, answer
        self.answered += 1
        self._generators.exchange()
        self._working, self._began = True, time.perf_counter()
        self._go.release()
        self._return()

    def ask(self, request: Any) -> Any:
        """In the thread itself: waits for an answer.

        Raises:
            BaseException: If that is the answer.
        """
        self.request = request
        self._wait.release()
        self._go.acquire()
        if isinstance(self._answer, BaseException):
            raise self._answer
        answer, self._answer = self._answer, None
        return answer

    def clock(self) -> float:
        """Seconds of its own."""
        return self.seconds + (time.perf_counter() - self._began if self._working else 0)

    def leave(self, reason: BaseException) -> None:
        """Ends it where it is."""
        if self._working:  # who waited for it was interrupted
            self._return()
        while self.request is not None:
            self.go_on(reason)

    def _return(self) -> None:
        """Waits until it waits or has ended."""
        self._wait.acquire()
        self._working = False
        self.seconds += time.perf_counter() - self._began
        self._generators.exchange()
        if self.ended:
            self._thread.join()

    def _live(self) -> None:
        self._go.acquire()
        try:
            self.found = self._work()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._wait.release()
