"""LCA: a moving average of the weights that balances itself between old and new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.samples import Batch
from clbench.text.codebook import Codebook, in_groups, instructions_of, prompts_of
from clbench.text.instructions import text_source
from clbench.training import Wrapper
from clbench.types import LABELLED, Context, Experience, Scenario, Setting, require


@dataclass(kw_only=True)
class LCA(Wrapper):
    """Follows the base's weights with a moving average, and ends each experience with it.

    Paper: Qiao, Zhang, Tan, Qu, Ding and Xie 2025, "Large Continual Instruction Assistant", ICML,
    arXiv 2410.10868; code: JingyangQiao/CoIN.

    Equation: θ* being the average and θ the weights after a step with gradient g, for each tensor

    - "paper": θ* ← β θ* + (1 − β) θ with β = (‖g‖₁ + 1) / (‖θ − θ*‖₁ ‖L''‖₁), where
      ‖L''‖₁ = ‖g − g'‖₁ / ‖w − w'‖₁, g and g' being the gradients of this step and of the one
      before, at the weights w and w'; θ* begins where the experience does;
    - "code": θ* ← (1 − v) θ* + v θ with v = 2 (1 + ‖g‖₁) / (‖θ − θ*‖₁ ‖g − g'‖₁); θ* begins with
      the weights after the first step.

    β outside (0, 1), or of a first step, is `outside`; v is 1 − `outside`. At the end of an
    experience θ ← θ*. The first one is not averaged: there is nothing to keep yet.

    Expansion (`expand`): sets of all that trains, each with the instructions that it learned. An
    experience goes on with the set whose instructions are most similar, averaged; below
    `threshold` a new set begins from the weights before the stream and is not averaged. What is
    asked is answered with the set whose instructions are most similar to the prompt; below
    `threshold` with the newest one. Similarity: `clbench.text.codebook`.

    Attributes:
        base: The method that takes the steps. With `language_model.tuning=lora` what trains, and
            so a set, is small.
        form: "paper" or "code".
        outside: β where the equation gives none, in [0, 1).
        expand: Have several sets; text only.
        threshold: Similarity that makes a set go on; the paper has 0.9, and 0.3 where
            instructions of a task differ.

    **Differs from the paper:** nothing in "paper" but where its gradients are taken, which its
    code shows. There the coefficient is that of the new weights, not of the old; it leaves out
    the division by the distance, and has a factor 2: "code". How often the equation gave a
    coefficient in (0, 1) is in `strategy_facts`. Instructions are known by their text, at most
    100 of an experience; of a prompt, the words that are in some instruction.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    form: Literal["paper", "code"] = "paper"
    outside: float = 0.99
    expand: bool = False
    threshold: float = 0.9

    def __post_init__(self) -> None:
        require(self, "threshold", at_least=0, at_most=1)
        require(self, "outside", at_least=0, at_most=1)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if self.expand and scenario.setting is not Setting.INSTRUCTION_TUNING:
            raise UserError(
                "LCA tells sets apart by instructions, of which this scenario has none. Set "
                "strategy.expand=false."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self._weights = [p for p in self.model.parameters() if p.requires_grad]
        self.first = self._copy() if self.expand else []
        self.sets: list[list[Tensor]] = []
        self.codebook = Codebook()
        self.current = 0
        self.average: list[Tensor] = []
        self.tally = torch.zeros(2, dtype=torch.int64, device=context.device)

    def before(self, experience: Experience) -> None:
        self._averaging = experience.index > 0
        if self.expand:
            self._averaging = self.choose(experience)
        super().before(experience)
        self.average = self._copy()
        self._gradients: list[Tensor] = []
        self._moved = [w.new_zeros(()) for w in self._weights]

    def update(self, loss: Tensor) -> None:
        if not self._averaging:
            super().update(loss)
            return
        before = self._copy()
        super().update(loss)
        self.follow()
        difference = torch._foreach_sub(self._weights_now(), before)
        self._moved = list(torch._foreach_norm(difference, 1))

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the average by what the step just taken tells."""
        weights = self._weights_now()
        gradients = [
            torch.zeros_like(w) if p.grad is None else p.grad
            for p, w in zip(self._weights, weights, strict=True)
        ]
        first = not self._gradients
        if first and self.form == "code":
            torch._foreach_copy_(self.average, weights)
        way = torch._foreach_sub(weights, self.average)
        change = gradients if first else torch._foreach_sub(gradients, self._gradients)
        kept = coefficient(
            self.form,
            torch.stack(torch._foreach_norm(way, 1)),
            torch.stack(torch._foreach_norm(gradients, 1)),
            torch.stack(torch._foreach_norm(change, 1)),
            torch.stack(self._moved),
        )
        inside = (kept > 0) & (kept < 1) & (not first)
        self.tally += torch.stack((inside.sum(), inside.new_tensor(len(inside), dtype=torch.int64)))
        kept = torch.where(inside, kept, self.outside)
        torch._foreach_mul_(way, list((1 - kept).unbind()))
        torch._foreach_add_(self.average, way)
        self._gradients = [g.clone() for g in gradients]

    def after(self, experience: Experience) -> None:
        if self._averaging:
            torch._foreach_copy_(self._weights_now(), self.average)
        self.average = []
        super().after(experience)
        if self.expand:
            self.sets[self.current] = self._copy()

    def choose(self, experience: Experience) -> bool:
        """Takes up the set for an experience; whether it is an old one."""
        assert experience.train is not None
        self._tokenizer = text_source(experience.train).tokenizer
        instructions = instructions_of(experience.train)
        similar = self.codebook.compared(instructions)
        known = len(similar) > 0 and bool(similar.max() >= self.threshold)
        self.current = int(similar.argmax()) if known else len(self.sets)
        self.codebook.add(instructions, self.current if known else None)
        if not known:
            self.sets.append(self.first)
        torch._foreach_copy_(self._weights_now(), self.sets[self.current])
        return known

    def predict(self, batch: Batch) -> Tensor:
        if len(self.sets) < 2:
            return super().predict(batch)
        similar, place = self.codebook.of_prompts(prompts_of(batch.inputs, self._tokenizer)).max(1)
        place = torch.where(similar >= self.threshold, place, len(self.sets) - 1)
        now = self._copy()

        def with_set(index: int, some: Batch) -> Tensor:
            chosen = now if index == self.current else self.sets[index]
            torch._foreach_copy_(self._weights_now(), chosen)
            return self.base.predict(some)

        outputs = in_groups(batch, place, with_set)
        torch._foreach_copy_(self._weights_now(), now)
        return outputs

    def facts(self) -> Mapping[str, Any]:
        """How many coefficients the equation gave, of how many; how many sets there are."""
        inside, every = self.tally.tolist()
        found = {"coefficients": every, "coefficients_by_equation": inside}
        return {**super().facts(), **found, **({"sets": len(self.sets)} if self.expand else {})}

    def _weights_now(self) -> list[Tensor]:
        return [p.detach() for p in self._weights]

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._weights]


def coefficient(form: str, way: Tensor, gradient: Tensor, change: Tensor, moved: Tensor) -> Tensor:
    """What is kept of the average, by the equation: anything, or not finite.

    Args:
        form: "paper" or "code".
        way: ‖θ − θ*‖₁ of each tensor, [P].
        gradient: ‖g‖₁.
        change: ‖g − g'‖₁.
        moved: ‖w − w'‖₁; "paper" only.
    """
    if form == "paper":
        return (gradient + 1) * moved / (way * change)
    return 1 - 2 * (1 + gradient) / (way * change)
