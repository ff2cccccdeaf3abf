"""Any strategy or plug-in of Avalanche's."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.avalanche import AvalancheStrategy


@dataclass(kw_only=True)
class Avalanche(AvalancheStrategy):
    """Trains as a strategy of Avalanche's does, and is scored by the suite's loop.

    Library: Lomonaco et al. 2021, "Avalanche: an End-to-End Library for Continual Learning",
    arXiv 2104.00405, version 0.6.

    Equation: that of the class in `name` and of the plug-ins, see Avalanche's documentation.

    **Differs from the paper:** the samples come without Avalanche's training transforms, from the
    suite's own scenarios; the scores are the suite's; an interrupted run begins anew.
    `docs/avalanche.md` compares its methods with the suite's of the same name.
    """
