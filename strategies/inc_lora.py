"""IncLoRA: a new low-rank update for each experience, the older ones frozen but active."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.text.lora import LowRankStrategy
from clbench.types import Experience


@dataclass(kw_only=True)
class IncLoRA(LowRankStrategy):
    """Trains a low-rank update for each experience, on top of those of earlier ones.

    A floor of other methods with low-rank updates: Wang et al. 2023, arXiv 2310.14152, "IncLoRA".

    Equation: y = W x + (lora_alpha / lora_rank) Σ_{s≤t} B_s A_s x; in experience t, minimise CE
    over A_t and B_t, the others as they are. Frozen updates are kept as W ← W + B_s A_s, which
    computes the same and costs nothing.

    **Differs from the paper:** with dropout, frozen updates have none, as they are part of W.
    """

    def before(self, experience: Experience) -> None:  # noqa: ARG002
        self.fold()
