"""Partial tuning: only some matrices of a vision transformer train, and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from clbench.nn.partition import partition
from clbench.pretrained import require_classifier, require_vision_transformer
from clbench.training import Wrapper
from clbench.types import Context, Scenario


@dataclass(kw_only=True)
class PartialTuning(Wrapper):
    """Freezes a vision transformer but for its attention, and leaves the rest to the base.

    Paper: Smith, Tian, Halbe, Hsu and Kira 2023, "A Closer Look at Rehearsal-Free Continual
    Learning", arXiv 2203.17269, where only queries, keys and values train, for a fair comparison
    with prompts. `strategy=ewc_attention` and `strategy=l2_attention` are its EWC and its L2.

    What is frozen requires no gradient from before the base is set up: it has no gradient, no
    weight decay, no state in the optimizer, and no place in the base's penalties. The head
    always trains.

    Attributes:
        base: The method that trains the rest.
        trains: "qkv": the matrices of queries, keys and values in every block; "attention": the
            output projection of the attention too.

    **Differs from the paper:** it says nothing of the biases of these matrices; they train with
    them. The choice is for vision transformers of timm alone.
    """

    trains: Literal["qkv", "attention"] = "qkv"

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        require_vision_transformer("partial_tuning", scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        head = set(require_classifier("partial_tuning", model).head.parameters())
        trained = {
            part.name
            for matrix in partition(model)
            for part in matrix.parts
            if matrix.category == "attention"
            if self.trains == "attention" or part.name.rpartition(".")[0].endswith(".qkv")
        }
        for name, parameter in model.named_parameters():
            if name not in trained and parameter not in head:
                parameter.requires_grad_(False)
        super().setup(model, context)
