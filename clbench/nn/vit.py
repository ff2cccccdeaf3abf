"""Putting things into timm's vision transformers, by hooks, and taking them out again.

Nothing here copies a forward pass of timm or changes its modules: what is put in comes out with
`Insertion.remove` or at the end of a `with` block, and the model is what it was. Everything works
under autocast, in inference mode and in torch.func, and a deep copy of a model carries copies of
what is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clbench.errors import UserError

if TYPE_CHECKING:
    from timm.models.vision_transformer import Block, VisionTransformer

Inserted = TypeVar("Inserted", bound="Insertion")

#: What to tell a user whose backbone can't be used.
BACKBONES = (
    "Use backbone=vit_glyphs, which needs no download, or backbone=timm with a vision transformer "
    "such as backbone.name=vit_base_patch16_224.augreg_in21k."
)


def vision_transformer(model: nn.Module) -> VisionTransformer:
    """The one vision transformer of timm in a model.

    Raises:
        UserError: If there is none, there are several, or its blocks are of another kind than
            norm, attention, norm, MLP, one after another.
    """
    from timm.models.vision_transformer import Block, VisionTransformer

    found = [m for m in model.modules() if isinstance(m, VisionTransformer)]
    if len(found) != 1:
        raise UserError(
            f"This method needs a model with one vision transformer of timm; this "
            f"{type(model).__name__} has {len(found) or 'none'}. {BACKBONES}"
        )
    kinds = {type(block).__name__ for block in found[0].blocks if not isinstance(block, Block)}
    if kinds:
        raise UserError(
            f"This method can't work on transformer blocks of the kind {', '.join(sorted(kinds))}. "
            f"{BACKBONES}"
        )
    return found[0]


class Insertion:
    """Hooks in a model.

    Args:
        handles: What torch returned for each hook.

    Attributes:
        handles: The same; none once they are removed.
    """

    def __init__(self, handles: Iterable[RemovableHandle]) -> None:
        self.handles = list(handles)

    def remove(self) -> None:
        """Takes the hooks out; nothing happens the second time."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __enter__(self: Inserted) -> Inserted:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def add_beside_mlp(vit: VisionTransformer, modules: Iterable[nn.Module]) -> Insertion:
    """A branch beside the MLP of every block: x + MLP(norm(x)) + module(x), x not normalised.

    Drop path and layer scale of the block don't touch the branch.

    Args:
        vit: A vision transformer.
        modules: One for each block, [B, N, D] to [B, N, D].
    """
    handles = []
    for block, module in list(zip(vit.blocks, modules, strict=True)):
        branch = _Branch(module)
        handles.append(block.norm2.register_forward_pre_hook(branch.keep))
        handles.append(block.register_forward_hook(branch.add))
    return Insertion(handles)


def add_after(vit: VisionTransformer, modules: Mapping[str, nn.Module]) -> Insertion:
    """Modules that change the output of modules of the transformer.

    Args:
        vit: A vision transformer.
        modules: By the path of the module whose output they get, such as "blocks.0.mlp.fc1".
    """
    return Insertion(
        vit.get_submodule(path).register_forward_hook(_After(module))
        for path, module in modules.items()
    )


class Tokens(Insertion):
    """Tokens at the end of the sequence, from before one block until after another.

    Class token and patches keep their places, so pooling never meets the tokens.

    Args:
        vit: A vision transformer.
        tokens: [L, D], or [B, L, D] for each sample its own.
        first: The block before which they come in.
        last: The block after which they go; default: the last one.

    Attributes:
        outputs: What became of the tokens in the last pass, [B, L, D], not normalised.
    """

    outputs: Tensor

    def __init__(
        self, vit: VisionTransformer, tokens: Tensor, first: int = 0, last: int | None = None
    ) -> None:
        self.tokens = tokens
        blocks = list(vit.blocks)
        # Bound methods, not closures: a deep copy of the model gets a copy of this object.
        super().__init__(
            (
                blocks[first].register_forward_pre_hook(self._append),
                blocks[-1 if last is None else last].register_forward_hook(self._cut),
            )
        )

    def _append(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG002
        return (_append(args[0], self.tokens), *args[1:])

    def _cut(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        kept = output.shape[1] - self.tokens.shape[-2]
        self.outputs = output[:, kept:]
        return output[:, :kept]


class PooledTokens(Insertion):
    """Tokens at the end of the sequence that speak for it: the features are their mean output.

    Whatever the transformer pools gets, in the place of class token and patches, the mean of what
    became of the tokens, after the final norm.

    Args:
        vit: A vision transformer.
        tokens: [L, D], or [B, L, D] for each sample its own; at least one.
    """

    def __init__(self, vit: VisionTransformer, tokens: Tensor) -> None:
        self.tokens = tokens
        super().__init__(
            (
                vit.blocks[0].register_forward_pre_hook(self._append),
                vit.norm.register_forward_hook(self._pool),
            )
        )

    def _append(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG002
        return (_append(args[0], self.tokens), *args[1:])

    def _pool(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        length = self.tokens.shape[-2]
        mean = output[:, -length:].mean(1, keepdim=True)
        return mean.expand(-1, output.shape[1] - length, -1)


def add_prefix(block: Block, keys: Tensor, values: Tensor) -> Insertion:
    """Keys and values that every token of a block can attend to, besides those of all tokens.

    The block's own attention does the work, on a sequence that is longer by placeholders: their
    keys and values are replaced, their queries are lost. Where a model normalises its keys, it
    normalises these too.

    Args:
        block: Of a vision transformer, with timm's `Attention`.
        keys: [L, D], heads one after another, or [B, L, D] for each sample its own.
        values: Of the same shape.

    Raises:
        UserError: If the attention is of another kind.
    """
    from timm.models.vision_transformer import Attention

    if not isinstance(block.attn, Attention):
        raise UserError(
            f"This method can't put keys into a {type(block.attn).__name__}. {BACKBONES}"
        )
    prefix = _Prefix(keys, values)
    return Insertion(
        (
            block.attn.register_forward_pre_hook(prefix.lengthen),
            block.attn.qkv.register_forward_hook(prefix.replace),
            block.attn.register_forward_hook(prefix.shorten),
        )
    )


class _Branch:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.input: Tensor | None = None

    def keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        self.input = args[0]

    def add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        branch: Tensor = self.module(self.input)
        self.input = None
        return output + branch


class _After:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        changed: Tensor = self.module(output)
        return changed


class _Prefix:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def lengthen(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG002
        x = args[0]
        return (_append(x, x.new_zeros(self.keys.shape[-2], x.shape[-1])), *args[1:])

    def replace(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        rows = torch.cat((torch.zeros_like(self.keys), self.keys, self.values), -1)
        return _append(output[:, : output.shape[1] - self.keys.shape[-2]], rows)

    def shorten(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        return output[:, : output.shape[1] - self.keys.shape[-2]]


def _append(x: Tensor, rows: Tensor) -> Tensor:
    """Rows, [L, D] or [B, L, D], at the end of each sequence of [B, N, D]."""
    return torch.cat((x, rows.to(x.dtype).expand(len(x), -1, -1)), 1)
