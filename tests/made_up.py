"""Run folders and searches that nobody made: the format of real ones, numbers from a generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from clbench import metrics
from clbench.results import Matrix, Result, RunFolder, run_id
from clbench.study import Study, Trial

OPTIONS: Mapping[str, Any] = {
    "_target_": "scenarios.digits.Digits",
    "epochs": 20,
    "batch_size": 32,
    "memory_size": 200,
    "memory_batch_size": 0,
    "online": False,
    "passes": 1,
    "backbone": {"_target_": "clbench.nn.backbones.MLP", "weights": None, "hidden": [400, 400]},
    "head": "linear",
    "crop_padding": 0,
    "flip": False,
    "n_experiences": 5,
}
BUDGET: Mapping[str, Any] = {
    "trials": 8,
    "tuning_seeds": 2,
    "seeds": 3,
    "sampler": "random",
    "batch": 5,
    "prune": False,
}
ENVIRONMENT = {
    "clbench": "0.1.0",
    "code": "0123456789ab",
    "python": "3.11.7",
    "system": "Linux",
    "machine": "x86_64",
    "device": "cpu",
    "threads": 1,
    "torch": "2.11.0",
    "numpy": "2.4.0",
}
DOMAINS = ("gaussian_noise", "shot_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")


def run(
    strategy: str = "replay",
    seed: int = 0,
    skill: float = 0.8,
    *,
    scenario: str = "digits",
    base: str | None = None,
    options: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
    tuned: Mapping[str, Any] | None = None,
    memory: int = 200,
    **changes: Any,
) -> Result:
    """A complete class-incremental run of five experiences.

    Args:
        strategy: Its name.
        seed: Of the run, and of what noise there is in its numbers.
        skill: Share of each drop that the strategy prevents, in [0, 1].
        scenario: Its name.
        base: Of a wrapper.
        options: Of the scenario that are not as in `OPTIONS`.
        values: Hyper-parameters of the strategy.
        tuned: Where these come from.
        memory: Samples kept.
        changes: Of the result.
    """
    chosen = {"scenario": {**OPTIONS, **(options or {})}}
    chosen["strategy"] = {"_target_": f"strategies.{strategy}.X", "lr": 0.1, **(values or {})}
    generator = np.random.default_rng([seed, *map(ord, strategy + (base or ""))])
    matrix = accuracies(chosen["scenario"]["n_experiences"], skill, generator)
    label = ".".join(filter(None, (strategy, base)))
    content: dict[str, Any] = {
        "run": {
            "run_id": run_id(scenario, label, seed, {**chosen, "tuned": tuned}),
            "scenario": scenario,
            "strategy": strategy,
            "base": base,
            "setting": "class_incremental",
            "split": "evaluate",
            "seed": seed,
            "precision": "fp32",
            "options": chosen,
            "tuned": None if tuned is None else dict(tuned),
        },
        "experiences": [f"{2 * i}, {2 * i + 1}" for i in range(len(matrix))],
        "test_sizes": [60] * len(matrix),
        "accuracy_matrix": matrix,
        "metrics": metrics.summary(matrix, [60] * len(matrix)),
        "costs": {
            "train_seconds": float(generator.gamma(20, 0.1 * (1 + 3 * skill))),
            "evaluate_seconds": float(generator.gamma(10, 0.01)),
            "train_samples": 17960,
            "forward_samples": 17960 * (1 + (memory > 0)),
            "backward_samples": 17960 * (1 + (memory > 0)),
            "parameters": 190410,
            "trainable_parameters": 190410,
            "memory_samples": memory,
            "peak_memory_bytes": 873_140_224,
        },
        "environment": dict(ENVIRONMENT),
        "scenario_facts": {"backbone": {"name": "MLP", "weights": None}},
    }
    return Result(**{**content, **changes})


def accuracies(count: int, skill: float, generator: np.random.Generator) -> Matrix:
    """A matrix whose old experiences lose (1 - skill) of what they had, each time."""
    noise = generator.normal(0, 0.02, (count, count))
    kept = 0.98 * (0.3 + 0.7 * skill) ** np.arange(count)
    values = np.clip(
        kept[np.subtract.outer(np.arange(count), np.arange(count)).clip(0)] + noise, 0, 1
    )
    return [[float(values[i, j]) if j <= i else None for j in range(count)] for i in range(count)]


def adapted(
    strategy: str = "tent", seed: int = 0, error: float = 0.3, domains: Sequence[str] = DOMAINS
) -> Result:
    """A run of test-time adaptation over six domains."""
    generator = np.random.default_rng([seed, *map(ord, strategy)])
    errors = np.clip(generator.normal(error, 0.05, 6) + 0.3 * (np.arange(6) == 3), 0, 1)
    drift = error * np.linspace(0, 0.2, 7) + generator.normal(0, 0.005, 7)
    source = [float(v) for v in np.clip(0.95 - drift, 0, 1)]
    rows = {
        "error": [float(v) for v in errors],
        "calibration_error": [float(v) / 3 for v in errors],
        "collapse": [0.1 + float(v) / 5 for v in errors],
        "samples": [1000] * 6,
    }
    online = {
        "domains": list(domains),
        "by_domain": rows,
        "by_experience": rows,
        "source_model": {"accuracies": [], "source_accuracy": 0.95, "seconds_per_sample": 1e-4},
        "source_accuracy": source,
    }
    scores = {
        "online_error": float(errors.mean()),
        "online_calibration_error": float(errors.mean()) / 3,
        "collapse": 0.1 + float(errors.mean()) / 5,
        "source_accuracy": source[-1],
        "source_forgetting": 0.95 - source[-1],
    }
    made = run(strategy, seed, scenario="digits_c", memory=0)
    made.run["setting"] = "test_time_adaptation"
    facts = {"backbone": {"weights": None}, "source_model_sha256": "00"}
    made = replace(made, accuracy_matrix=[], metrics=scores, online=online, scenario_facts=facts)
    return replace(made, experiences=list(domains))


def failed(result: Result, status: str = "failed", reason: str = "it was interrupted") -> Result:
    """The same run, had it ended otherwise."""
    return replace(result, status=status, reason=reason, metrics={}, accuracy_matrix=[], costs={})


def stored(root: Path, *results: Result) -> list[Path]:
    """Writes run folders."""
    folders = [RunFolder(root, str(result.run["run_id"])) for result in results]
    for folder, result in zip(folders, results, strict=True):
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.result_file.write_text(result.to_json())
    return [folder.path for folder in folders]


def study(
    strategy: str = "replay",
    protocol: str = "two_phase",
    trials: int = 8,
    *,
    scenario: str = "digits",
    digest: str = "0a1b2c3d",
    seed: int = 0,
) -> Study:
    """A search over a learning rate, a weight and a choice, with one trial that failed."""
    generator = np.random.default_rng(seed)
    tried = []
    for number in range(trials):
        lr = float(10 ** generator.uniform(-3, -0.53))
        values = {"lr": lr, "alpha": float(generator.uniform()), "optimizer": "sgd"}
        values["optimizer"] = str(generator.choice(["sgd", "adam"]))
        score = 0.8 - 0.1 * (np.log10(lr) + 1.5) ** 2 + float(generator.normal(0, 0.01))
        broken = number == 3
        tried.append(
            Trial(
                values,
                () if broken else (float(score), float(score) + 0.01),
                "failed" if broken else "complete",
                "diverged: the loss is nan" if broken else None,
                (f"run-{number}",),
                12.5,
                1000,
                2**20,
            )
        )
    best = max((t for t in tried if t.mean is not None), key=lambda t: t.mean or 0)
    space = {"lr": "tag(log, interval(0.001, 0.3))", "alpha": "interval(0, 1)"}
    space["optimizer"] = "choice(sgd, adam)"
    shape = {"name": scenario, "options": dict(OPTIONS)}
    name = f"{scenario}-{strategy}-{digest}"
    budget = {**BUDGET, "trials": trials}
    return Study(
        name=name,
        protocol="conventional" if protocol == "conventional" else "two_phase",
        scenario=shape,
        strategy=strategy,
        space=space,
        metric="average_accuracy",
        budget=budget,
        shared_samples=0,
        trials=tuple(tried),
        chosen=best.values,
    )


def tuned_by(one: Study) -> dict[str, Any]:
    """What the runs of the evaluation phase say of their search."""
    return {"protocol": one.protocol, "study": one.name, **one.budget}


def kept(root: Path, *studies: Study) -> None:
    """Writes tuning records."""
    (root / "tuned").mkdir(parents=True, exist_ok=True)
    for one in studies:
        (root / "tuned" / f"{one.name}.json").write_text(one.to_json())


def plain(result: Result) -> dict[str, Any]:
    """As plain data, to be spoilt."""
    return {"schema": result.schema, **asdict(result)}
