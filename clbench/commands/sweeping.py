"""Many commands at once: those that have not ended, one after another or where an engine says."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from clbench.commands.exits import INCOMPLETE, LATER, guarded
from clbench.commands.phases import Command, cell_of, command_of, engine_of, perform
from clbench.errors import UserError
from clbench.processes import launched

if TYPE_CHECKING:
    from clbench.engines.pool import Died, Engine, Pool
    from clbench.planning import Job


def sweep(jobs: Sequence[Job]) -> list[int]:
    """All jobs, but for runs that have ended; returns exit codes.

    What the engine is, the first job says. One job is one piece of work: in the phases that
    search, what follows depends on what was found. Where jobs are too few for the engine's room,
    they take turns, and the pieces are their trials and seeds.
    """
    from clbench.population.choice import choose

    first = jobs[0].tree
    command, engine = command_of(first), engine_of(first)
    launched.refuse(command.phase, alone=False)
    codes, left = unfinished(jobs)
    if not left:
        return codes
    with opened(command, engine, first) as pool:
        work = [jobs[number] for number in left]
        few = command.phase != "run" and pool is not None and len(work) < pool.room
        few = few or choose(first) > 0  # what trains together shares one terminal
        found = _in_turn(work, pool) if pool is None or few else side_by_side(work, pool)
    for number, code in zip(left, found, strict=True):
        codes[number] = code
    return codes


@contextmanager
def opened(command: Command, engine: Engine, tree: Mapping[str, Any]) -> Iterator[Pool | None]:
    """Where the command works: processes, or this one with runs that train together."""
    from clbench.population.choice import choose

    size = choose(tree)
    if not size:
        if tree["population"] == "auto" and command.phase != "run":
            word = "population=auto: each run trains by itself here; workers=N makes N at once."
            print(word, file=sys.stderr)
        with engine.open(command.workers, str(tree["device"])) as pool:
            yield pool
        return
    from clbench.population.pool import Population

    with Population(size) as population:
        yield population
        print(f"population={size}: {population.said()}", file=sys.stderr)


def unfinished(jobs: Sequence[Job]) -> tuple[list[int], list[int]]:
    """Exit codes so far, and the numbers of the jobs that are to be done."""
    from clbench.planning import Ledger

    ledger = Ledger(cell_of)
    codes, left = [0] * len(jobs), []
    for number, job in enumerate(jobs):
        if job.tree["phase"] != "run":
            left.append(number)
            continue
        try:
            result = ledger.ended(job)
        except UserError:  # the job itself says what is wrong, in its turn
            result = None
        if result is None:
            left.append(number)
        else:
            codes[number] = 0 if result.status == "complete" else INCOMPLETE
    ended = len(jobs) - len(left)
    if ended:
        words = f"{ended} of {len(jobs)} runs are there already; force=true repeats them."
        print(words, file=sys.stderr)
    return codes, left


def _in_turn(jobs: Sequence[Job], pool: Pool | None) -> list[int]:
    """One after another, in this process; what one of them raises is raised in the end."""
    codes, errors = [], []
    for job in jobs:
        try:
            codes.append(guarded(partial(perform, job, pool)))
        except Exception as error:
            codes.append(INCOMPLETE)
            errors.append(error)
    if errors:
        raise errors[0]
    return codes


@dataclass(frozen=True)
class _Said:
    """What a command elsewhere would have left on the terminal."""

    code: int
    out: str
    err: str


def side_by_side(jobs: Sequence[Job], pool: Pool) -> list[int]:
    """As pieces of work; those that something else was at are tried again in the end."""
    from clbench.engines.pool import Died, Raised

    codes, errors = [LATER] * len(jobs), []
    work = partial(_elsewhere, shutil.get_terminal_size().columns)
    for last in (False, True):
        left = [number for number, code in enumerate(codes) if code == LATER]
        for turn, found in pool.answers(work, [jobs[number] for number in left]):
            number = left[turn]
            if isinstance(found, Died):
                codes[number] = _lost(jobs[number], found)
            elif isinstance(found, Raised):
                codes[number] = INCOMPLETE
                errors.append(found.error)
            elif last or found.code != LATER:
                codes[number] = found.code
                print(found.out, end="", flush=True)
                print(found.err, end="", file=sys.stderr, flush=True)
    if errors:
        raise errors[0]
    return codes


def _elsewhere(columns: int, job: Job) -> _Said:
    """A command in a process that an engine has made: silent, with no processes of its own."""
    os.environ["COLUMNS"] = str(columns)
    here = {"_target_": "clbench.engines.local.Local"}
    job = replace(job, tree={**job.tree, "engine": here, "workers": 1, "progress": False})
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = guarded(partial(perform, job, None))
    return _Said(code, out.getvalue(), err.getvalue())


def _lost(job: Job, death: Died) -> int:
    """Says, and writes down, that nothing came of a job."""
    from clbench import cells, display

    title = f"{display.title(job.names)} seed {job.tree['seed']}"
    print(f"error: {title}: {death}", file=sys.stderr)
    if job.tree["phase"] == "run":
        return guarded(lambda: bool(cells.end(cell_of(job), death)) and INCOMPLETE)
    return INCOMPLETE
