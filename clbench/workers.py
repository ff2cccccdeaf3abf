"""Processes that work side by side; when one dies, its work is tried once more, then given up."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, TypeVar

from clbench.errors import Interrupted

Item = TypeVar("Item")
Answer = TypeVar("Answer")

#: Times that a process may die over the same work.
ATTEMPTS = 2
#: Seconds that processes get to save what they are at, when the work is to stop.
PATIENCE = 30.0


@dataclass(frozen=True)
class Died:
    """What work that killed its processes has instead of an answer.

    Attributes:
        code: Exit code of the last one; below 0: the signal that ended it.
    """

    code: int | None

    @property
    def out_of_memory(self) -> bool:
        """Killed outright, as the system does where memory runs out."""
        return self.code in (-signal.SIGKILL, 128 + signal.SIGKILL)

    def __str__(self) -> str:
        how = "killed, as happens where memory runs out" if self.out_of_memory else f"{self.code}"
        return f"its process died {ATTEMPTS} times (exit code: {how})"


class Workers:
    """So many processes, each a new interpreter; they start when the first work reaches them.

    They end with their maker: when it dies, they save what they are at and leave.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, int] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end([*self._idle, *self._busy])
        self._idle, self._busy = [], {}

    def map(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[Answer | Died]:
        """The answer to each item, in order, as soon as it is known.

        Args:
            function: Of a module's top level, or a partial of one.
            items: Plain data.

        Raises:
            Exception: What the function raises, at its item's turn.
        """
        try:
            yield from self._answers(function, items)
        finally:
            self._end(list(self._busy))
            self._busy = {}

    def _answers(self, function: Any, items: Sequence[Any]) -> Iterator[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        deaths = [0] * len(items)
        waiting = list(range(len(items)))
        for turn in range(len(items)):
            while turn not in answers:
                while waiting and len(self._busy) < self.count:
                    number = waiting.pop(0)
                    self._start(number, function, items[number])
                for number, answer in self._heard():
                    if not isinstance(answer, Died):
                        answers[number] = answer
                        continue
                    deaths[number] += 1
                    if deaths[number] < ATTEMPTS:
                        waiting.insert(0, number)
                    else:
                        answers[number] = True, answer
            well, found = answers.pop(turn)
            if not well:
                raise found
            yield found

    def _start(self, number: int, function: Any, item: Any) -> None:
        worker = self._idle.pop() if self._idle else _Worker()
        self._busy[worker] = number
        worker.ask(function, item)

    def _heard(self) -> Iterator[tuple[int, Any]]:
        """What came of some of the work, once there is any: (well, found), or a death."""
        ready = wait([part for w in self._busy for part in (w.connection, w.process.sentinel)])
        heard = [w for w in self._busy if {w.connection, w.process.sentinel} & {*ready}]
        for worker in heard:
            answer = worker.answer()
            number = self._busy.pop(worker)
            if not isinstance(answer, Died):
                self._idle.append(worker)
            yield number, answer

    @staticmethod
    def _end(workers: Sequence[_Worker]) -> None:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()


class _Worker:
    """One process, and the line to it."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def ask(self, function: Any, item: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its death is heard of
            self.connection.send((function, item))

    def answer(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Died(self.process.exitcode)

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()

    def join(self) -> None:
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        self.process.close()


def _serve(connection: Connection) -> None:
    """The life of a process: work for work, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its maker hears Ctrl-C, and ends it by SIGTERM
    threading.Thread(target=_die_with_maker, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, Interrupted):
        while True:
            function, item = connection.recv()
            try:
                answer: tuple[bool, Any] = True, function(item)
            except Exception as error:
                answer = False, _sendable(error)
            connection.send(answer)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some can't be made again from their message
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _die_with_maker() -> None:
    maker = parent_process()
    if maker is not None:
        wait([maker.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
