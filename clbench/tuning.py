"""Two phases: choose hyper-parameters on one part of the data, evaluate them on the other."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from clbench.cells import Cell, Ended, end, execute
from clbench.conditions import identify
from clbench.engines.pool import Died, Pool
from clbench.errors import UserError
from clbench.files import write_atomically
from clbench.machine import isolated_rng
from clbench.metrics import headline
from clbench.results import Result
from clbench.samples import Samples
from clbench.search import Outcome, Sampler, Space, Values, hopeless, propose, with_values
from clbench.study import Protocol, Study, Trial
from clbench.types import Setting, Split, Stream, require

#: Tuning seeds start here, evaluation seeds stay below.
FIRST_TUNING_SEED = 1_000_000
#: Samples of each split that are compared, at most.
COMPARED = 50_000
#: Datasets hold a few images twice; a larger share of one split in the other is a leak.
TOLERATED = 0.01
#: Marks the runs of a search, which a leaderboard leaves out.
_TRIAL = {"protocol": "trial"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may cost, the same for every strategy.

    Attributes:
        trials: Configurations tried; failed ones count.
        tuning_seeds: Runs of each.
        seeds: Runs of the chosen one in the evaluation phase.
        sampler: "random", "qmc", "tpe" or "grid".
        batch: Trials between two looks at outcomes, for "tpe" and pruning.
        prune: Give up a trial whose first seeds are worse than the best trial's (Wilcoxon).
    """

    trials: int = 30
    tuning_seeds: int = 5
    seeds: int = 5
    sampler: Sampler = "random"
    batch: int = 5
    prune: bool = False

    def __post_init__(self) -> None:
        require(self, "trials", "tuning_seeds", "seeds", "batch", at_least=1)


def tune(
    cell: Cell,
    budget: Budget,
    protocol: Protocol = "two_phase",
    pool: Pool | None = None,
    tell: Callable[[int, Trial], None] = lambda *_: None,
) -> tuple[Study, Path]:
    """Searches, or finds what was searched before; goes on where it was interrupted.

    Every run of the search is an ordinary run with a folder of its own. The proposals depend on
    nothing but the space, the budget and earlier outcomes, so a search that was killed finds its
    runs again.

    Args:
        cell: What to tune; its split and seed are replaced.
        budget: Of the search.
        protocol: "two_phase" tunes on `Split.TUNE` with seeds that no evaluation has;
            "conventional" on the evaluation split and seeds, as most of the literature does.
        pool: Runs the trials of a batch side by side; see `clbench.engines`.
        tell: Called with number and outcome of each trial.

    Returns:
        The study and its file.

    Raises:
        UserError: If the splits share samples, or the cell can't work.
    """
    place, study = _place(cell, budget, protocol)
    earlier = _read(place)
    if earlier and not cell.force:
        return earlier, place
    space = Space(cell.composed["strategy"])
    plan = partial(_run_trial, cell, budget, protocol, space)
    shared = 0 if protocol == "conventional" else prove_disjoint(cell)
    trials: list[Trial] = []
    tried: dict[str, Trial] = {}
    while space and len(trials) < budget.trials:
        so_far = [Outcome(t.values, t.scores, t.state) for t in trials]
        proposals = propose(space, budget.sampler, budget.trials, budget.batch, 0, so_far)
        if not proposals:  # a grid with fewer combinations
            break
        batch = proposals[: budget.batch] if budget.prune else proposals
        work = partial(plan, so_far if budget.prune else ())
        # A small space is proposed from twice; its runs are there then, or on their way.
        new = {_key(v): v for v in batch if _key(v) not in tried}
        made = pool.map(work, list(new.values())) if pool else map(work, new.values())
        for values in batch:
            if _key(values) not in tried:
                found = next(made)
                tried[_key(values)] = _dead(values, found) if isinstance(found, Died) else found
            trials.append(tried[_key(values)])
            tell(len(trials), trials[-1])
    best = max((t for t in trials if t.mean is not None), key=_mean, default=None)
    chosen = best.values if best else None if space else {}
    study = replace(study, shared_samples=shared, trials=tuple(trials), chosen=chosen)
    write_atomically(place, study.to_json().encode())
    return study, place


def evaluate(
    cell: Cell,
    budget: Budget,
    protocol: Protocol = "two_phase",
    untuned: bool = False,
    pool: Pool | None = None,
    done: Callable[[Ended], None] = lambda _: None,
) -> list[Ended]:
    """The runs of the evaluation phase, with the values that were chosen.

    Args:
        cell: What to evaluate; its seed is the first one.
        budget: Of the search that chose, and the number of seeds.
        protocol: Under which was searched.
        untuned: Take the configuration's own values, and say so in the result.
        pool: Runs seeds side by side; see `clbench.engines`.
        done: Called after each run.

    Raises:
        UserError: If nothing was tuned for this scenario, strategy and budget.
    """
    values: Values = {}
    tuned = None
    if not untuned:
        study, place = find(cell, budget, protocol)
        if study.chosen is None:
            reasons = {t.reason for t in study.trials if t.reason}
            raise UserError(
                f"No trial of {place} completed, so nothing was chosen: {'; '.join(reasons)}. "
                "Change the search space, or set untuned=true."
            )
        values = study.chosen
        tuned = {"protocol": protocol, "study": study.name, **asdict(budget)}
    seeds = _evaluation_seeds(cell, budget)
    cells = [_at(cell, values, Split.EVALUATE, seed, tuned) for seed in seeds]
    ended = []
    made = pool.map(_surely, cells) if pool else map(_surely, cells)
    for one, found in zip(cells, made, strict=True):
        ended.append(end(one, found) if isinstance(found, Died) else found)
        done(ended[-1])
    return ended


def find(cell: Cell, budget: Budget, protocol: Protocol = "two_phase") -> tuple[Study, Path]:
    """The study of a cell.

    Raises:
        UserError: If there is none.
    """
    place, _ = _place(cell, budget, protocol)
    study = _read(place)
    if study is None:
        raise UserError(
            f"Nothing was tuned for {cell.names.strategy} on this shape of {cell.names.scenario} "
            f"with this budget: there is no {place}. Run the same command with phase=tune first, "
            "or set untuned=true to evaluate the configuration's own values."
        )
    return study, place


def prove_disjoint(cell: Cell) -> int:
    """Compares the samples of both splits.

    Returns:
        How many samples of one split are, byte for byte, in the other.

    Raises:
        UserError: If that is more than a dataset's own duplicates may explain.
    """
    scenario, _ = _at(cell, {}, Split.TUNE, FIRST_TUNING_SEED, None).build()
    found = []
    for split in (Split.TUNE, Split.EVALUATE):
        with isolated_rng(0, "stream"):
            stream = scenario.stream(split, 0)
        found.append(_digests(stream))
    shared = len(found[0] & found[1])
    if shared > TOLERATED * min(map(len, found)):
        raise UserError(
            f"{shared:,} samples are in both splits of {cell.names.scenario}, of "
            f"{min(map(len, found)):,} compared: what is tuned on one would be reported on the "
            "same. Mend the scenario, or use protocol=conventional knowingly."
        )
    return shared


def _run_trial(
    cell: Cell,
    budget: Budget,
    protocol: Protocol,
    space: Space,
    so_far: Sequence[Outcome],
    values: Values,
) -> Trial:
    """All seeds of one configuration."""
    scores: list[float] = []
    results: list[Result] = []
    state: Literal["complete", "pruned", "failed"] = "complete"
    reason = None
    for seed in _tuning_seeds(cell, budget, protocol):
        split = Split.TUNE if protocol == "two_phase" else Split.EVALUATE
        try:
            result = execute(_at(cell, values, split, seed, _TRIAL)).result
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:  # the run's folder has the traceback
            state, reason = "failed", f"{type(error).__name__}: {error}"
            break
        results.append(result)
        score = score_of(result)
        if score is None:
            state, reason = "failed", f"{result.status}: {result.reason or 'no finite score'}"
            break
        scores.append(score)
        if budget.prune and len(scores) < budget.tuning_seeds and hopeless(space, so_far, scores):
            state = "pruned"
            break
    costs = [result.costs for result in results]
    return Trial(
        values,
        tuple(scores),
        state,
        reason,
        tuple(str(result.run["run_id"]) for result in results),
        sum(float(c.get(k) or 0) for c in costs for k in ("train_seconds", "evaluate_seconds")),
        sum(int(c.get("train_samples") or 0) for c in costs),
        max((int(c.get("peak_memory_bytes") or 0) for c in costs), default=0),
    )


def _surely(cell: Cell) -> Ended:
    """Runs a cell; if it fails, its folder has the traceback, and the other seeds go on."""
    try:
        return execute(cell)
    except UserError:
        raise
    except Exception as error:
        return end(cell, error)


def _dead(values: Values, death: Died) -> Trial:
    return Trial(values, (), "failed", str(death), (), 0.0, 0, 0)


def score_of(result: Result) -> float | None:
    """The headline metric of a complete run, larger is better; None where there is none."""
    name, higher = headline(Setting(result.run["setting"]).value)
    value = result.metrics.get(name) if result.status == "complete" else None
    if value is None or not math.isfinite(value):
        return None
    return value if higher else -value


def _at(
    cell: Cell, values: Values, split: Split, seed: int, tuned: Mapping[str, Any] | None
) -> Cell:
    """The cell with other values, split and seed."""
    strategy = with_values(cell.composed["strategy"], values)
    composed = {**cell.composed, "strategy": strategy, "split": split.value, "seed": seed}
    conditions = replace(cell.conditions, split=split, seed=seed)
    return replace(cell, composed=composed, conditions=conditions, tuned=tuned)


def _evaluation_seeds(cell: Cell, budget: Budget) -> range:
    first = cell.conditions.seed
    if first + budget.seeds > FIRST_TUNING_SEED:
        raise UserError(f"seed={first}: seeds from {FIRST_TUNING_SEED:,} on are for tuning.")
    return range(first, first + budget.seeds)


def _tuning_seeds(cell: Cell, budget: Budget, protocol: Protocol) -> range:
    first = FIRST_TUNING_SEED if protocol == "two_phase" else _evaluation_seeds(cell, budget)[0]
    return range(first, first + budget.tuning_seeds)


def _place(cell: Cell, budget: Budget, protocol: Protocol) -> tuple[Path, Study]:
    """Where a study lies, and its beginning: both follow from what decides it."""
    planned = _at(cell, {}, Split.TUNE if protocol == "two_phase" else Split.EVALUATE, 0, None)
    scenario, strategy = planned.build()
    # Whoever trained together learned the same: the study is found by those who do not.
    conditions = replace(planned.conditions, population=0)
    run = identify(scenario, strategy, conditions, planned.names)
    label = ".".join(filter(None, (run["strategy"], run["base"])))
    space = Space(cell.composed["strategy"]).texts
    spent = {k: v for k, v in asdict(budget).items() if k != "seeds" or protocol != "two_phase"}
    decides = [run["run_id"], space, spent, protocol]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{run['scenario']}-{label}-{digest}"
    metric, higher = headline(scenario.setting.value)
    shape = {"name": run["scenario"], "options": run["options"]["scenario"]}
    metric = metric if higher else f"-{metric}"
    study = Study(name, protocol, shape, label, space, metric, asdict(budget), 0, (), None)
    return cell.results_dir / "tuned" / f"{name}.json", study


def _read(place: Path) -> Study | None:
    try:
        return Study.from_json(place.read_text())
    except (OSError, ValueError):
        return None


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True)


def _mean(trial: Trial) -> float:
    return trial.mean if trial.mean is not None else -math.inf


def _digests(stream: Stream) -> set[bytes]:
    """Of all stored samples of a stream, or of evenly spaced ones."""
    parts = list(_parts(stream))
    every = -(-sum(map(len, parts)) // COMPARED)
    found: set[bytes] = set()
    for samples in parts:
        for index in samples.index[::every].split(4096):
            rows = samples.source.gather(index).contiguous().numpy()
            found.update(hashlib.blake2b(row.tobytes(), digest_size=12).digest() for row in rows)
    return found


def _parts(stream: Stream) -> Iterator[Samples]:
    """What belongs to one split alone."""
    yield from (e.train for e in stream.experiences if e.train is not None)
    yield from {id(test): test for test in stream.tests}.values()
    yield from (arrivals.samples for arrivals in stream.arrivals)
