"""HFT: half fine-tuning."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from clbench.nn.frozen import Frozen
from clbench.nn.partition import Matrix, partition
from clbench.training import Wrapper
from clbench.types import CLASSIFICATION, Context, Experience, Setting, require

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class HFT(Wrapper):
    """Trains half of the matrices of each kind in each block and keeps the other half.

    Paper: Hui, Zhang, Wang, Xu, Sun and Wu 2024, "HFT: Half Fine-Tuning for Large Language
    Models", arXiv 2404.18466. There is no official code.

    Equation: θ_t = θ_{t−1} + M_t ⊙ Δ_t, Δ_t being what the base makes of experience t; M_t is 0
    or 1 for a whole matrix (with its bias) and drawn anew for each experience, over all:

    - "category": in each block half of each category, so 2 of the 4 attention matrices; of an
      odd number, such as 3 matrices of an FFN, the smaller half in half of the blocks, drawn at
      random, and the larger half in the others;
    - "layer": all matrices in half of the blocks;
    - "model": half of all matrices, wherever they are.

    What lies outside the blocks always trains: embeddings, stem, final norm, head. A frozen
    matrix has no gradient, no weight decay and no state in the optimizer. After the experience
    and before the base's own work on it (such as a Fisher information), everything is free
    again. The attribute `trained` names what trained last; the log says it too.

    Attributes:
        base: The method that trains the half.
        level: "category", "layer" or "model".
        ratio: Part of the matrices that trains, in [0, 1]; 1: the base alone.
        statistics: Batch norms whose weights are frozen "follow" their inputs, as any, or "keep"
            mean and variance too and use them in training.

    **Differs from the paper:** nothing for language models; the final norm, which the paper does
    not mention, trains. "Half" is by number of matrices, which in convolutional networks and
    MLPs differ in size; a category with an odd number of matrices in the model trains the larger
    or the smaller half, each as likely. Vision transformers, ConvNets and MLPs are ours; their
    blocks are declared in `clbench.nn.partition`, a projection shortcut being one more
    convolution of its block. "follow" is the default because a network from scratch would do
    without half of its normalisation with "keep".
    """

    settings: ClassVar[frozenset[Setting]] = CLASSIFICATION | {Setting.INSTRUCTION_TUNING}

    level: Literal["category", "layer", "model"] = "category"
    ratio: float = 0.5
    statistics: Literal["follow", "keep"] = "follow"

    def __post_init__(self) -> None:
        require(self, "ratio", at_least=0, at_most=1)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self._matrices = partition(self.model)
        self.trained: list[str] = []

    def before(self, experience: Experience) -> None:
        self.base.before(experience)
        # On the CPU, where it costs no wait for a GPU.
        generator = self.context.generator("hft", torch.device("cpu"))
        chosen = choose(self._matrices, self.level, self.ratio, generator)
        self.trained = [m.name for m in self._matrices if m.name in chosen]
        _log.info("experience %d trains %s", experience.index, ", ".join(self.trained) or "nothing")
        rest = [m for m in self._matrices if m.name not in chosen]
        self._frozen = Frozen(self.model, rest)
        self._still = [self.model.get_submodule(m.name) for m in rest if m.category == "norm"]

    def begin(self, steps: int) -> None:
        self.base.begin(steps)
        self._frozen.restrict(self.base._optimizer)
        if self.statistics == "keep":
            for module in self._still:
                module.eval()

    def after(self, experience: Experience) -> None:
        self._frozen.release()
        self.base.after(experience)


def choose(
    matrices: Sequence[Matrix], level: str, ratio: float, generator: torch.Generator
) -> set[str]:
    """Names of the matrices to train.

    Args:
        matrices: All of them.
        level: "category", "layer" or "model".
        ratio: Part to train, in [0, 1].
        generator: On the CPU.
    """
    if level == "model":
        return set(
            _draw([m.name for m in matrices], _whole(ratio * len(matrices), generator), generator)
        )
    blocks = list(dict.fromkeys(m.block for m in matrices))
    if level == "layer":
        whole = set(_draw(blocks, _whole(ratio * len(blocks), generator), generator))
        return {m.name for m in matrices if m.block in whole}
    chosen: set[str] = set()
    for category in dict.fromkeys(m.category for m in matrices):
        mine = [m for m in matrices if m.category == category]
        members = {b: [m.name for m in mine if m.block == b] for b in blocks}
        shares = {b: round(ratio * len(names), 9) for b, names in members.items()}
        # What rounding down leaves over goes to as many blocks with a broken share.
        counts = {b: math.floor(share) for b, share in shares.items()}
        broken = [b for b, share in shares.items() if share > counts[b]]
        left = _whole(ratio * len(mine), generator) - sum(counts.values())
        for block in _draw(broken, left, generator):
            counts[block] += 1
        for block, names in members.items():
            chosen.update(_draw(names, counts[block], generator))
    return chosen


def _whole(share: float, generator: torch.Generator) -> int:
    """A number rounded up or down at random, so that it is right on average."""
    share = round(share, 9)
    return math.floor(share + torch.rand((), dtype=torch.float64, generator=generator).item())


def _draw(names: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    order = torch.randperm(len(names), generator=generator)[:count].tolist()
    return [names[i] for i in order]
