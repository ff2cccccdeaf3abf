"""What every engine offers: work done side by side, and word of what came of it."""

from __future__ import annotations

import os
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from clbench.errors import UserError

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Opened = TypeVar("Opened", bound="Pool")

#: Seconds that work gets to save what it is at, when it is to stop.
PATIENCE = 30.0


@dataclass(frozen=True)
class Died:
    """What work that killed its processes has instead of an answer.

    Attributes:
        reason: How they died, and how often.
        out_of_memory: As happens where memory runs out.
    """

    reason: str
    out_of_memory: bool = False

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Raised:
    """What work that raised has instead of an answer."""

    error: Exception


class Pool(ABC):
    """Processes, here or elsewhere, that take work; they end with the block.

    Attributes:
        room: Pieces of work that are done at once, as far as one can say.
    """

    room: int

    @abstractmethod
    def answers(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer | Died | Raised]]:
        """What came of each item, with its number, as soon as it is known.

        What is under way when the iterator is closed is asked to stop, and ended.

        Args:
            function: Of a module's top level, or a partial of one.
            items: Plain data.
        """

    def map(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[Answer | Died]:
        """The answer to each item, in order, as soon as it is known; see `answers`.

        Raises:
            Exception: What the function raises, at its item's turn.
        """
        known: dict[int, Answer | Died | Raised] = {}
        turn = 0
        with closing(self.answers(function, items)) as answers:  # type: ignore[type-var]
            for number, answer in answers:
                known[number] = answer
                while turn in known:
                    found = known.pop(turn)
                    turn += 1
                    if isinstance(found, Raised):
                        raise found.error
                    yield found

    @abstractmethod
    def close(self) -> None:
        """Gives back what it holds; what is under way has ended with the iterator over it."""

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(kw_only=True)
class Engine(ABC):
    """Where runs are made; its fields are the options of conf/engine/<name>.yaml."""

    @abstractmethod
    def open(self, workers: int, device: str) -> AbstractContextManager[Pool | None]:
        """Somewhere to work; None where this process is enough.

        Args:
            workers: Processes on this machine.
            device: That runs ask for: "auto", "cpu" or "cuda".

        Raises:
            UserError: If there is no such place, or something to install.
        """


@dataclass(frozen=True)
class Parcel:
    """Work, packed: names and relative paths mean where it is opened what they mean here.

    Attributes:
        path: Where Python looks for modules.
        content: The pickle of working folder, function and item.
    """

    path: tuple[str, ...]
    content: bytes

    @staticmethod
    def of(function: Callable[[Item], Answer], item: Item) -> Parcel:
        return Parcel(tuple(sys.path), pickle.dumps((Path.cwd(), function, item)))


def opener() -> Callable[[Sequence[str], bytes], Any]:
    """What opens a parcel elsewhere; cloudpickle takes it along, for it is no module's."""

    def carried(path: Sequence[str], content: bytes) -> Any:
        import sys

        # Before the suite can be found. In this order: an engine may have put the working folder
        # first, and a torch.py in it is not PyTorch.
        sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]
        from clbench.engines.pool import opened

        return opened(content)

    return carried


def opened(content: bytes) -> Any:
    """The answer to the work of a parcel, in this process."""
    folder, function, item = pickle.loads(content)
    try:
        os.chdir(folder)
    except OSError as error:
        return Raised(
            UserError(
                f"A machine that was to work has no folder {folder} ({error.strerror}). Start the "
                "command in a folder that all machines share."
            )
        )
    return attempted(function, item)


def attempted(function: Callable[[Item], Answer], item: Item) -> Answer | Raised:
    """The answer, or what was raised, made so that it can be sent."""
    try:
        return function(item)
    except Exception as error:
        return Raised(_sendable(error))


def refuse_workers(workers: int, instead: str) -> None:
    """Refuses `workers=` where another option decides.

    Raises:
        UserError: Naming that option.
    """
    if workers != 1:
        raise UserError(f"workers={workers} is for engine=local. Here {instead}.")


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some can't be made again from their message
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
