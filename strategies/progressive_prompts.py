"""Progressive prompts: a soft prompt for each experience, in front of all older ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.samples import Batch
from clbench.text.codebook import Codebook, in_groups, instructions_of, prompts_of
from clbench.text.instructions import InstructionScenario, text_source
from clbench.text.language_model import LanguageModel
from clbench.text.lora import require_whole
from clbench.text.soft_prompts import SoftPrompted
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario, Setting, require


@dataclass(kw_only=True)
class ProgressivePrompts(GradientStrategy):
    """Keeps the model as it is and learns a few vectors for each experience, read before all else.

    Paper: Razdaibiedina, Mao, Hou, Khabsa, Lewis and Almahairi 2023, "Progressive Prompts:
    Continual Learning for Language Models", ICLR, arXiv 2301.12314.

    Equation: in experience t, minimise CE of the answers to [P_t, ..., P_1, x] over P_t alone; P_t
    = E + MLP(E) with E [prompt_length, features] that begins as the vectors of random tokens. At
    its end P_t is kept and the MLP is gone. An x of experience k is answered as [P_k, ..., P_1, x].

    Attributes:
        prompt_length: Vectors of each experience.
        bottleneck: Hidden units of the MLP; 0: there is none.
        whose: To which experience a question belongs: the one whose "instructions" are most
            similar to it (`clbench.text.codebook`), or the "newest", for all.

    **Differs from the paper:** it is told the experience of every test sample; here nobody is. The
    MLP has a hidden layer with ReLU and a layer norm; whether that is in the paper could not be
    confirmed. It has 10 vectors, 800 hidden units and lr=0.3 for T5.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.INSTRUCTION_TUNING})

    prompt_length: int = 8
    bottleneck: int = 64
    whose: Literal["instructions", "newest"] = "instructions"
    lr: float = 0.01
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "prompt_length", at_least=1)
        require(self, "bottleneck", at_least=0)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        require_whole("ProgressivePrompts", scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        assert isinstance(model, LanguageModel)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._soft = SoftPrompted(model.decoder)
        model.decoder = self._soft
        super().setup(model, context)
        features = self._soft.embedding.shape[1]
        self.start = nn.Parameter(self._soft.embedding.new_zeros(self.prompt_length, features))
        self.mlp = _mlp(features, self.bottleneck).to(context.device)
        self.prompts: list[Tensor] = []
        self.codebook = Codebook()
        self._learning = False

    def before(self, experience: Experience) -> None:
        assert experience.train is not None
        source = text_source(experience.train)
        self._tokenizer = source.tokenizer
        self._fits(int(source.lengths.max()), experience.index + 1)
        self.codebook.add(instructions_of(experience.train))
        generator = self.context.generator("progressive_prompts")
        vectors = self._soft.embedding
        tokens = torch.randint(
            len(vectors), (self.prompt_length,), generator=generator, device=vectors.device
        )
        with torch.no_grad():
            self.start.copy_(vectors[tokens])
        _draw(self.mlp, generator)
        self._learning = True

    def loss(self, batch: Batch) -> Tensor:
        self._soft.prefix = self.prefix(len(self.prompts))
        return super().loss(batch)

    def after(self, experience: Experience) -> None:  # noqa: ARG002
        self.prompts.append(self.newest().detach().clone())
        self._soft.prefix = None
        self._learning = False

    def predict(self, batch: Batch) -> Tensor:
        newest = len(self.prompts) - (not self._learning)
        place = torch.full((len(batch),), newest)
        if self.whose == "instructions" and newest > 0:
            prompts = prompts_of(batch.inputs, self._tokenizer)
            similar, best = self.codebook.of_prompts(prompts).max(1)
            place = torch.where(similar > 0, best, newest)

        def with_prompts(index: int, some: Batch) -> Tensor:
            self._soft.prefix = self.prefix(index) if index >= 0 else None
            return super(ProgressivePrompts, self).predict(some)

        return in_groups(batch, place, with_prompts)

    def trainable(self) -> list[nn.Parameter]:
        return [self.start, *self.mlp.parameters()]

    def facts(self) -> Mapping[str, Any]:
        """Vectors that stand before a sample of each experience."""
        return {"prompt_tokens": [self.prompt_length * (i + 1) for i in range(len(self.prompts))]}

    def newest(self) -> Tensor:
        """The prompt that is being learned, [prompt_length, features]."""
        made: Tensor = self.start + self.mlp(self.start) if self.bottleneck else self.start
        return made

    def prefix(self, index: int) -> Tensor:
        """What is read before the samples of an experience, its own prompt first."""
        known = [*self.prompts, self.newest()] if self._learning else self.prompts
        return torch.cat([known[i] for i in range(index, -1, -1)])

    def _fits(self, longest: int, experiences: int) -> None:
        scenario = self.context.scenario
        assert isinstance(scenario, InstructionScenario)
        room, wanted = scenario.language_model.context - longest, self.prompt_length * experiences
        if wanted > room:
            raise UserError(
                f"ProgressivePrompts: the prompts of {experiences} experiences take {wanted} "
                f"tokens, but samples of up to {longest} tokens leave {room} of the context. Set "
                "strategy.prompt_length to less, or take a model with a longer context."
            )


def _mlp(features: int, bottleneck: int) -> nn.Sequential:
    if not bottleneck:
        return nn.Sequential()
    return nn.Sequential(
        nn.Linear(features, bottleneck),
        nn.ReLU(),
        nn.Linear(bottleneck, features),
        nn.LayerNorm(features),
    )


def _draw(mlp: nn.Sequential, generator: torch.Generator) -> None:
    """Weights as PyTorch draws them, from this generator."""
    for module in mlp:
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
