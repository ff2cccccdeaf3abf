"""Adapters, scales and shifts, and prompts: how they start, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.nn.adapters import SSF, VPT, Adapter, Adapters, AdapterSets, ScaleShift
from clbench.nn.vit import vision_transformer
from clbench.testing import ToyScenario, ToyViT
from clbench.types import Split


@pytest.fixture
def vit() -> Any:
    scenario = ToyScenario(backbone=ToyViT())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = scenario.model(0, scenario.stream(Split.EVALUATE, 0))
    return vision_transformer(model.eval())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 1, 6, 6, generator=seeded())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_adapter_worked_out_by_hand() -> None:
    adapter = Adapter(2, 2, 0.1, 0.0, seeded())
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
        adapter.down.bias.copy_(torch.tensor([0.5, 0.0]))
        adapter.up.weight.copy_(torch.tensor([[1.0, 3.0], [2.0, 5.0]]))
        adapter.up.bias.copy_(torch.tensor([0.5, -1.0]))
    # Hidden units: 1 + 4 + 0.5 = 5.5, and -1, which ReLU makes 0.
    expected = torch.tensor([[0.1 * (5.5 + 0.5), 0.1 * (11 - 1)]])
    torch.testing.assert_close(adapter(torch.tensor([[1.0, 2.0]])), expected)


def test_an_adapter_starts_as_adaptformer_s_does() -> None:
    adapter = Adapter(64, 32, 0.1, 0.1, seeded())
    bound = 64**-0.5
    assert adapter.down.weight.abs().max() <= bound
    assert adapter.down.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for tensor in (adapter.down.bias, adapter.up.weight, adapter.up.bias):
        assert not tensor.any()


def test_dropout_works_on_hidden_units_in_training_only() -> None:
    adapter = Adapter(8, 8, 1.0, 1.0, seeded())
    nn.init.ones_(adapter.up.weight)
    nn.init.ones_(adapter.up.bias)
    x = torch.ones(1, 8)
    assert torch.equal(adapter.train()(x), torch.ones(1, 8)), "all hidden units dropped"
    assert not torch.equal(adapter.eval()(x), torch.ones(1, 8))


def test_adapters_leave_the_output_as_it_is_until_they_are_trained(
    vit: Any, images: Tensor
) -> None:
    before = vit(images)
    adapters: Any = Adapters(vit, 4, 0.1, 0.1, seeded())
    with adapters.put_into(vit):
        assert torch.equal(vit(images), before)
        nn.init.ones_(adapters[0].up.bias)
        assert not torch.equal(vit(images), before)
    assert sum(p.numel() for p in adapters.parameters()) == 2 * (2 * 16 * 4 + 4 + 16)


def test_scale_and_shift_follow_every_linear_layer_and_norm(vit: Any) -> None:
    ssf: Any = SSF(vit, seeded())
    layers = {
        name
        for name, module in vit.named_modules()
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and "patch_embed" not in name
    }
    assert set(ssf.paths) == layers | {"patch_embed"}


def test_scale_and_shift_of_one_and_zero_change_nothing(vit: Any, images: Tensor) -> None:
    before = vit(images)
    ssf: Any = SSF(vit, seeded())
    with ssf.put_into(vit):
        assert not torch.equal(vit(images), before), "they start at random"
        for part in ssf:
            nn.init.ones_(part.scale)
            nn.init.zeros_(part.shift)
        assert torch.equal(vit(images), before)


def test_scale_and_shift_worked_out_by_hand() -> None:
    part = ScaleShift(2, seeded())
    with torch.no_grad():
        part.scale.copy_(torch.tensor([2.0, -1.0]))
        part.shift.copy_(torch.tensor([0.5, 3.0]))
    assert part(torch.tensor([[1.0, 4.0]])).tolist() == [[2.5, -1.0]]


def test_scale_and_shift_fold_into_the_layers_before_them(vit: Any, images: Tensor) -> None:
    """The paper's re-parametrisation: W x + b becomes (γ ⊙ W) x + γ ⊙ b + β."""
    ssf: Any = SSF(vit, seeded())
    with ssf.put_into(vit):
        expected = vit(images)
    for path, part in zip(ssf.paths, ssf, strict=True):
        layer = vit.get_submodule(path)
        layer = layer.proj if path == "patch_embed" else layer
        with torch.no_grad():
            layer.weight.mul_(part.scale.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.mul_(part.scale).add_(part.shift)
    torch.testing.assert_close(vit(images), expected)


def test_a_model_that_pools_before_its_norm_has_scale_and_shift_after_that() -> None:
    import timm

    pooled = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=0, global_pool="avg", depth=1
    )
    assert SSF(pooled, seeded()).paths[-1] == "fc_norm"


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_are_tokens_of_all_blocks_or_new_ones_for_each(
    vit: Any, images: Tensor, deep: bool
) -> None:
    prompts: Any = VPT(vit, 3, deep)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    kept, tokens = x.shape[1], torch.zeros(5, 3, 16)
    for block in vit.blocks:
        x = block(torch.cat((x, torch.zeros(5, 3, 16) if deep else tokens), 1))
        x, tokens = x[:, :kept], x[:, kept:]
    expected = vit.norm(x)[:, 0]
    with prompts.put_into(vit):
        torch.testing.assert_close(vit(images), expected)
        before = vit(images)
        nn.init.normal_(prompts[-1], generator=seeded())
        assert not torch.allclose(vit(images), before)
    assert len(prompts) == (2 if deep else 1)


def test_parts_are_drawn_from_their_generator_alone(vit: Any) -> None:
    before = torch.get_rng_state()
    for make in (
        lambda g: Adapters(vit, 4, 0.1, 0.1, g),
        lambda g: SSF(vit, g),
    ):
        one, again, other = (list(make(seeded(s)).parameters()) for s in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_sets_keep_frozen_copies_and_load_into_an_empty_one(vit: Any) -> None:
    adapters: Any = Adapters(vit, 4, 0.1, 0.1, seeded())
    sets: Any = AdapterSets(adapters)
    assert not sets.state_dict()
    for value in (1.0, 2.0):
        nn.init.constant_(adapters[1].up.bias, value)
        sets.add(adapters.train())
    assert [float(s[1].up.bias.mean()) for s in sets] == [1, 2]
    assert not any(p.requires_grad for p in sets.parameters())
    assert not any(m.training for s in sets for m in s.modules())
    other = AdapterSets(Adapters(vit, 4, 0.1, 0.1, seeded(1)))
    other.load_state_dict(sets.state_dict())
    pairs = list(zip(sets.parameters(), other.parameters(), strict=True))
    assert len(pairs) == 2 * 2 * 4
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(p.requires_grad for p in other.parameters())
    other.load_state_dict({})
    assert len(other) == 0
