"""Ray core tasks, here or on a cluster: a process for each piece of work, tried again elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clbench.engines.pool import (
    PATIENCE,
    Answer,
    Died,
    Engine,
    Item,
    Parcel,
    Pool,
    Raised,
    opener,
    refuse_workers,
)
from clbench.errors import Interrupted, UserError

#: Seconds that a cluster may take to answer.
_ANSWER = 8
#: Tasks that Ray knows of at once: waiting takes time that grows with their number.
_AT_ONCE = 1000
#: What to do where a cluster refuses.
_TOKEN = (
    "Clusters ask for a token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=, the same on all of "
    "its machines and here) unless they were started with RAY_AUTH_MODE=disabled."
)


@dataclass(kw_only=True)
class Ray(Engine):
    """Tasks of Ray: each in a process of its own, with its share of a machine.

    Attributes:
        address: Of the cluster's head, "host:port"; None: what RAY_ADDRESS says, or, without it,
            a Ray of this machine alone, which ends with the command.
        cpus: Cores that a run needs.
        gpus: GPUs that a run needs, 0.5 for two runs on one; None: one, where the cluster has any
            and `device=` allows.
        retries: Times that work is tried again whose process, or machine, died.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    retries: int = 3

    def __post_init__(self) -> None:
        from clbench.types import require

        require(self, "cpus", above=0)
        require(self, "retries", at_least=0)
        if self.gpus is not None:
            require(self, "gpus", at_least=0)

    def open(self, workers: int, device: str) -> Tasks:
        refuse_workers(workers, "the cluster's cores decide: engine.cpus is what a run needs")
        return Tasks(self, device)


class Tasks(Pool):
    """Work as tasks of Ray.

    Args:
        options: Where, and what a task needs.
        device: That runs ask for.
    """

    def __init__(self, options: Ray, device: str) -> None:
        self._ray = _library(options.retries)
        self._options = options
        self._own = not self._ray.is_initialized()
        if self._own:
            _connect(self._ray, options.address)
        there = self._ray.cluster_resources()
        gpus = options.gpus
        if gpus is None:
            gpus = float(device != "cpu" and there.get("GPU", 0) >= 1)
        self.room = max(1, int(there.get("CPU", 1) / options.cpus))
        if gpus:
            self.room = max(1, min(self.room, int(there.get("GPU", 0) / gpus)))
        self._gpus = gpus

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()

    def answers(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer | Died | Raised]]:
        """See `Pool.answers`."""
        # A new process for each: nothing of a run is left to the next, least of all on a GPU.
        task = self._ray.remote(max_calls=1)(opener()).options(
            num_cpus=self._options.cpus,
            num_gpus=self._gpus,
            max_retries=self._options.retries,
            retry_exceptions=False,
        )
        waiting = iter(enumerate(items))
        pending: dict[Any, int] = {}
        try:
            while True:
                while len(pending) < _AT_ONCE and (following := next(waiting, None)):
                    number, item = following
                    parcel = Parcel.of(partial(_or_elsewhere, function), item)
                    pending[task.remote(parcel.path, parcel.content)] = number
                if not pending:
                    return
                done = self._first(list(pending))
                yield pending.pop(done), self._answer(done)
        finally:
            self._stop(list(pending))

    def _first(self, tasks: Sequence[Any]) -> Any:
        """The first that is done."""
        try:
            (done, *_), _ = self._ray.wait(tasks, num_returns=1)
        except SystemError as error:  # what Ray makes of what a handler of signals raises
            if isinstance(error.__cause__, (Interrupted, KeyboardInterrupt)):
                raise error.__cause__ from None
            raise
        return done

    def _answer(self, done: Any) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(done)
        except exceptions.OutOfMemoryError as error:
            return Died(f"Ray ended its process for want of memory: {_first_line(error)}", True)
        except exceptions.RayTaskError as error:
            return Raised(
                UserError(
                    f"A machine of the cluster can't do the work: {error.cause!r}. It needs the "
                    "Python packages and the folders that this one has."
                )
            )
        except exceptions.RayError as error:
            times = self._options.retries + 1
            return Died(f"its process died, up to {times} times: {_first_line(error)}")

    def _stop(self, tasks: Sequence[Any]) -> None:
        """Asks tasks to save what they are at; ends those that do not."""
        for force, seconds in ((False, PATIENCE), (True, 1.0)):
            for task in tasks:
                with suppress(self._ray.exceptions.RayError, ValueError):
                    self._ray.cancel(task, force=force)
            if tasks:
                _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=seconds)


def _or_elsewhere(function: Callable[[Any], Any], item: Any) -> Any:
    """The work, unless its machine is going away: another one goes on from what was saved."""
    try:
        return function(item)
    except Interrupted:
        os._exit(os.EX_TEMPFAIL)


def _library(retries: int) -> Any:
    """Ray, which reads these variables when it is imported."""
    os.environ.setdefault("RAY_task_oom_retries", str(retries))  # else memory is tried for ever
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", str(_ANSWER))  # seconds, one each
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise UserError(
            f"engine=ray needs the package {error.name}, which is not installed. "
            "Install it with: pip install 'clbench[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Joins the cluster that was asked for, or starts one of this machine.

    Never the one that Ray found here last, which may long be dead.

    Raises:
        UserError: If no cluster answers there, or it does not let this user in.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "auto":
        address = _last_address()
    if address != "local":
        _require_answer(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        options["include_dashboard"] = False
    try:
        with _signals_kept():
            ray.init(address=address, **options)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"The Ray cluster at {address} does not let this command in. {_TOKEN}"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(_advice(address, _first_line(error))) from error


def _require_answer(address: str) -> None:
    """Refuses an address where nothing listens: Ray would try for minutes.

    Raises:
        UserError: With what to do.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise UserError(
            f"RAY_ADDRESS={address} is no address of a cluster's head, as host:6379 is. Without "
            "one this machine is used alone."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except OSError as error:
        raise UserError(_advice(address, str(error))) from error


def _advice(address: str, reason: str) -> str:
    return (
        f"No Ray cluster answers at {address}: {reason} Start one (ray start --head), give the "
        "address of its head as RAY_ADDRESS=host:6379, or unset that to use this machine alone. "
        f"It may be there and not let this command in: {_TOKEN}"
    )


def _last_address() -> str:
    """The cluster that was started last on this machine, as `ray start` writes it down."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        return file.read_text().strip()
    except OSError as error:
        raise UserError(_advice("auto", f"{file} can't be read ({error.strerror}).")) from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler of its own for SIGTERM; ours say what they say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
