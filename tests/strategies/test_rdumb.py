"""RDumb: its base, put back exactly every N batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from suite import composed
from torch import Tensor

from clbench.adaptation import Adaptation
from clbench.config import build
from clbench.errors import UserError
from clbench.samples import Batch
from clbench.testing import ToyDrift, ToyScenario, resumes_with_the_same_bits
from clbench.types import Strategy
from strategies.eata import EATA
from strategies.rdumb import RDumb
from strategies.sar import SAR
from strategies.tent import Tent

Make = Callable[..., Any]


@dataclass(kw_only=True)
class Counting(Adaptation):
    """Answers with the number of batches since it was put back."""

    def prepare(self) -> None:
        self.met = torch.zeros(())

    def adapt(self, batch: Batch) -> Tensor:
        outputs = self.predict(batch)
        self.met += 1
        return outputs

    def predict(self, batch: Batch) -> Tensor:
        return self.met.expand(len(batch), self.context.n_outputs).clone()


def test_it_resets_before_batch_n_plus_one_and_so_on(drift: Make) -> None:
    bench = drift(samples=12, batch_size=1)
    rdumb = bench.prepare(RDumb(base=Counting(), reset_every=5))
    met = [int(rdumb.adapt(batch)[0, 0]) for batch in bench.arriving(0)]
    assert met == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert int(rdumb.predict(bench.arriving(0)[0])[0, 0]) == 2


def test_a_reset_of_the_engine_begins_the_count_anew(drift: Make) -> None:
    bench = drift(samples=12, batch_size=1)
    rdumb = bench.prepare(RDumb(base=Counting(), reset_every=5))
    first, *rest = bench.arriving(0)
    for batch in rest[:3]:
        rdumb.adapt(batch)
    rdumb.reset()
    met = [int(rdumb.adapt(batch)[0, 0]) for batch in [first, *rest]]
    assert met == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("base", [Tent(lr=0.01), EATA(lr=0.01), SAR(lr=0.01)])
def test_it_is_a_new_base_for_every_n_batches(drift: Make, base: Any) -> None:
    bench = drift()
    rdumb = bench.prepare(RDumb(base=base, reset_every=3))
    batches = [batch for index in range(3) for batch in bench.arriving(index)]
    for number, batch in enumerate(batches):
        if number % 3 == 0:
            fresh = bench.prepare(base)
        assert torch.equal(rdumb.adapt(batch), fresh.adapt(batch))


def test_without_a_reset_it_is_its_base(drift: Make) -> None:
    bench = drift()
    rdumb, tent = bench.prepare(RDumb(base=Tent(lr=0.01))), bench.prepare(Tent(lr=0.01))
    for batch in bench.arriving(1):
        assert torch.equal(rdumb.adapt(batch), tent.adapt(batch))


def test_it_goes_on_in_the_middle_of_its_count() -> None:
    resumes_with_the_same_bits(RDumb(base=Tent(lr=0.05), reset_every=3), ToyDrift())


def test_its_default_base_is_eta() -> None:
    rdumb = build(composed("strategy=rdumb")["strategy"], Strategy, "strategy")
    assert isinstance(rdumb, RDumb)
    assert rdumb.base == build(composed("strategy=eta")["strategy"], Strategy, "strategy")


def test_what_the_base_found_out_is_told(drift: Make) -> None:
    assert drift().prepare(RDumb(base=SAR())).facts() == {"resets": 0}


def test_a_scenario_with_labels_is_refused() -> None:
    with pytest.raises(UserError, match="RDumb does not work in the class_incremental"):
        RDumb(base=Tent()).check(ToyScenario())


def test_ranges() -> None:
    with pytest.raises(UserError, match="out of range"):
        RDumb(base=Tent(), reset_every=0)
