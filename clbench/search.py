"""Search spaces in Hydra's sweep grammar, and proposals from them."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clbench.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

Sampler = Literal["random", "qmc", "tpe", "grid"]
#: Values of hyper-parameters by name; a name with dots lies in a wrapped strategy.
Values = dict[str, Any]
_GRAMMAR = (
    "choice(a, b, ...), interval(low, high), int(interval(low, high)), range(start, stop, step), "
    "or one of the last three in tag(log, ...)"
)


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        values: Proposed.
        scores: Of its runs, one a tuning seed, in the order of the seeds; larger is better.
        state: "complete", "pruned" after some seeds, or "failed".
    """

    values: Values
    scores: tuple[float, ...]
    state: Literal["complete", "pruned", "failed"]


class Space:
    """The search space of a strategy.

    Args:
        node: The strategy's part of a configuration, with `search` in it and in each `base`.

    Raises:
        UserError: If an entry is no sweep, or names no hyper-parameter.
    """

    def __init__(self, node: Mapping[str, Any]) -> None:
        self.texts = dict(_entries(node))
        self.sweeps = {name: _parsed(name, text) for name, text in self.texts.items()}
        for name in self.sweeps:
            value_at(node, name)

    def __bool__(self) -> bool:
        return bool(self.sweeps)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """As Optuna has them."""
        return {name: _distribution(name, sweep) for name, sweep in self.sweeps.items()}

    def grid(self) -> list[Values]:
        """Every combination, where every entry is a choice or a range.

        Raises:
            UserError: If one is an interval.
        """
        from hydra.core.override_parser.types import IntervalSweep

        for name, sweep in self.sweeps.items():
            if isinstance(sweep, IntervalSweep):
                raise UserError(
                    f"sampler=grid needs choices or ranges, but strategy.search.{name} is "
                    f"{self.texts[name]}. Change it to choice(...), or use another sampler."
                )
        columns = [_members(sweep) for sweep in self.sweeps.values()]
        return [dict(zip(self.sweeps, row, strict=True)) for row in itertools.product(*columns)]


def propose(
    space: Space, sampler: Sampler, count: int, batch: int, seed: int, so_far: Sequence[Outcome]
) -> list[Values]:
    """The next trials: the same ones whenever the same search gets this far.

    Args:
        space: Where to search.
        sampler: "random", "qmc" (a scrambled Sobol sequence), "grid", or "tpe", which looks at
            the outcomes (multivariate tree-structured Parzen estimator).
        count: Trials of the whole search.
        batch: Trials that "tpe" proposes at once, before it knows their outcomes.
        seed: Of the search.
        so_far: Outcomes of the earlier trials, in order.

    Returns:
        All that are left, or for "tpe" one batch.
    """
    done, left = len(so_far), count - len(so_far)
    if sampler == "grid":
        return space.grid()[done:count]
    with _quiet():
        if sampler == "tpe":
            study = rebuilt(space, so_far, _sampler("tpe", _derived(seed, done)))
            return [dict(study.ask(space.distributions).params) for _ in range(min(batch, left))]
        study = rebuilt(space, (), _sampler(sampler, _derived(seed, 0)))
        return [dict(study.ask(space.distributions).params) for _ in range(count)][done:]


def rebuilt(space: Space, outcomes: Sequence[Outcome], sampler: BaseSampler | None = None) -> Study:
    """A study in memory that knows these outcomes."""
    import optuna

    study = optuna.create_study(direction="maximize", sampler=sampler)
    states = {
        "complete": optuna.trial.TrialState.COMPLETE,
        "pruned": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
    }
    for outcome in outcomes:
        mean = sum(outcome.scores) / len(outcome.scores) if outcome.scores else None
        study.add_trial(
            optuna.trial.create_trial(
                params={name: outcome.values[name] for name in space.sweeps},
                distributions=space.distributions,
                state=states[outcome.state],
                value=mean if outcome.state == "complete" else None,
                intermediate_values=dict(enumerate(outcome.scores)),
            )
        )
    return study


def hopeless(space: Space, so_far: Sequence[Outcome], scores: Sequence[float]) -> bool:
    """Whether some seeds already tell that a trial won't be the best (Wilcoxon's test).

    Seeds are compared one by one with those of the best trial so far; nothing is assumed about
    how a run goes on.

    Args:
        space: Where was searched.
        so_far: Outcomes of the trials of earlier batches.
        scores: Of this trial's first seeds.
    """
    import optuna

    if not any(outcome.state == "complete" for outcome in so_far):
        return False
    with _quiet():
        study = rebuilt(space, so_far)
        study.pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=2)
        trial = study.ask()
        for step, score in enumerate(scores):
            trial.report(score, step)
        return bool(trial.should_prune())


def importances(space: Space, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of the variance of scores that each hyper-parameter explains alone, largest first.

    Optuna's evaluator: functional analysis of variance on a random forest (Hutter et al. 2014),
    seeded.

    Raises:
        UserError: If the outcomes do not fit the space, or all scores are alike.
    """
    import optuna

    with _quiet():
        try:
            study = rebuilt(space, outcomes)
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"No hyper-parameter has an importance: {error}") from error
    return {name: float(value) for name, value in found.items()}


def value_at(node: Mapping[str, Any], name: str) -> Any:
    """The hyper-parameter with a dotted name.

    Raises:
        UserError: If there is none.
    """
    here: Any = node
    for part in name.split("."):
        if not isinstance(here, Mapping) or part not in here:
            raise UserError(f"strategy.search.{name} names no option of the strategy.")
        here = here[part]
    return here


def with_values(node: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A strategy's part of a configuration with other values at some dotted names."""
    changed = dict(node)
    for name, value in values.items():
        first, _, rest = name.partition(".")
        changed[first] = with_values(changed[first], {rest: value}) if rest else value
    return changed


def _entries(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Entries of a strategy and of those it wraps; the outer one's word counts."""
    base = node.get("base")
    if isinstance(base, Mapping):
        yield from ((f"base.{name}", text) for name, text in _entries(base))
    space = node.get("search") or {}
    if not isinstance(space, Mapping):
        raise UserError(f"search={space!r} must be a group: a sweep for each hyper-parameter.")
    yield from ((str(name), str(text)) for name, text in space.items())


def _parsed(name: str, text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    wrong = f"strategy.search.{name}={text!r} is no search space. Write {_GRAMMAR}."
    try:
        sweep = OverridesParser.create().parse_override(f"x={text}").value()
    except (HydraException, ValueError, RecursionError) as error:  # e.g. thousands of digits
        raise UserError(wrong) from error
    if not isinstance(sweep, (ChoiceSweep, IntervalSweep, RangeSweep)):
        raise UserError(wrong)
    return sweep


def _distribution(name: str, sweep: Any) -> BaseDistribution:
    from hydra.core.override_parser.types import ChoiceSweep, RangeSweep
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    log = "log" in (sweep.tags or ())
    if isinstance(sweep, ChoiceSweep):
        return CategoricalDistribution(_members(sweep))
    if isinstance(sweep, RangeSweep):
        members = _members(sweep)
        if not log:
            return CategoricalDistribution(members)
        return IntDistribution(min(members), max(members), log=True)
    start, end = sweep.start, sweep.end
    if not start < end or (log and start <= 0):
        raise UserError(
            f"strategy.search.{name}: the interval from {start} to {end} is empty, or reaches "
            "zero on a logarithmic scale."
        )
    if isinstance(start, int) and isinstance(end, int):
        return IntDistribution(start, end, log=log)
    return FloatDistribution(float(start), float(end), log=log)


def _members(sweep: Any) -> list[Any]:
    from hydra.core.override_parser.types import ChoiceSweep

    if isinstance(sweep, ChoiceSweep):
        return [getattr(member, "text", member) for member in sweep.list]
    return list(sweep.range())


def _sampler(name: Sampler, seed: int) -> BaseSampler:
    import optuna

    if name == "random":
        return optuna.samplers.RandomSampler(seed)
    if name == "qmc":
        return optuna.samplers.QMCSampler(seed=seed, scramble=True)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5)


def _derived(seed: int, done: int) -> int:
    digest = hashlib.sha256(f"search {seed} {done}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every trial, and that some of what is used here is experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
