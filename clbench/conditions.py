"""What is run, and under which conditions: everything that decides the id of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clbench.config import options
from clbench.results import run_id
from clbench.types import Scenario, Split, Strategy, require


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything about a run that is neither scenario nor strategy.

    Attributes:
        seed: Decides class order, initialisation and minibatch order.
        split: Which part of the data.
        device: "auto", "cpu" or "cuda".
        precision: "fp32", or "bf16" for automatic mixed precision.
        threads: CPU threads; 0: chosen by the size of the model.
        evaluate_every: Training steps between evaluations within an experience; 0: none.
        evaluate_samples: Test samples of an experience that these look at, at most.
        evaluate_batch_size: Samples predicted at once.
        cache_features: Make the features of a backbone that nothing changes once, keep them, and
            learn from them in place of images; see `clbench.features`.
        compile: Send training steps through PyTorch's compiler; see `clbench.compiling`.
        population: Runs that train together, this one among them; 0: it trains by itself. See
            `clbench.population`.
    """

    seed: int = 0
    split: Split = Split.EVALUATE
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 0
    evaluate_every: int = 0
    evaluate_samples: int = 1000
    evaluate_batch_size: int = 1000
    cache_features: bool = False
    compile: bool = False
    population: int = 0

    def __post_init__(self) -> None:
        require(self, "seed", "threads", "evaluate_every", "population", at_least=0)
        require(self, "evaluate_samples", "evaluate_batch_size", at_least=1)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, besides the seed."""
        content = asdict(self)
        del content["seed"], content["device"]
        for name in ("cache_features", "compile", "population"):
            if not content[name]:  # so that runs from before there was a choice stay the same
                del content[name]
        return {**content, "split": self.split.value}


@dataclass(frozen=True)
class Names:
    """What people call the parts of a run.

    Attributes:
        scenario: Name of its YAML.
        strategy: Name of its YAML.
        base: Of the strategy that the strategy wraps, if it wraps one.
    """

    scenario: str
    strategy: str
    base: str | None = None


def identify(
    scenario: Scenario,
    strategy: Strategy,
    conditions: Conditions,
    names: Names | None = None,
    tuned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The "run" part of a result: what is run, and the id that follows from it.

    Args:
        scenario: Its options.
        strategy: Its hyper-parameters.
        conditions: Of the run.
        names: Of scenario and strategy, for people; default: their classes'.
        tuned: Where the hyper-parameters come from, plain data; None: nobody tuned them.
    """
    chosen = {"scenario": options(scenario), "strategy": options(strategy)}
    names = names or Names(type(scenario).__name__.lower(), type(strategy).__name__.lower())
    label = ".".join(filter(None, (names.strategy, names.base)))
    data = dict(scenario.fingerprint())
    identity = {**chosen, "data": data, **conditions.identity()}
    if tuned is not None:
        identity["tuned"] = dict(tuned)
    return {
        "run_id": run_id(names.scenario, label, conditions.seed, identity),
        "scenario": names.scenario,
        "strategy": names.strategy,
        "base": names.base,
        "setting": scenario.setting.value,
        "split": conditions.split.value,
        "seed": conditions.seed,
        "precision": conditions.precision,
        **({"cache_features": True} if conditions.cache_features else {}),
        **({"compile": True} if conditions.compile else {}),
        "options": chosen,
        "data": data,
        "tuned": None if tuned is None else dict(tuned),
        **({"population": conditions.population} if conditions.population else {}),
    }
