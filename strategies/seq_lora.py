"""SeqLoRA: one low-rank update learns all experiences."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.text.lora import LowRankStrategy


@dataclass(kw_only=True)
class SeqLoRA(LowRankStrategy):
    """Trains one low-rank update of the weights on every experience and does nothing more.

    A floor of other methods with low-rank updates: Wang et al. 2023, arXiv 2310.14152, "SeqLoRA".

    Equation: minimise CE over A, B with y = W x + (lora_alpha / lora_rank) B A x, W as it was
    before the stream; A and B go on from experience to experience. The same as
    `strategy=finetune` with `language_model.tuning=lora`.

    **Differs from the paper:** rank, alpha, layers and learning rate are options; O-LoRA's own are
    lora_rank=8, lora_alpha=32, lora_dropout=0.1, queries and values, lr=1e-3.
    """
