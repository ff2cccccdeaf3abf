"""SEFE: answers in several styles against lost form, RegLoRA against lost knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.samples import Batch, Samples
from clbench.text.instructions import InstructionScenario
from clbench.text.lora import LowRankStrategy
from clbench.text.styles import STYLES, diversified
from clbench.types import Context, Experience, require


@dataclass(kw_only=True)
class SEFE(LowRankStrategy):
    """Asks a part of each task in other styles, and spares the entries that mattered before.

    Paper: Chen, Cong, Zhao, Yang, Hu, Ip and Kwong 2025, "SEFE: Superficial and Essential
    Forgetting Eliminator for Multimodal Continual Instruction Tuning", ICML, arXiv 2505.02486;
    code: jinpeng0528/SEFE.

    Answer-style diversification: style_share of the samples of each experience are rewritten,
    evenly into other styles (`clbench.text.styles`).

    Equation (RegLoRA): a new low-rank update for each experience, the older ones part of W.
    At its end I_s of each layer are the `top` part of the entries of B_s A_s with the largest
    magnitudes. In experience t, minimise over A_t and B_t

        CE + reglora_lambda · mean over layers of mean |(B_t A_t)_i|, i in I_1, ..., I_{t−1},

    an entry that is in several I_s being counted as often.

    Attributes:
        style_share: Part of the samples that is rewritten, in [0, 1].
        reglora_lambda: Weight of the penalty; of B A without lora_alpha / lora_rank.
        top: Part of the entries of a layer that an experience marks, in (0, 1].

    **Differs from the paper:** rules write yes/no questions, multiple choice and a sentence; the
    paper's styles of about 20 and 50 words need a language model. What would not fit into the
    context or into answer_length is not rewritten so; `strategy_facts` counts what is. Lists of
    indices are kept as a count of each entry, a byte of each weight. The paper has lora_rank=128,
    lora_alpha=256, lr=2e-4 for models of 7 B parameters.
    """

    style_share: float = 0.2
    reglora_lambda: float = 2500.0
    top: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "style_share", at_least=0, at_most=1)
        require(self, "reglora_lambda", at_least=0)
        require(self, "top", above=0, at_most=1)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.marks = [
            torch.zeros(u.b.shape[0], u.a.shape[1], dtype=torch.uint8, device=context.device)
            for u in self._updates
        ]
        self.styles = dict.fromkeys(STYLES, 0)

    def before(self, experience: Experience) -> None:
        self.fold()
        # Each layer's mean over the marked entries, and the mean over layers, as one weight.
        scale = self.reglora_lambda / len(self.marks)
        self._shares = [scale * m / m.sum() for m in self.marks] if experience.index else []

    def material(self, experience: Experience) -> Samples:
        samples = super().material(experience)
        scenario = self.context.scenario
        assert isinstance(scenario, InstructionScenario)
        generator = self.context.generator("sefe.styles", torch.device("cpu"))
        made, count = diversified(
            samples, self.style_share, scenario.language_model.context, generator
        )
        self.styles = {name: self.styles[name] + n for name, n in count.items()}
        return made

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + self.penalty()

    def penalty(self) -> Tensor:
        """What is added to the loss, a scalar."""
        total = torch.zeros((), device=self.context.device)
        if self.reglora_lambda:
            for share, update in zip(self._shares, self._updates, strict=False):
                total = total + (update.product().abs() * share).sum()
        return total

    @torch.no_grad()
    def after(self, experience: Experience) -> None:  # noqa: ARG002
        for mark, update in zip(self.marks, self._updates, strict=True):
            mark.view(-1)[largest(update.product(), self.top)] += 1

    def facts(self) -> Mapping[str, Any]:
        """How many samples were rewritten in each style."""
        return {"rewritten": dict(self.styles)}


def largest(product: Tensor, part: float) -> Tensor:
    """Where the entries with the largest magnitudes are, flat, [K] int64.

    Args:
        product: B A.
        part: Of the entries, rounded; one at least.
    """
    count = max(1, round(part * product.numel()))
    return product.abs().flatten().topk(count).indices
