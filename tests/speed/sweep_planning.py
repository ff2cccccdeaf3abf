"""Seconds to plan a sweep of 10,000 runs, half there: `python tests/speed/sweep_planning.py`.

Beside it, what composing them by Hydra would take, twice for each as its own sweeper does, from the
time of a few.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

from hydra import initialize_config_dir  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.types import RunMode  # noqa: E402

from clbench import userspace  # noqa: E402
from clbench.cells import execute  # noqa: E402
from clbench.commands.phases import cell_of  # noqa: E402
from clbench.commands.sweeping import unfinished  # noqa: E402
from clbench.planning import Composer, Job  # noqa: E402
from clbench.results import RunFolder, with_seed  # noqa: E402

STRATEGIES = ("finetune", "replay", "derpp", "ewc", "lwf", "si", "mas", "agem", "icarl", "er_ace")
SEEDS = 1000
#: Compositions whose time is taken.
SAMPLE = 20


def there(job: Job) -> None:
    """A result for every second seed of a job's run: copies of one."""
    ended = execute(cell_of(job))
    text = ended.folder.result_file.read_text()
    first = ended.folder.path.name
    for seed in range(2, SEEDS, 2):
        content = json.loads(text)
        content["run"] |= {"seed": seed, "run_id": with_seed(first, seed)}
        folder = RunFolder(Path(job.tree["results_dir"]), with_seed(first, seed))
        folder.path.mkdir(parents=True)
        folder.result_file.write_text(json.dumps(content))


def main() -> None:
    userspace.join(userspace.suite())
    with (
        tempfile.TemporaryDirectory() as results,
        initialize_config_dir(str(userspace.configuration()), version_base="1.3"),
    ):
        fixed = [f"results_dir={results}", "scenario.epochs=1", "scenario.n_experiences=2"]
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", fixed, run_mode=RunMode.MULTIRUN)
        sweep = [[f"strategy={s}", f"seed={n}", *fixed] for s in STRATEGIES for n in range(SEEDS)]
        report(loader, master, sweep)


def report(loader: object, master: object, sweep: Sequence[Sequence[str]]) -> None:
    """Takes the times, and prints them."""
    began = time.perf_counter()
    for overrides in sweep[:SAMPLE]:
        loader.load_sweep_config(master, [*overrides])  # type: ignore[attr-defined]
    each = (time.perf_counter() - began) / SAMPLE
    composer = Composer(loader, master)  # type: ignore[arg-type]
    for overrides in sweep[::SEEDS]:
        there(composer.job(overrides))
    began = time.perf_counter()
    composer = Composer(loader, master)  # type: ignore[arg-type]
    jobs = [composer.job(overrides) for overrides in sweep]
    composed = time.perf_counter() - began
    with redirect_stderr(StringIO()):
        _, left = unfinished(jobs)
    whole = time.perf_counter() - began
    print(
        f"{len(sweep)} runs, {len(sweep) - len(left)} there: {composed:.1f} s to compose, "
        f"{whole - composed:.1f} s to find those; by Hydra {2 * each * len(sweep) / 60:.0f} minutes"
    )


if __name__ == "__main__":
    main()
