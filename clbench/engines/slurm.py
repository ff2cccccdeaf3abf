"""Jobs of SLURM, by submitit: for sites where no command may run for long, or no Ray is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clbench.engines.pool import (
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
from clbench.errors import Submitted, UserError

#: Seconds between two looks at what has ended; submitit asks SLURM itself more rarely.
_PAUSE = 0.5


@dataclass(kw_only=True)
class Slurm(Engine):
    """A job for each run; preempted ones are saved, put into the queue again, and go on.

    Attributes:
        partition: Of the cluster; None: the site's own choice.
        cpus: Cores of a job.
        gpus: GPUs of a job.
        memory_gb: Main memory of a job; None: the site's own choice.
        minutes: That a job may take; one that takes longer is put into the queue again.
        at_once: Jobs that run at once, at most.
        requeues: Times that a job that took too long is put into the queue again.
        wait: For the jobs to end. Without it the command ends when they are in the queue; given
            again later, it says what is there and submits what is missing.
        folder: Where submitit leaves its files, on a disk that all machines share: pickles that
            are read again, and the logs of the jobs.
        cluster: "slurm", or "local" for processes of this machine, to try it.
    """

    partition: str | None = None
    cpus: int = 1
    gpus: int = 0
    memory_gb: float | None = None
    minutes: int = 1440
    at_once: int = 100
    requeues: int = 10
    wait: bool = True
    folder: str = "slurm"
    cluster: Literal["slurm", "local"] = "slurm"

    def __post_init__(self) -> None:
        from clbench.types import require

        require(self, "cpus", "minutes", "at_once", at_least=1)
        require(self, "gpus", "requeues", at_least=0)

    def open(self, workers: int, device: str) -> Jobs:
        refuse_workers(workers, "engine.at_once says how many jobs run at once")
        if device == "cuda" and not self.gpus:
            raise UserError("device=cuda needs a GPU in each job: set engine.gpus=1.")
        return Jobs(self)


class Jobs(Pool):
    """Work as jobs of SLURM, one array for all of it.

    Args:
        options: What a job needs.
    """

    def __init__(self, options: Slurm) -> None:
        submitit = _library()
        self.room = options.at_once
        self._wait = options.wait
        try:
            self._executor = submitit.AutoExecutor(
                folder=Path(options.folder).absolute(),
                cluster=options.cluster,
                slurm_max_num_timeout=options.requeues,
            )
        except RuntimeError as error:
            raise UserError(
                f"engine=slurm: {error} Start it where sbatch can be called."
            ) from error
        chosen = {
            "timeout_min": options.minutes,
            "cpus_per_task": options.cpus,
            "gpus_per_node": options.gpus or None,
            "mem_gb": options.memory_gb,
            "slurm_partition": options.partition,
            "slurm_array_parallelism": options.at_once,
            "slurm_job_name": "clbench",
        }
        self._executor.update_parameters(**{k: v for k, v in chosen.items() if v is not None})

    def close(self) -> None:
        """Jobs end by themselves, or with the iterator over their answers."""

    def answers(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer | Died | Raised]]:
        """See `Pool.answers`.

        Raises:
            Submitted: Where nobody waits.
        """
        parcels = [Parcel.of(function, item) for item in items]
        if not parcels:
            return
        jobs = self._executor.map_array(
            carrier(), [p.path for p in parcels], [p.content for p in parcels]
        )
        if not self._wait:
            raise Submitted(
                f"{len(jobs)} jobs are in the queue, from {jobs[0].job_id} on. The same command, "
                "when they have ended, says what is there and submits what is missing."
            )
        pending = dict(enumerate(jobs))
        try:
            while pending:
                for number in [number for number, job in pending.items() if job.done()]:
                    yield number, _answer(pending.pop(number))
                time.sleep(_PAUSE * bool(pending))
        finally:
            for job in pending.values():
                job.cancel(check=False)


def carrier() -> Any:
    """What opens a parcel in a job of submitit's, which pickles it by its value."""
    work = opener()

    class Carried:
        """Work that knows what to do when its job is to end."""

        def __call__(self, path: Sequence[str], content: bytes) -> Any:
            import os
            import signal

            # SIGUSR2 says that the job is to end. submitit would leave at once; a run that is
            # under way saves first, which it does after SIGUSR1.
            requeue: Any = signal.getsignal(signal.SIGUSR2)
            signal.signal(signal.SIGUSR1, requeue)
            signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
            try:
                return work(path, content)
            except BaseException as error:
                if type(error).__name__ == "Interrupted" and str(error) == "SIGUSR1":
                    requeue(signal.SIGUSR2, None)
                raise

        def checkpoint(self, path: Sequence[str], content: bytes) -> Any:
            from submitit.helpers import DelayedSubmission

            return DelayedSubmission(self, path, content)

    return Carried()


def _answer(job: Any) -> Any:
    try:
        return job.result()
    except Exception as error:  # submitit's own: the work's errors are answers
        state = str(job.state)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Died(f"its job {job.job_id} ended ({state}): {reason}", "OUT_OF_ME" in state)


def _library() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError(
            f"engine=slurm needs the package {error.name}, which is not installed. "
            "Install it with: pip install 'clbench[slurm]'"
        ) from error
    return submitit
