"""The source model answers as it came, and keeps nothing for a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from strategies.source import Source

Make = Callable[..., Any]


def test_it_is_the_model_in_evaluation_mode(drift: Make) -> None:
    bench = drift()
    source = bench.prepare(Source())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bench.scenario.model(0, bench.stream).eval()
    for index in range(3):
        for batch in bench.arriving(index):
            answers = source.adapt(batch)
            assert torch.equal(answers, model(batch.inputs))
            assert torch.equal(source.predict(batch), answers)
            assert answers.grad_fn is None
