"""Small trainable parts for a frozen vision transformer: adapters, scales and shifts, prompts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from clbench.nn.vit import Insertion, Tokens, add_after, add_beside_mlp

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class Adapter(nn.Module):
    """A bottleneck: A(x) = s (W_u dropout(ReLU(W_d x + b_d)) + b_u); it starts at A(x) = 0.

    As in AdaptFormer (Chen et al. 2022, arXiv 2205.13535): W_d is Kaiming-uniform (a = √5, that
    is, uniform in ±1/√n_features), all else zero.

    Args:
        n_features: Length of the tokens, D.
        bottleneck: Hidden units, r; there are 2Dr + r + D parameters.
        scale: s.
        dropout: On the hidden units, in training.
        generator: Draws W_d; on the CPU.
    """

    def __init__(
        self,
        n_features: int,
        bottleneck: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.down = skip_init(nn.Linear, n_features, bottleneck)
        self.up = skip_init(nn.Linear, bottleneck, n_features)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        hidden: Tensor = self.dropout(F.relu(self.down(x)))
        added: Tensor = self.scale * self.up(hidden)
        return added


class Adapters(nn.ModuleList):
    """An adapter beside the MLP of every block of a transformer.

    Args:
        vit: Whose blocks they are for; nothing is put into it until `put_into`.
        bottleneck: See `Adapter`, as the rest.
        scale: s.
        dropout: In training.
        generator: Draws the weights; on the CPU.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        bottleneck: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(
            Adapter(vit.embed_dim, bottleneck, scale, dropout, generator) for _ in vit.blocks
        )

    def put_into(self, vit: VisionTransformer) -> Insertion:
        """Puts them beside the MLPs: x + MLP(norm(x)) + A(x)."""
        return add_beside_mlp(vit, self)


class ScaleShift(nn.Module):
    """x ⊙ γ + β for each feature; γ ~ N(1, 0.02²) and β ~ N(0, 0.02²) at the start.

    Args:
        n_features: Length of γ and β.
        generator: Draws them; on the CPU.
    """

    def __init__(self, n_features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(n_features).normal_(1, 0.02, generator=generator))
        self.shift = nn.Parameter(torch.empty(n_features).normal_(0, 0.02, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_features] to the same shape."""
        return x * self.scale + self.shift


class SSF(nn.ModuleList):
    """Scale and shift after every linear layer and every norm of a transformer.

    Lian et al. 2022, "Scaling & Shifting Your Features", arXiv 2210.08823: after the patch
    embedding, both norms, qkv, proj, fc1 and fc2 of every block, and the final norm.

    Args:
        vit: Whose layers they are for; nothing is put into it until `put_into`.
        generator: Draws scales and shifts; on the CPU.
    """

    def __init__(self, vit: VisionTransformer, generator: torch.Generator) -> None:
        widths = dict(_widths(vit))
        super().__init__(ScaleShift(width, generator) for width in widths.values())
        self.paths = list(widths)

    def put_into(self, vit: VisionTransformer) -> Insertion:
        """Puts each one after its layer."""
        return add_after(vit, dict(zip(self.paths, self, strict=True)))


def _widths(vit: VisionTransformer) -> Iterator[tuple[str, int]]:
    """Paths of linear layers and norms, and the length of their outputs."""
    yield "patch_embed", vit.embed_dim
    for i, block in enumerate(vit.blocks):
        yield f"blocks.{i}.norm1", vit.embed_dim
        yield f"blocks.{i}.attn.qkv", block.attn.qkv.out_features
        yield f"blocks.{i}.attn.proj", block.attn.proj.out_features
        yield f"blocks.{i}.norm2", vit.embed_dim
        yield f"blocks.{i}.mlp.fc1", block.mlp.fc1.out_features
        yield f"blocks.{i}.mlp.fc2", block.mlp.fc2.out_features
    # One of them does nothing, depending on how the model pools.
    yield ("fc_norm" if isinstance(vit.norm, nn.Identity) else "norm"), vit.embed_dim


class VPT(nn.ParameterList):
    """Visual prompts: trained tokens beside those of the image; they start at zero.

    Jia et al. 2022, "Visual Prompt Tuning", arXiv 2203.12119; "shallow": the same tokens go
    through all blocks; "deep": each block gets new ones.

    **Differs from the paper:** zero at the start, as in the code of APER, where the slope of the
    layer norm is steepest; the paper draws them.

    Args:
        vit: Whose blocks they are for; nothing is put into it until `put_into`.
        length: Tokens.
        deep: New ones for each block.
    """

    def __init__(self, vit: VisionTransformer, length: int, deep: bool) -> None:
        count = len(vit.blocks) if deep else 1
        super().__init__(nn.Parameter(torch.zeros(length, vit.embed_dim)) for _ in range(count))
        self.deep = deep

    def put_into(self, vit: VisionTransformer) -> Insertion:
        """Puts the tokens into the sequence."""
        if not self.deep:
            return Tokens(vit, self[0])
        insertions = [Tokens(vit, tokens, i, i) for i, tokens in enumerate(self)]
        return Insertion(handle for one in insertions for handle in one.handles)


class AdapterSets(nn.ModuleList):
    """Finished sets of adapters, one for each experience, frozen and in evaluation mode.

    Its state loads into an empty one: as many sets are made as the state has.

    Args:
        template: A set of the shape that all will have; only its shape counts.
    """

    def __init__(self, template: Adapters) -> None:
        super().__init__()
        # In a tuple, where it is no part of the module's state.
        self._template = (_frozen_copy(template),)

    def add(self, adapters: Adapters) -> None:
        """Keeps a copy."""
        self.append(_frozen_copy(adapters))

    def of(self, experience: int) -> Adapters:
        """Those of one experience, by position."""
        return cast(Adapters, self[experience])

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As any module's, after making or dropping sets to fit."""
        count = len({key.partition(".")[0] for key in state_dict})
        del self[count:]
        while len(self) < count:
            self.add(self._template[0])
        return super().load_state_dict(state_dict, strict, assign)


def _frozen_copy(adapters: Adapters) -> Adapters:
    frozen = copy.deepcopy(adapters).requires_grad_(False).eval()
    frozen.zero_grad()  # a copy of a parameter has a copy of its gradient
    return frozen
