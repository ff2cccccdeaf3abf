"""DualPrompt: prompts for all experiences, and prompts for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.prompts import GrowingTable, cosines, uniform
from clbench.prompting import PromptStrategy
from clbench.samples import Batch
from clbench.types import Context, Experience, require


@dataclass(kw_only=True)
class DualPrompt(PromptStrategy):
    """Prefixes in the first blocks that all experiences share, in later ones an expert for each.

    Paper: Wang, Zhang, Ebrahimi, Sun, Zhang, Lee, Ren, Su, Perot, Dy and Pfister 2022,
    "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", arXiv 2204.04799;
    code google-research/l2p@dd8836e.

    Equations: a prompt p of L tokens, put into a block, gives its attention L/2 more keys and L/2
    more values, softmax(Q [p_K; K]^T / sqrt(d)) [p_V; V]; class token and patches stay alone in
    the sequence. q(x) is the feature of x by the transformer without prompts. In experience t
    minimise, over the general prompt g, the expert e_t, its key k_t and the head,

        CE(head(f(x; g, e_t)), y) - match_weight * cos(q(x), k_t),

    the cross-entropy over the classes of the experience. A prediction takes the expert whose key
    has the greatest cosine with q(x). Experts and keys of earlier experiences do not change.

    Attributes:
        general_length: Tokens of the general prompt in each of its blocks, keys and values
            together; even.
        expert_length: Of an expert in each of its blocks; even.
        general_layers: Blocks with the general prompt, counted from 0. None: 0 and 1; of fewer
            than four blocks the first half.
        expert_layers: Blocks with experts. None: those after, up to block 4.
        match_weight: λ.
        expert_start: A new expert starts "random" or as the "previous" one ended.
        start_scale: Random prompts and keys start uniform in [0, start_scale).

    **Differs from the paper:** nothing in the equations. The paper's general_length 5 can't be
    halved: 6, as CODA-Prompt's authors take. The official code counts the lengths for keys and
    for values (so 10 and 10 here for CIFAR-100, 10 and 40 for ImageNet-R), starts an expert as
    the "previous", clips gradients to norm 1, as the YAML does, and lets the images of a batch
    vote on the expert for CIFAR-100. Its lr is 0.03 (ImageNet-R: 0.005) x batch size / 256. The
    PyTorch port and PILOT mix up keys, values and images by a reshape.
    """

    general_length: int = 6
    expert_length: int = 20
    general_layers: tuple[int, ...] | None = None
    expert_layers: tuple[int, ...] | None = None
    match_weight: float = 1.0
    expert_start: Literal["random", "previous"] = "random"
    start_scale: float = 0.01
    lr: float = 0.005
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "general_length", "expert_length", "match_weight", at_least=0)
        require(self, "start_scale", above=0)
        if self.general_length % 2 or self.expert_length % 2:
            raise UserError(
                f"DualPrompt: general_length={self.general_length} and expert_length="
                f"{self.expert_length}: give even numbers, half of the tokens are keys and half "
                "values."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        depth = len(self._vit.blocks)
        general = range(min(2, depth // 2))
        self._general_blocks = self.blocks("general_layers", self.general_layers, general)
        experts = [block for block in range(min(5, depth)) if block not in self._general_blocks]
        self._expert_blocks = self.blocks("expert_layers", self.expert_layers, experts)
        if both := {*self._general_blocks} & {*self._expert_blocks}:
            raise UserError(
                f"DualPrompt: blocks {sorted(both)} are in strategy.general_layers and in "
                "strategy.expert_layers; a block has one kind of prompt."
            )
        general_shape = len(self._general_blocks), self.general_length, self._width
        self._general = nn.ParameterList([nn.Parameter(self._random(*general_shape))])
        self._experts = GrowingTable(len(self._expert_blocks), self.expert_length, self._width)
        self._keys = GrowingTable(self._width)
        self.add_prompts(nn.ModuleList((self._general, self._experts, self._keys)))

    def before(self, experience: Experience) -> None:
        """A new expert and its key."""
        super().before(experience)
        start = self._random(1, *self._experts.shape)
        if self.expert_start == "previous" and len(self._experts):
            start = self._experts.latest.detach().clone()
        self._experts.grow(start)
        self._keys.grow(self._random(1, *self._keys.shape))

    def loss(self, batch: Batch) -> Tensor:
        match = cosines(self.queries_of(batch), self._keys.latest)
        features = self.prompted(batch.inputs, self._experts.latest[0])
        return self.cross_entropy(features, batch.targets) - self.match_weight * match.mean()

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs for a prediction."""
        queries = self.queries(inputs)
        if not len(self._keys):
            return self.answers(queries)
        expert = cosines(queries, self._keys()).argmax(1)
        return self.answers(self.prompted(inputs, self._experts()[expert]))

    def prompted(self, inputs: Tensor, expert: Tensor) -> Tensor:
        """Features with the general prompt and an expert, [B, n_features].

        Args:
            inputs: [B, C, H, W].
            expert: [blocks, L, D], or [B, blocks, L, D] for each sample its own.
        """
        prefixes = dict(zip(self._general_blocks, self._general[0], strict=True))
        prefixes |= zip(self._expert_blocks, expert.unbind(-3), strict=True)
        return self.prefixed(inputs, prefixes)

    def _random(self, *shape: int) -> Tensor:
        return uniform(shape, self.start_scale, self.prompt_generator)
