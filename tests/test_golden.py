"""No number changes unnoticed: every strategy's tiny run against the committed one.

On the platform that recorded them every answer must be the same, and the norm of the weights but
for rounding: between the plain, the AVX2 and the AVX-512 kernels of one machine no answer turned in
any run, and the norm moved by 3.3e-7 of itself at most. On other platforms one answer of a test
may turn, and the norm may move by 1e-4.
"""

from __future__ import annotations

from typing import Any

import golden_runs
import numpy as np
import pytest

from clbench.results import BENCHMARK_VERSION

GOLDEN = golden_runs.recorded()
SAME = GOLDEN["platform"] == golden_runs.here()
ADVICE = (
    "If that is meant, raise BENCHMARK_VERSION where runs of before can no longer be compared, "
    "record them (python tests/golden_runs.py {name}) and say so in CHANGELOG.md."
)


@pytest.mark.parametrize("name", golden_runs.named())
def test_numbers_are_as_they_were(name: str) -> None:
    if name not in GOLDEN["runs"]:
        pytest.skip(f"new: python tests/golden_runs.py {name}")
    found, kept = golden_runs.runs(name), GOLDEN["runs"][name]
    advice = ADVICE.format(name=name)
    assert set(found) == set(kept), advice
    for toy, run in kept.items():
        assert _alike(found[toy], run), f"{name} on {toy}: {found[toy]} was {run}. {advice}"


def test_the_record_is_of_this_version() -> None:
    assert GOLDEN["benchmark"] == BENCHMARK_VERSION, ADVICE.format(name="")


def test_every_recorded_strategy_is_still_there() -> None:
    assert set(GOLDEN["runs"]) <= set(golden_runs.named())
    assert len(GOLDEN["runs"]) > 50


def test_a_change_is_noticed() -> None:
    run = GOLDEN["runs"]["ewc"]["ToyScenario"]
    assert _alike(run, run)
    moved = {**run, "weights": run["weights"] * 1.001}
    assert not _alike(moved, run)
    worse = [
        [None if v is None else max(0.0, v - 0.2) for v in row] for row in run["accuracy_matrix"]
    ]
    assert not _alike({**run, "accuracy_matrix": worse}, run)


def _alike(found: dict[str, Any], kept: dict[str, Any]) -> bool:
    matrices = [np.array(one["accuracy_matrix"], float) for one in (found, kept)]
    sizes = np.array(kept["test_sizes"], float)
    if matrices[0].shape != matrices[1].shape or found["test_sizes"] != kept["test_sizes"]:
        return False
    one_answer, norm = (0 * sizes, 1e-6) if SAME else (1.001 / sizes, 1e-4)
    close = np.isclose(*matrices, rtol=0, atol=one_answer, equal_nan=True)
    return bool(close.all() and np.isclose(found["weights"], kept["weights"], rtol=norm))
