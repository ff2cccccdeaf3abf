"""Processes of this machine, a GPU each; when one dies, its work is tried once more."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from clbench.engines.pool import PATIENCE, Answer, Died, Engine, Item, Pool, Raised, attempted
from clbench.errors import Interrupted


@dataclass(kw_only=True)
class Local(Engine):
    """So many processes as `workers=` says; with one of them, this one.

    Attributes:
        retries: Times that work is tried again whose process died.
    """

    retries: int = 1

    def __post_init__(self) -> None:
        from clbench.types import require

        require(self, "retries", at_least=0)

    def open(self, workers: int, device: str) -> AbstractContextManager[Pool | None]:
        if workers == 1:
            return nullcontext()
        return Workers(workers, self.retries, () if device == "cpu" else gpus())


class Workers(Pool):
    """So many processes, each a new interpreter; they start when the first work reaches them.

    They end with their maker: when it dies, they save what they are at and leave. The cores of
    the machine are divided among them: what asks for all gets a process's share.

    Args:
        count: How many.
        retries: Times that work is tried again whose process died.
        gpus: That they take turns in, each process one; empty: none is assigned.
    """

    def __init__(self, count: int, retries: int = 1, gpus: Sequence[str] = ()) -> None:
        self.room = count
        self.retries = retries
        self._shares = [_share(count, gpus, number) for number in range(count)]
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, int] = {}

    def close(self) -> None:
        self._end([*self._idle, *self._busy])
        self._idle, self._busy = [], {}

    def answers(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer | Died | Raised]]:
        """See `Pool.answers`."""
        deaths = [0] * len(items)
        waiting = list(range(len(items)))
        waiting.reverse()
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self.room:
                    number = waiting.pop()
                    self._start(number, function, items[number])
                for number, answer in self._heard():
                    if isinstance(answer, _Ended):
                        deaths[number] += 1
                        if deaths[number] <= self.retries:
                            waiting.append(number)
                            continue
                        answer = answer.after(deaths[number])
                    yield number, answer
        finally:
            self._end(list(self._busy))
            self._busy = {}

    def _start(self, number: int, function: Any, item: Any) -> None:
        worker = self._idle.pop() if self._idle else self._new()
        self._busy[worker] = number
        worker.ask(function, item)

    def _new(self) -> _Worker:
        taken = [worker.share for worker in self._busy]
        return _Worker(next(share for share in self._shares if share not in taken))

    def _heard(self) -> Iterator[tuple[int, Any]]:
        """What came of some of the work, once there is any."""
        ready = wait([part for w in self._busy for part in (w.connection, w.process.sentinel)])
        heard = [w for w in self._busy if {w.connection, w.process.sentinel} & {*ready}]
        for worker in heard:
            answer = worker.answer()
            number = self._busy.pop(worker)
            if not isinstance(answer, _Ended):
                self._idle.append(worker)
            yield number, answer

    @staticmethod
    def _end(workers: Sequence[_Worker]) -> None:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA calls them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class _Share:
    """What a process has of the machine: its number, and variables of its environment."""

    number: int
    variables: tuple[tuple[str, str], ...]


def _share(count: int, gpus: Sequence[str], number: int) -> _Share:
    from clbench.machine import available_cores

    variables = [("OMP_NUM_THREADS", str(max(1, available_cores() // count)))]
    if gpus:
        variables.append(("CUDA_VISIBLE_DEVICES", gpus[number % len(gpus)]))
    return _Share(number, tuple(variables))


@dataclass(frozen=True)
class _Ended:
    """The end of a process that was at work.

    Attributes:
        code: Its exit code; below 0: the signal that ended it.
    """

    code: int | None

    def after(self, deaths: int) -> Died:
        killed = self.code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        how = "killed, as happens where memory runs out" if killed else f"{self.code}"
        return Died(f"its process died {deaths} times (exit code: {how})", killed)


class _Worker:
    """One process, and the line to it."""

    def __init__(self, share: _Share) -> None:
        context = get_context("spawn")
        self.share = share
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, share.variables))
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
            return _Ended(self.process.exitcode)

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()

    def join(self) -> None:
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()
        self.process.close()


def _serve(connection: Connection, variables: Sequence[tuple[str, str]]) -> None:
    """The life of a process: work for work, until nobody asks any more."""
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its maker hears Ctrl-C, and ends it by SIGTERM
    threading.Thread(target=_die_with_maker, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, Interrupted):
        while True:
            function, item = connection.recv()
            connection.send(attempted(function, item))


def _die_with_maker() -> None:
    maker = parent_process()
    if maker is not None:
        wait([maker.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
