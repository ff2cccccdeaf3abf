"""A vision transformer of timm, written out one image and one head at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clbench.nn.backbones import ModelFeatures
from clbench.nn.heads import Classifier


def transformer(depth: int, width: int = 16) -> Classifier:
    """A classifier for the toy scenario with a small transformer, its weights not small."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(depth)
        shape = {"img_size": 6, "patch_size": 3, "in_chans": 1, "num_classes": 0, "mlp_ratio": 2}
        vit = VisionTransformer(**shape, embed_dim=width, depth=depth, num_heads=2)
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return Classifier(ModelFeatures(vit, width), torch.nn.Linear(width, 6))


def features(
    vit: Any,
    images: Tensor,
    prefixes: Mapping[int, Tensor] | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """What a model with a class token makes of images, [B, D].

    Args:
        vit: The model.
        images: [B, C, H, W].
        prefixes: For some blocks, [B, L, D]: the first half are more keys, the rest more values.
        tokens: [B, L, D], before the class token; then features are their mean output.
    """
    rows = []
    for i, image in enumerate(images):
        patches = vit.patch_embed(image.unsqueeze(0))[0]
        x = torch.cat((vit.cls_token[0], patches)) + vit.pos_embed[0]
        if tokens is not None:
            x = torch.cat((tokens[i], x))
        for number, block in enumerate(vit.blocks):
            prefix = None if prefixes is None or number not in prefixes else prefixes[number][i]
            x = x + attention(block.attn, block.norm1(x), prefix)
            x = x + block.mlp(block.norm2(x))
        x = vit.norm(x)
        rows.append(x[0] if tokens is None else x[: tokens.shape[1]].mean(0))
    return torch.stack(rows)


def attention(attn: Any, x: Tensor, prefix: Tensor | None) -> Tensor:
    """Self-attention of one image, [N, D], with [L, D] more keys and values."""
    q, k, v = attn.qkv(x).chunk(3, -1)
    if prefix is not None:
        half = len(prefix) // 2
        k, v = torch.cat((prefix[:half], k)), torch.cat((prefix[half:], v))
    size = q.shape[1] // attn.num_heads
    heads = []
    for start in range(0, q.shape[1], size):
        part = slice(start, start + size)
        weights = (q[:, part] @ k[:, part].T / size**0.5).softmax(-1)
        heads.append(weights @ v[:, part])
    projected: Tensor = attn.proj(torch.cat(heads, -1))
    return projected
