"""What a person sees while a run learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told by the loop how far it is."""

    def start(self, name: str, samples: int) -> None:
        """An experience of about this many sample visits begins."""

    def advance(self, samples: int) -> None:
        """A training step is done."""

    def finish(self, summary: str) -> None:
        """The experience is learned and scored."""


@contextmanager
def counting(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that precedes the learning; nothing where the error stream is no terminal.

    Args:
        title: Stands before the bar.
        unit: What is counted.

    Yields:
        The function to call with how much is done and how much there is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        TimeRemainingColumn(),
    )
    with Rich(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=0, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


class Silent:
    """Shows nothing."""

    def start(self, name: str, samples: int) -> None:
        """See `Progress`."""

    def advance(self, samples: int) -> None:
        """See `Progress`."""

    def finish(self, summary: str) -> None:
        """See `Progress`."""


class Bar:
    """A progress bar on the terminal's error stream; one plain line an experience elsewhere.

    Args:
        title: Stands before every line.
    """

    #: Seconds between redraws: drawing at every step would slow small models down.
    REDRAW = 0.1

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        self.console = Console(stderr=True)
        self.title = title
        self.bar = Rich(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} samples"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            refresh_per_second=1 / self.REDRAW,
        )
        self._pending, self._done, self._total = 0, 0, 0
        self._task = self.bar.add_task(title, total=1)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, name: str, samples: int) -> None:
        """See `Progress`."""
        self._pending, self._done, self._total = 0, 0, samples
        self.name = name
        self.bar.start()  # not sooner: while data are made, `counting` has the terminal
        self.bar.reset(self._task, total=samples, description=f"{self.title} · {name}")

    def advance(self, samples: int) -> None:
        """See `Progress`. Told to the bar once in a percent of the work."""
        self._pending += samples
        if self._pending * 100 >= self._total:
            self._done += self._pending
            self._pending = 0
            total = max(self._total, self._done)
            self.bar.update(self._task, completed=self._done, total=total)

    def finish(self, summary: str) -> None:
        """See `Progress`."""
        self.console.print(f"{self.title} · {self.name}: {summary}", highlight=False)
