"""The declared matrices of each family of models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from clbench.errors import UserError
from clbench.nn.backbones import MLP, Backbone, CifarResNet, ResNet18, SlimResNet18, Timm
from clbench.nn.heads import classifier
from clbench.nn.partition import Matrix, partition

D, W = 8, 20


def tree(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A model that has parameters of these names, and nothing else."""
    root = nn.Module()
    for path, shape in shapes.items():
        module = root
        *parents, leaf = path.split(".")
        for name in parents:
            if name not in dict(module.named_children()):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    return root


def llama(layers: int = 2) -> nn.Module:
    """The parameter names and the shapes of LlamaForCausalLM."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, D)}
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{x}_proj.weight": (D, D) for x in "qkvo"}
        shapes |= {f"{block}.mlp.{x}_proj.weight": (W, D) for x in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (D, W)}
        shapes |= {f"{block}.{x}_layernorm.weight": (D,) for x in ("input", "post_attention")}
    return tree(shapes | {"model.norm.weight": (D,), "lm_head.weight": (11, D)})


def gpt2(layers: int = 2) -> nn.Module:
    """Those of GPT2LMHeadModel, whose Conv1D keeps [inputs, outputs]."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (11, D),
        "transformer.wpe.weight": (5, D),
    }
    for i in range(layers):
        block = f"transformer.h.{i}"
        for name, sizes in {
            "ln_1": (D, D),
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "ln_2": (D, D),
            "mlp.c_fc": (D, 4 * D),
            "mlp.c_proj": (4 * D, D),
        }.items():
            shapes[f"{block}.{name}.weight"] = sizes if "ln" not in name else (D,)
            shapes[f"{block}.{name}.bias"] = sizes[1:]
    shapes |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    model = tree(shapes)
    head = nn.Module()
    head.weight = model.get_parameter("transformer.wte.weight")  # tied
    model.add_module("lm_head", head)
    return model


def built(backbone: Backbone, size: int = 32) -> nn.Module:
    with torch.random.fork_rng():
        return classifier(backbone, (3, size, size), 10)


VIT = Timm(name="vit_tiny_patch16_224", patch_size=8)


def counts(matrices: list[Matrix]) -> dict[str, list[int]]:
    """Matrices of each category, block by block."""
    found: dict[str, Counter[str]] = {}
    for m in matrices:
        found.setdefault(m.category, Counter())[m.block] += 1
    return {category: list(blocks.values()) for category, blocks in found.items()}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (llama(), {"attention": [4, 4], "ffn": [3, 3], "norm": [2, 2]}),
        (gpt2(), {"attention": [4, 4], "ffn": [2, 2], "norm": [2, 2]}),
        (built(VIT), {"attention": [4] * 12, "ffn": [2] * 12, "norm": [2] * 12}),
        (
            built(Timm(name="vit_small_patch14_reg4_dinov2", patch_size=8)),
            {"attention": [4] * 12, "ffn": [2] * 12, "norm": [2] * 12, "scale": [2] * 12},
        ),
        (
            built(Timm(name="convnext_atto"), 64),
            {"convolution": [1] * 12, "ffn": [2] * 12, "norm": [1] * 12, "scale": [1] * 12},
        ),
        (
            built(ResNet18()),
            {name: [2, 2, 3, 2, 3, 2, 3, 2] for name in ("convolution", "norm")},
        ),
        (built(SlimResNet18()), {n: [2, 2, 3, 2, 3, 2, 3, 2] for n in ("convolution", "norm")}),
        (built(CifarResNet()), {name: [2] * 9 for name in ("convolution", "norm")}),
        (
            built(Timm(name="resnet18")),
            {name: [2, 2, 3, 2, 3, 2, 3, 2] for name in ("convolution", "norm")},
        ),
        (built(MLP(hidden=(9, 9, 9))), {"linear": [1, 1, 1]}),
        (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(D, 2, W, batch_first=True), 2, enable_nested_tensor=False
            ),
            {"attention": [4, 4], "ffn": [2, 2], "norm": [2, 2]},
        ),
    ],
    ids=[
        *("llama", "gpt2", "vit", "dinov2", "convnext", "resnet18", "slim", "cifar", "timm-resnet"),
        *("mlp", "encoder"),
    ],
)
def test_matrices_of_each_block(model: nn.Module, expected: dict[str, list[int]]) -> None:
    assert counts(partition(model)) == expected


@pytest.mark.parametrize(
    ("model", "outside"),
    [
        (llama(), r"model\.embed_tokens|model\.norm|lm_head"),
        (gpt2(), r"transformer\.(wte|wpe|ln_f)"),
        (
            built(VIT),
            r"features\.model\.(cls_token|pos_embed|patch_embed\.proj|norm)|head",
        ),
        (built(ResNet18()), r"features\.(conv1|bn1)|head"),
        (built(MLP(hidden=(9, 9))), "head"),
        (
            built(Timm(name="swin_tiny_patch4_window7_224", patch_size=2), 56),
            r".*(patch_embed|downsample)\..*|.*attn\.relative_position_bias_table"
            r"|features\.model\.norm|head",
        ),
    ],
    ids=["llama", "gpt2", "vit", "resnet", "mlp", "swin"],
)
def test_every_parameter_is_in_one_matrix_or_outside(model: nn.Module, outside: str) -> None:
    """Each element in one matrix, except for embeddings, stem, final norm and head."""
    covered = {name: torch.zeros_like(p, dtype=torch.int) for name, p in model.named_parameters()}
    for m in partition(model):
        for part in m.parts:
            part.of(covered[part.name]).add_(1)
    for name, times in covered.items():
        expected = 0 if re.fullmatch(rf"({outside})(\.weight|\.bias)?", name) else 1
        assert times.eq(expected).all(), name


def test_pieces_are_those_that_the_model_computes_with() -> None:
    """Matrix [1] of timm's and PyTorch's fused tensors is the keys'."""
    attention = nn.MultiheadAttention(D, 2)
    outer = nn.Module()
    outer.layers = nn.ModuleList([nn.Module()])
    outer.layers[0].add_module("self_attn", attention)
    keys = {m.name: m for m in partition(outer)}["layers.0.self_attn[1]"]
    assert [part.name.rpartition(".")[2] for part in keys.parts] == [
        "in_proj_weight",
        "in_proj_bias",
    ]
    weight = keys.parts[0].of(attention.in_proj_weight)
    assert torch.equal(weight, attention.in_proj_weight[D : 2 * D])
    gpt = gpt2()
    fused = gpt.get_parameter("transformer.h.1.attn.c_attn.weight")
    fused.data = torch.arange(3 * D * D).float().view(D, 3 * D)
    values = {m.name: m for m in partition(gpt)}["transformer.h.1.attn.c_attn[2]"]
    assert torch.equal(values.parts[0].of(fused), fused[:, 2 * D :])


def test_what_is_frozen_already_is_left_out() -> None:
    model = llama()
    model.get_submodule("model.layers.0").requires_grad_(False)
    assert {m.block for m in partition(model)} == {"model.layers.1"}


def test_a_model_without_declared_names_is_refused() -> None:
    with pytest.raises(UserError, match="no blocks"):
        partition(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


def test_an_undeclared_module_in_a_block_is_refused() -> None:
    model = llama()
    model.get_submodule("model.layers.1").add_module("adapter", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"model\.layers\.1\.adapter"):
        partition(model)


@pytest.mark.parametrize("model", [llama(), gpt2(), built(VIT)], ids=["llama", "gpt2", "vit"])
def test_names_are_different(model: nn.Module) -> None:
    names = [m.name for m in partition(model)]
    assert len(set(names)) == len(names)
