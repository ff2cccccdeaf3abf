"""A model's matrices, block by block and kind by kind, as declared for families of models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from clbench.errors import UserError


@dataclass(frozen=True)
class Family:
    """How some models name the modules of a block.

    Attributes:
        name: For people.
        block: Pattern of a block's path, whatever stands before it.
        categories: Patterns of module paths within a block; "" is the block itself. The category
            that their parameters have; None: part of an embedding, in no category.
        fused: Modules within a block whose tensors are several matrices of one size: their
            number, and the dimension along which they lie.
    """

    name: str
    block: str
    categories: Mapping[str, str | None]
    fused: Mapping[str, tuple[int, int]] = field(default_factory=dict)


#: Everything outside the blocks belongs to no category: embeddings, stems, layers between
#: stages, the final norm and the head.
FAMILIES: tuple[Family, ...] = (
    Family(
        "MLP of clbench",
        r"layers\.\d+",
        {"": "linear"},
    ),
    Family(
        "ResNet of clbench, timm and torchvision",
        r"layer\d+\.\d+",
        {r"conv\d|downsample\.0": "convolution", r"bn\d|downsample\.1": "norm"},
    ),
    Family(
        "ConvNeXt of timm",
        r"stages\.\d+\.blocks\.\d+",
        {"conv_dw": "convolution", r"mlp\.fc\d": "ffn", "norm": "norm", "": "scale"},
    ),
    Family(
        "ViT, DeiT, DINOv2 and Swin of timm",
        r"blocks\.\d+",
        {
            r"attn\.(?:qkv|proj)": "attention",
            r"mlp\.(?:fc\d|w\d+)": "ffn",
            r"norm\d|attn\.(?:[qk]_)?norm|mlp\.norm": "norm",
            r"ls\d": "scale",
            "attn": None,  # relative positions
        },
        {r"attn\.qkv": (3, 0)},
    ),
    Family(
        "Llama, Mistral, Qwen, Gemma and OPT of Hugging Face; nn.TransformerEncoder",
        r"layers\.\d+",
        {
            r"self_attn(?:\.(?:[qkvo]|out)_proj)?": "attention",
            r"mlp\.(?:gate|up|down)_proj|fc[12]|linear[12]": "ffn",
            r"\w+_layernorm|self_attn\.[qk]_norm|\w+_layer_norm|norm[12]": "norm",
        },
        {"self_attn": (3, 0)},
    ),
    Family(
        "GPT-2 of Hugging Face",
        r"h\.\d+",
        {r"attn\.c_(?:attn|proj)": "attention", r"mlp\.c_(?:fc|proj)": "ffn", r"ln_\d": "norm"},
        {r"attn\.c_attn": (3, -1)},
    ),
    Family(
        "BERT of Hugging Face",
        r"layer\.\d+",
        {
            r"attention\.(?:self\.(?:query|key|value)|output\.dense)": "attention",
            r"(?:intermediate|output)\.dense": "ffn",
            r"(?:attention\.)?output\.LayerNorm": "norm",
        },
    ),
)


@dataclass(frozen=True)
class Part:
    """A parameter, or one of the equal pieces that it is made of.

    Attributes:
        name: Of the parameter.
        piece: Which piece, from 0.
        pieces: How many there are.
        dim: Along which they lie.
    """

    name: str
    piece: int = 0
    pieces: int = 1
    dim: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor that has the shape of the parameter; a view."""
        return tensor.chunk(self.pieces, self.dim)[self.piece]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix with its bias, or whatever else one module keeps: trained or not as one.

    Attributes:
        name: Path of its module; "[i]" behind it for piece i of a fused one.
        block: Path of the block it is in.
        category: What it is there for.
        parts: Its tensors.
    """

    name: str
    block: str
    category: str
    parts: tuple[Part, ...]


def partition(model: nn.Module, families: Sequence[Family] = FAMILIES) -> list[Matrix]:
    """The matrices of all blocks of a model, in the order of the model.

    Only parameters that require gradients count. A parameter that no matrix holds is in no block.

    Args:
        model: Of one of the families, at any depth within it.
        families: Declared names.

    Raises:
        UserError: If no module has a declared name, or a block has a module without one.
    """
    modules: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    declared = {path: found for path in modules if (found := _declared(path, families))}
    blocks = sorted({block for block, _, _ in declared.values()})
    _check(modules, declared, blocks, families)
    matrices = []
    for path, (block, category, (pieces, dim)) in declared.items():
        if category is None:
            continue
        for i in range(pieces):
            parts = tuple(Part(name, i, pieces, dim) for name in modules[path])
            name = f"{path}[{i}]" if pieces > 1 else path
            matrices.append(Matrix(name, block, category, parts))
    return matrices


_Found = tuple[str, "str | None", tuple[int, int]]


def _declared(path: str, families: Sequence[Family]) -> _Found | None:
    """Block, category and pieces of a module; None if no family declares it."""
    for family in families:
        for inner, category in family.categories.items():
            tail = rf"\.(?:{inner})" if inner else ""
            match = re.fullmatch(rf"(?P<block>(?:.+\.)?{family.block}){tail}", path)
            if match:
                block = match["block"]
                within = path[len(block) + 1 :]
                fused = (d for name, d in family.fused.items() if re.fullmatch(name, within))
                return block, category, next(fused, (1, 0))
    return None


def _check(
    modules: Mapping[str, list[str]],
    declared: Mapping[str, _Found],
    blocks: Sequence[str],
    families: Sequence[Family],
) -> None:
    known = ", ".join(family.name for family in families)
    if not any(category for _, category, _ in declared.values()):
        raise UserError(
            "This model has no blocks that could be found by the names of its modules. "
            f"Declared are: {known}. Choose such a backbone, or add a Family to "
            "clbench.nn.partition.FAMILIES."
        )
    for path in modules:
        if path not in declared and any(path.startswith(f"{block}.") for block in blocks):
            raise UserError(
                f"{path} lies in a block but has a name that no family of models declares, so it "
                f"is in no category. Declared are: {known}. Choose such a backbone, or add the "
                "name to clbench.nn.partition.FAMILIES."
            )
