"""CODA-Prompt: prompts composed of components by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.prompts import (
    GrowingTable,
    attention_weights,
    gram_error,
    orthonormal_rows,
)
from clbench.prompting import PromptStrategy
from clbench.samples import Batch
from clbench.types import Context, Experience, require


@dataclass(kw_only=True)
class CODAPrompt(PromptStrategy):
    """Composes the prefix of each image from components, of which each experience adds some.

    Paper: Smith, Karlinsky, Gutta, Cascante-Bonilla, Kim, Arbelle, Panda, Feris and Kira 2023,
    "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual
    Learning", arXiv 2211.13218; code GT-RIPL/CODA-Prompt@6417d4f.

    Equations: in each prompted block the prompt of an image x with query q (its feature by the
    transformer without prompts) is

        p = sum over m of α_m P_m,   α_m = cos(q * A_m, K_m),

    with components P_m, attention vectors A_m and keys K_m, * being elementwise. Its first half
    are keys for the block's attention, its second half values: softmax(Q [p_K; K]^T / sqrt(d))
    [p_V; V]. Each experience adds `components` of them and trains these and the head; earlier
    ones stay in the sum, frozen. Minimise

        CE over the classes of the experience
        + ortho_weight * sum over blocks and over B in {P, K, A} of L(B),

    with L(B) = ||B B^T - I||_F, or its square per entry; frozen rows of B are constants. New rows
    of P (flattened), K and A start as random unit vectors, by Gram-Schmidt orthogonal to each
    other and to all earlier rows (to the latest ones where the space has no room for more).

    Attributes:
        components: Of each experience; the paper has 100 over the whole stream of 10.
        prompt_length: Tokens of a prompt, keys and values together; even.
        layers: Blocks with prompts, counted from 0. None: the first five, or all if there are
            fewer.
        ortho_weight: λ.
        ortho_form: L as in the "paper", or the mean square of the entries, as in the "code".

    **Differs from the paper:** λ is 0 as in the released scripts. The paper has 0.1, but its code
    multiplied it by 1e-6, and the authors find it needless with Gram-Schmidt for each experience
    (issues 4 and 12 of their repository); the paper draws all rows at the start. The code's
    Gram-Schmidt takes trained rows for orthogonal, which they no longer are; here new rows are
    orthogonal to them all the same. Components per experience are an option, as nobody knows the
    length of the stream. The default lr is 0.01, for streams that are shorter than the paper's,
    which has 0.001. Schedule "cosine" falls to zero at the end of the experience, by the
    step; the code's by the epoch, along cos(99πe / 200(E-1)).
    """

    components: int = 10
    prompt_length: int = 8
    layers: tuple[int, ...] | None = None
    ortho_weight: float = 0.0
    ortho_form: Literal["paper", "code"] = "paper"
    lr: float = 0.01
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    schedule: Literal["constant", "cosine"] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "components", at_least=1)
        require(self, "prompt_length", at_least=2)
        require(self, "ortho_weight", at_least=0)
        if self.prompt_length % 2:
            raise UserError(
                f"CODAPrompt: prompt_length={self.prompt_length}: give an even number, half of "
                "the tokens are keys and half values."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        if self.components > self._width:
            raise UserError(
                f"CODAPrompt: strategy.components={self.components} can't be orthogonal: this "
                f"vision transformer has {self._width} features. Lower it to that."
            )
        first = range(min(5, len(self._vit.blocks)))
        self._blocks = self.blocks("layers", self.layers, first)
        n_blocks = len(self._blocks)
        self._prompts = GrowingTable(n_blocks, self.prompt_length * self._width)
        self._attention = GrowingTable(n_blocks, self._width)
        self._keys = GrowingTable(n_blocks, self._width)
        self._tables = self._prompts, self._keys, self._attention
        self.add_prompts(nn.ModuleList(self._tables))

    def before(self, experience: Experience) -> None:
        """New components, earlier ones frozen."""
        super().before(experience)
        for table in self._tables:
            earlier = table().detach().transpose(0, 1)
            rows = orthonormal_rows(earlier, self.components, self.prompt_generator)
            table.grow(rows.transpose(0, 1))

    def loss(self, batch: Batch) -> Tensor:
        loss = self.cross_entropy(
            self.prompted(batch.inputs, self.queries_of(batch)), batch.targets
        )
        if not self.ortho_weight:
            return loss
        squared = self.ortho_form == "code"
        errors = [gram_error(table().transpose(0, 1), squared) for table in self._tables]
        return loss + self.ortho_weight * torch.stack(errors).sum()

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs for a prediction."""
        return self.answers(self.prompted(inputs, self.queries(inputs)))

    def prompted(self, inputs: Tensor, queries: Tensor) -> Tensor:
        """Features with the prompts composed for the queries, [B, n_features]."""
        # [blocks, components, ...]: one matrix product for all blocks.
        prompts, keys, attention = (table().transpose(0, 1) for table in self._tables)
        weights = attention_weights(queries, attention, keys)
        composed = (weights @ prompts).unflatten(-1, (self.prompt_length, self._width))
        return self.prefixed(inputs, dict(zip(self._blocks, composed, strict=True)))
