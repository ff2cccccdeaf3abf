"""Low-rank updates of linear layers, placed by peft: what methods with them share."""

from __future__ import annotations

import math
import warnings
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.machine import isolated_rng
from clbench.text.decoders import low_rank
from clbench.text.instructions import InstructionScenario
from clbench.text.language_model import LanguageModel
from clbench.text.optional import needed
from clbench.training import GradientStrategy
from clbench.types import Context, Scenario, Setting, require

_ADAPTER = "default"


@dataclass(frozen=True)
class Update:
    """The update of one linear layer: it computes W x + scale · B A x.

    Attributes:
        name: Path of the layer in the decoder.
        layer: As peft has it.
    """

    name: str
    layer: Any

    @property
    def a(self) -> nn.Parameter:
        """A, [rank, inputs]."""
        found: nn.Parameter = self.layer.lora_A[_ADAPTER].weight
        return found

    @property
    def b(self) -> nn.Parameter:
        """B, [outputs, rank]."""
        found: nn.Parameter = self.layer.lora_B[_ADAPTER].weight
        return found

    def product(self) -> Tensor:
        """B A, [outputs, inputs]; can be differentiated."""
        return self.b @ self.a

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + scale · B A; the update itself stays as it is."""
        self.layer.base_layer.weight += self.layer.get_delta_weight(_ADAPTER)

    def renew(self, generator: torch.Generator) -> None:
        """A new update that changes nothing yet: A uniform in ±1/√inputs, B = 0."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.b)


def place(
    model: LanguageModel, rank: int, alpha: float, dropout: float, targets: Sequence[str]
) -> list[Update]:
    """Gives linear layers of a decoder an update each, and freezes everything else.

    Args:
        model: Changed in place.
        rank: r.
        alpha: The scale is alpha / rank.
        dropout: On the inputs of an update.
        targets: Names of the layers; empty: all linear ones but the head.

    Returns:
        The updates, in the order of the model; A is drawn from the global generator.

    Raises:
        UserError: If there are no such layers.
    """
    peft = needed("peft")
    config = low_rank(rank, alpha, dropout, targets)
    try:
        with warnings.catch_warnings():
            # What peft calls by its old name in transformers is nothing that users can mend.
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(config, model.decoder)
    except ValueError as error:
        raise UserError(f"lora_targets={list(targets)} does not fit: {error}") from error
    kind = needed("peft.tuners.lora").LoraLayer
    return [Update(n, m) for n, m in model.decoder.named_modules() if isinstance(m, kind)]


@dataclass(kw_only=True)
class LowRankStrategy(GradientStrategy, ABC):
    """Base of the methods that bring low-rank updates of their own and train nothing else.

    Low-rank updates: Hu et al. 2021, arXiv 2106.09685. Attributes:
        lora_rank: r.
        lora_alpha: An update is multiplied by lora_alpha / lora_rank.
        lora_dropout: On the inputs of an update.
        lora_targets: Names of the layers that are updated; empty: all linear ones but the head.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.INSTRUCTION_TUNING})

    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    lr: float = 0.005
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "lora_rank", at_least=1)
        require(self, "lora_alpha", above=0)
        require(self, "lora_dropout", at_least=0, at_most=1)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        require_whole(type(self).__name__, scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        assert isinstance(model, LanguageModel)
        with isolated_rng(context.seed, "lora"):
            self._updates = place(
                model, self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets
            )
        super().setup(model.to(context.device), context)
        self.renew()

    def renew(self) -> None:
        """New updates in the place of the old, which are lost unless merged."""
        for update in self._updates:
            update.renew(self.context.generator("lora"))

    def fold(self) -> None:
        """Merges the updates into the weights and begins new ones: no output changes."""
        for update in self._updates:
            update.merge()
        self.renew()


def require_whole(name: str, scenario: Scenario) -> None:
    """Refuses a model of which only a part trains, for a method that decides that itself.

    Args:
        name: Of the method.
        scenario: What it is to work on.

    Raises:
        UserError: If something else restricts the training too.
    """
    if not isinstance(scenario, InstructionScenario):
        raise UserError(f"{name} needs a scenario with a language_model of clbench.text.")
    if scenario.language_model.tuning != "full":
        raise UserError(
            f"{name} decides itself what of the model trains; language_model.tuning="
            f"{scenario.language_model.tuning} does so too. Set language_model.tuning=full."
        )
