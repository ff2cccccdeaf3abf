"""Avalanche as its documentation has it: SplitMNIST, plug-ins, an evaluator without loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from by_hand import EWC as EWCByHand
from by_hand import LwF as LwFByHand
from torch import nn
from watch import EVALUATE_AT_ONCE, LEARNING_RATE, Job, Watch

from clbench.classification import class_order

#: What a strategy of Avalanche is made with, to the strategy.
Maker = Callable[[dict[str, Any], Job], Any]


def _naive(given: dict[str, Any], *plugins: Any) -> Any:
    from avalanche.training.supervised import Naive

    return Naive(**given, plugins=list(plugins))


def _replay(given: dict[str, Any], job: Job) -> Any:
    from avalanche.training.plugins import ReplayPlugin

    return _naive(given, ReplayPlugin(mem_size=job.memory_size))


def _derpp(given: dict[str, Any], job: Job) -> Any:
    from avalanche.training.supervised import DER

    return DER(**given, mem_size=job.memory_size, alpha=0.1, beta=0.5)


def _ewc(given: dict[str, Any], job: Job) -> Any:  # noqa: ARG001
    from avalanche.training.plugins import EWCPlugin

    return _naive(given, EWCPlugin(ewc_lambda=EWCByHand.ewc_lambda / 2))


def _lwf(given: dict[str, Any], job: Job) -> Any:  # noqa: ARG001
    from avalanche.training.plugins import LwFPlugin

    return _naive(given, LwFPlugin(alpha=LwFByHand.lwf_lambda, temperature=LwFByHand.temperature))


MAKERS: Mapping[str, Maker] = {"replay": _replay, "derpp": _derpp, "ewc": _ewc, "lwf": _lwf}


def avalanche(make: Maker, job: Job, watch: Watch) -> None:
    """One run, without the hundreds of warnings of deprecated calls within the library."""
    with warnings.catch_warnings(record=True):
        _run(make, job, watch)


def _run(make: Maker, job: Job, watch: Watch) -> None:
    from avalanche.benchmarks.classic import SplitMNIST
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.training.plugins import EvaluationPlugin

    model = job.model()
    stream = SplitMNIST(
        n_experiences=job.scenario.n_experiences,
        fixed_class_order=class_order(10, 0).tolist(),
        dataset_root=job.data,
    )
    given = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), LEARNING_RATE),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": job.batch_size,
        "train_epochs": job.scenario.epochs,
        "eval_mb_size": EVALUATE_AT_ONCE,
        "evaluator": EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    }
    strategy = make(given, job)
    for index, experience in enumerate(stream.train_stream):
        with watch.training():
            strategy.train(experience)
        with watch.evaluating():
            scores = strategy.eval(stream.test_stream[: index + 1])
    watch.accuracies = [v for k, v in sorted(scores.items()) if k.startswith("Top1_Acc_Exp")]
