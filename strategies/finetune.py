"""Fine-tuning: the floor every method should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clbench.training import GradientStrategy
from clbench.types import LABELLED, Setting


@dataclass(kw_only=True)
class Finetune(GradientStrategy):
    """Trains on each experience and does nothing against forgetting.

    Equation: minimise CE(h(x), y) on the current experience.

    **Differs from the paper:** there is no paper; this is the lower reference.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED
