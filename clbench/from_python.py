"""A run from Python: names as on the command line, or objects, in; the result out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from clbench import cells, config, protocol, trackers, userspace
from clbench.cells import Cell
from clbench.composing import GROUPS, composed, explained
from clbench.conditions import Conditions, Names
from clbench.errors import UserError
from clbench.limits import Limits
from clbench.progress import Bar, Progress, Silent
from clbench.results import Result
from clbench.types import Scenario, Strategy

Overrides: TypeAlias = Mapping[str, Any] | Sequence[str] | str

#: Options of the command line that `run` has as arguments.
_ARGUMENTS = frozenset(
    {*Conditions.__dataclass_fields__, *Limits.__dataclass_fields__}
    | {"results_dir", "force", "progress", "tracker"}
)


@dataclass(frozen=True)
class _Shown:
    tracker: trackers.Name


def run(
    scenario: str | Scenario,
    strategy: str | Strategy,
    seed: int = 0,
    overrides: Overrides = (),
    *,
    split: Literal["evaluate", "tune"] = "evaluate",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    threads: int = 0,
    evaluate_every: int = 0,
    evaluate_samples: int = 1000,
    evaluate_batch_size: int = 1000,
    cache_features: bool = False,
    compile: bool = False,
    results_dir: str | Path | None = None,
    force: bool = False,
    progress: bool = False,
    tracker: trackers.Name = "none",
    timeout: float = 0,
    checkpoint_every: float = 30,
) -> Result:
    """Runs one strategy through one stream.

    A name means what it means on the command line, the working folder's own `conf`, `scenarios`
    and `strategies` included; an object is taken as it is. The same names, overrides and seed
    give the same numbers and the same run folder as the command.

    Args:
        scenario: Name of its YAML, or the object.
        strategy: Name of its YAML, or an object that was not run yet.
        seed: Class order, initialisation and minibatch order.
        overrides: Of what has a name: "strategy.lr=0.1" or several of these, or
            {"strategy.lr": 0.1, "backbone": "convnet"}.
        split: Which part of the data.
        device: Where to run.
        precision: "fp32", or "bf16" for automatic mixed precision.
        threads: CPU threads; 0: chosen by the size of the model.
        evaluate_every: Training steps between evaluations within an experience; 0: none.
        evaluate_samples: Test samples of an experience that these look at, at most.
        evaluate_batch_size: Samples predicted at once.
        cache_features: Make features that nothing changes once, and learn from them.
        compile: Send training steps through PyTorch's compiler.
        results_dir: Where the run folder goes, from which an interrupted run continues and where
            an ended one is found again; None: nothing is written.
        force: Repeat a run that is there.
        progress: Show a progress bar.
        tracker: What else shows the run, from its folder; see `clbench.trackers`.
        timeout: Seconds that it may take; 0: any. With more of them a later call goes on.
        checkpoint_every: Minutes between checkpoints within an experience; 0: only between them.

    Returns:
        The result: complete, or diverged, out of memory or timed out, with the reason.

    Raises:
        UserError: If a name or an option does not exist, the pair can't work, or the disk refuses.
    """
    given = {
        "seed": seed,
        "split": split,
        "device": device,
        "precision": precision,
        "threads": threads,
        "evaluate_every": evaluate_every,
        "evaluate_samples": evaluate_samples,
        "evaluate_batch_size": evaluate_batch_size,
        "cache_features": cache_features,
        "compile": compile,
    }
    conditions = config.fill(Conditions, given, "")
    tracker = config.fill(_Shown, {"tracker": tracker}, "").tracker
    allowed = {"timeout": timeout, "checkpoint_every": checkpoint_every}
    limits = config.fill(Limits, allowed, "")
    tree, names = _composed(scenario, strategy, _lines(overrides))
    if isinstance(scenario, str):
        scenario = config.build(tree["scenario"], Scenario, "scenario")
    if isinstance(strategy, str):
        strategy = config.build(tree["strategy"], Strategy, "strategy")

    def bar() -> AbstractContextManager[Progress]:
        return Bar(_title(names, seed)) if progress else nullcontext(Silent())

    if results_dir is None:
        if tracker != "none":
            raise UserError(f"tracker={tracker!r} shows a run folder: give results_dir too.")
        with bar() as told:
            return protocol.run(
                scenario,
                strategy,
                conditions,
                names=names,
                progress=told,
                limits=limits,
                cache_dir=cells.cache_dir(tree),
            )
    cell = Cell(
        composed={**tree, **given, **allowed},
        conditions=conditions,
        names=names,
        tuned=None,
        results_dir=Path(results_dir),
        force=force,
        tracker=tracker,
        limits=limits,
    )
    cell.check(scenario, strategy)
    return cells.perform(scenario, strategy, cell, bar).result


def _composed(
    scenario: str | Scenario, strategy: str | Strategy, overrides: Sequence[str]
) -> tuple[dict[str, Any], Names]:
    """The configuration: the named parts from their YAML, objects from their own options."""
    parts = {"scenario": scenario, "strategy": strategy}
    named = [f"{group}={part}" for group, part in parts.items() if isinstance(part, str)]
    objects = {g: part for g, part in parts.items() if not isinstance(part, str)}
    _refuse(overrides, objects)
    names = {group: type(part).__name__.lower() for group, part in objects.items()}
    tree = {group: config.options(part) for group, part in objects.items()}
    if not named:
        return tree, Names(names["scenario"], names["strategy"])
    own = userspace.join(Path.cwd())
    path = [f"hydra.searchpath=[{_quoted(own.as_uri())}]"] if own else []
    every = [*path, *named, *overrides]
    try:
        found, choices = composed(every)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explained(error, every)) from None
    chosen = {**choices, **names}
    base = None if "strategy" in objects else choices.get("strategy@strategy.base")
    return {**found, **tree}, Names(chosen["scenario"], chosen["strategy"], base)


def _refuse(overrides: Sequence[str], objects: Mapping[str, Scenario | Strategy]) -> None:
    """Overrides that would have no effect here."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        head = key.lstrip("+~").partition(".")[0].partition("@")[0]
        if not equals:
            raise UserError(f"Can't read the override {override!r}. It is written key=value.")
        if head in _ARGUMENTS:
            raise UserError(f"{override!r} is no override here: say run(..., {head}=...).")
        part = "scenario" if head in ("backbone", "language_model") else head
        if part in objects:
            raise UserError(
                f"{override!r} has no effect: the {part} is an object. Change it by "
                f"dataclasses.replace({part}, ...)."
            )


def _lines(overrides: Overrides) -> list[str]:
    """Overrides in the grammar of the command line."""
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping):
        return [*overrides]
    lines = []
    for key, value in overrides.items():
        choice = key.partition("@")[0] in GROUPS and isinstance(value, str)
        new = "++" if isinstance(value, Mapping) else ""  # its keys need not be there before
        lines.append(f"{new}{key}={value if choice else _grammar(value)}")
    return lines


def _grammar(value: Any) -> str:
    """A plain value as Hydra reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_grammar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_grammar, value)) + "]"
    return str(value) if isinstance(value, (int, float)) else _quoted(str(value))


def _quoted(text: str) -> str:
    """A text that Hydra reads as itself: its quotes escaped, its interpolations too."""
    plain = re.sub(r"\\+$", lambda end: 2 * end[0], text.replace("${", "\\${"))
    return "'" + re.sub(r"(\\*)'", lambda quote: 2 * quote[1] + "\\'", plain) + "'"


def _title(names: Names, seed: int) -> str:
    label = "+".join(filter(None, (names.strategy, names.base)))
    return f"{names.scenario} {label} seed {seed}"
