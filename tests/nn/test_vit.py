"""Insertions into a vision transformer against forward passes written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.backbones import MLP, ModelFeatures
from clbench.nn.heads import Classifier, classifier
from clbench.nn.vit import Tokens, add_after, add_beside_mlp, add_prefix, vision_transformer

WIDTH = 16


def made(**options: Any) -> Any:
    """A small transformer of timm with weights that are not small."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"img_size": 6, "patch_size": 3, "in_chans": 1, "num_classes": 0, "mlp_ratio": 2}
        size = {"embed_dim": WIDTH, "depth": 3, "num_heads": 2}
        vit = VisionTransformer(**{**shape, **size, **options}).eval()
        for parameter in vit.parameters():
            nn.init.normal_(parameter, std=0.3)
    return vit


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vit() -> Any:
    return made()


@pytest.fixture
def images() -> Tensor:
    return drawn(5, 1, 6, 6)


def start(vit: Any, images: Tensor) -> Tensor:
    """Class token and patches before the first block."""
    x = torch.cat((vit.cls_token.expand(len(images), -1, -1), vit.patch_embed(images)), 1)
    placed: Tensor = x + vit.pos_embed
    return placed


def finish(vit: Any, x: Tensor) -> Tensor:
    features: Tensor = vit.norm(x)[:, 0]
    return features


def attend(
    attn: Any, x: Tensor, keys: Tensor | None = None, values: Tensor | None = None
) -> Tensor:
    """Attention in two heads, one token after another; [L, D] more keys and values."""
    rows = []
    for sample in x:
        q, k, v = attn.qkv(sample).chunk(3, -1)
        if keys is not None and values is not None:
            k, v = torch.cat((keys, k)), torch.cat((values, v))
        heads = []
        for part in (slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)):
            weights = (q[:, part] @ k[:, part].T / (WIDTH // 2) ** 0.5).softmax(-1)
            heads.append(weights @ v[:, part])
        rows.append(attn.proj(torch.cat(heads, -1)))
    return torch.stack(rows)


def test_the_reference_is_the_model_itself(vit: Any, images: Tensor) -> None:
    x = start(vit, images)
    for block in vit.blocks:
        x = x + attend(block.attn, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(finish(vit, x), vit(images))


def test_a_branch_reads_what_the_norm_before_the_mlp_reads(vit: Any, images: Tensor) -> None:
    branches = [nn.Linear(WIDTH, WIDTH) for _ in vit.blocks]
    x = start(vit, images)
    for block, branch in zip(vit.blocks, branches, strict=True):
        x = x + attend(block.attn, block.norm1(x))
        x = x + block.mlp(block.norm2(x)) + branch(x)
    with add_beside_mlp(vit, branches):
        torch.testing.assert_close(vit(images), finish(vit, x))


def test_a_branch_is_needed_for_every_block(vit: Any) -> None:
    with pytest.raises(ValueError, match="shorter"):
        add_beside_mlp(vit, [nn.Identity()])
    assert not vit.blocks[0]._forward_hooks


def test_tokens_of_all_blocks(vit: Any, images: Tensor) -> None:
    tokens = drawn(4, WIDTH)
    x = torch.cat((start(vit, images), tokens.expand(5, -1, -1)), 1)
    for block in vit.blocks:
        x = block(x)
    with Tokens(vit, tokens) as inserted:
        torch.testing.assert_close(vit(images), finish(vit, x))
    torch.testing.assert_close(inserted.outputs, x[:, -4:])


def test_tokens_of_some_blocks_each_sample_its_own(vit: Any, images: Tensor) -> None:
    tokens = drawn(5, 2, WIDTH)
    x = vit.blocks[0](start(vit, images))
    x = vit.blocks[1](torch.cat((x, tokens), 1))[:, :-2]
    x = vit.blocks[2](x)
    with Tokens(vit, tokens, 1, 1):
        torch.testing.assert_close(vit(images), finish(vit, x))


@pytest.mark.parametrize("own", [False, True])
def test_a_prefix_is_attended_to_and_does_not_attend(vit: Any, images: Tensor, own: bool) -> None:
    keys, values = drawn(2, 5, 3, WIDTH) if own else drawn(2, 3, WIDTH)
    block, x = vit.blocks[1], drawn(5, 5, WIDTH)
    expected = torch.cat(
        [
            attend(block.attn, x[i : i + 1], keys[i] if own else keys, values[i] if own else values)
            for i in range(5)
        ]
    )
    with add_prefix(block, keys, values):
        torch.testing.assert_close(block.attn(x), expected)
        assert not torch.allclose(vit(images), made()(images))


def test_a_module_after_another(vit: Any, images: Tensor) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    other = copy.deepcopy(vit)
    for parameter in other.blocks[2].mlp.fc1.parameters():
        parameter.data *= 2
    with add_after(vit, {"blocks.2.mlp.fc1": Twice()}):
        torch.testing.assert_close(vit(images), other(images))


def everything(vit: Any) -> Any:
    """One insertion of each kind."""
    return [
        add_beside_mlp(vit, [nn.Linear(WIDTH, WIDTH) for _ in vit.blocks]),
        add_after(vit, {"norm": nn.Linear(WIDTH, WIDTH)}),
        Tokens(vit, drawn(2, WIDTH)),
        add_prefix(vit.blocks[0], drawn(3, WIDTH), drawn(3, WIDTH)),
    ]


def test_what_is_removed_leaves_no_trace(vit: Any, images: Tensor) -> None:
    before = vit(images)
    insertions = everything(vit)
    assert not torch.allclose(vit(images), before)
    for insertion in insertions:
        insertion.remove()
        insertion.remove()
    assert torch.equal(vit(images), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vit.modules())
    assert vit.state_dict().keys() == made().state_dict().keys()


def test_an_error_inside_takes_the_insertion_out(vit: Any) -> None:
    with pytest.raises(RuntimeError), Tokens(vit, drawn(2, WIDTH)):
        vit(drawn(5, 3, 6, 6))
    assert not vit.blocks[0]._forward_pre_hooks


def test_a_copy_has_copies_of_what_is_inside(vit: Any, images: Tensor) -> None:
    branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in vit.blocks)
    tokens = nn.Parameter(drawn(2, WIDTH))
    vit.add_module("branches", branches)
    vit.register_parameter("tokens", tokens)
    add_beside_mlp(vit, branches)
    Tokens(vit, tokens)
    other = copy.deepcopy(vit)
    before = vit(images)
    with torch.no_grad():
        other.branches[0].weight += 1
        other.tokens += 1
    assert torch.equal(vit(images), before)
    changed = other(images)
    assert not torch.allclose(changed, before)
    vit.load_state_dict(other.state_dict())
    torch.testing.assert_close(vit(images), changed)


def test_only_what_was_put_in_gets_gradients(vit: Any, images: Tensor) -> None:
    vit.requires_grad_(False)
    branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in vit.blocks)
    keys = nn.Parameter(drawn(3, WIDTH))
    with add_beside_mlp(vit, branches), add_prefix(vit.blocks[0], keys, keys.detach()):
        vit(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in [keys, *branches.parameters()])
    assert all(p.grad is None for p in vit.parameters())


def test_insertions_work_in_inference_mode_and_under_autocast(vit: Any, images: Tensor) -> None:
    everything(vit)
    expected = vit(images)
    with torch.inference_mode():
        torch.testing.assert_close(vit(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cosine_similarity(vit(images).float(), expected).min() > 0.99


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # timm's attention, not ours
def test_insertions_work_under_vmap(vit: Any, images: Tensor) -> None:
    branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in vit.blocks)
    vit.add_module("branches", branches)
    add_beside_mlp(vit, branches)
    Tokens(vit, drawn(2, WIDTH))
    parameters = dict(vit.named_parameters())

    def output(image: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(vit, parameters, image.unsqueeze(0))
        return result.squeeze(0)

    torch.testing.assert_close(torch.func.vmap(output)(images), vit(images))


def test_the_transformer_in_a_classifier_is_found(vit: Any) -> None:
    model = Classifier(ModelFeatures(vit, WIDTH), nn.Linear(WIDTH, 2))
    assert vision_transformer(model) is vit


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: classifier(MLP(), (1, 6, 6), 2), "has none"),
        (lambda: nn.ModuleList([made(), made()]), "has 2"),
        (lambda: made(block_fn=ResPostBlock), "ResPostBlock"),
        (lambda: timm.create_model("resnet10t", num_classes=0), "has none"),
    ],
)
def test_other_models_are_refused_with_what_would_work(
    model: Callable[[], nn.Module], what: str
) -> None:
    with pytest.raises(UserError, match=what) as refusal:
        vision_transformer(model())
    assert "backbone=vit_glyphs" in str(refusal.value)


def test_another_kind_of_attention_is_refused(vit: Any) -> None:
    vit.blocks[0].attn = nn.Identity()
    with pytest.raises(UserError, match="Identity"):
        add_prefix(vit.blocks[0], drawn(3, WIDTH), drawn(3, WIDTH))
