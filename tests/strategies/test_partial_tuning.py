"""Partial tuning: what is frozen stays to the bit and is nobody's business."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clbench.errors import UserError
from clbench.testing import ToyScenario, ToyViT
from clbench.training import GradientStrategy
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.l2_anchor import L2Anchor
from strategies.partial_tuning import PartialTuning

Make = Callable[..., Any]
TRAINS = pytest.mark.parametrize("trains", ["qkv", "attention"])
PARTS = {"qkv": ["qkv"], "attention": ["qkv", "proj"]}


def trained(trains: str) -> set[str]:
    """Names of the parameters of a toy transformer that should train."""
    parts = [f"features.model.blocks.{i}.attn.{p}" for i in range(2) for p in PARTS[trains]]
    return {f"{module}.{kind}" for module in [*parts, "head"] for kind in ("weight", "bias")}


@TRAINS
@pytest.mark.parametrize("base", [Finetune(), EWC(), L2Anchor()], ids=lambda b: type(b).__name__)
def test_only_attention_and_the_head_move(bench: Make, base: GradientStrategy, trains: Any) -> None:
    """With weight decay and momentum, which move weights without a gradient."""
    one = bench(backbone=ToyViT())
    base.momentum, base.weight_decay = 0.9, 0.1
    strategy = one.prepare(PartialTuning(base=base, trains=trains))
    start = {name: p.detach().clone() for name, p in strategy.model.named_parameters()}
    one.teach(strategy)
    moved = {n for n, p in strategy.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == trained(trains)
    assert {n for n, p in strategy.model.named_parameters() if p.grad is not None} == moved


@TRAINS
def test_the_optimizer_and_the_anchor_know_nothing_else(bench: Make, trains: Any) -> None:
    one = bench(backbone=ToyViT())
    strategy = one.learned(PartialTuning(base=EWC(momentum=0.9), trains=trains), 0)
    named = dict(strategy.model.named_parameters())
    wanted = trained(trains)
    assert set(strategy.base.anchor.names) == wanted
    optimizer = strategy.base._optimizer
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == {id(named[name]) for name in wanted} == {id(p) for p in optimizer.state}


def test_it_is_the_base_on_a_model_with_the_rest_frozen(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    one = bench(backbone=ToyViT())
    wrapped = one.learned(PartialTuning(base=EWC(ewc_lambda=5)))
    plain = one.prepare(Finetune()).model
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained("qkv"))
    alone = bench(plain, backbone=ToyViT()).learned(EWC(ewc_lambda=5))
    assert same_weights(wrapped.model, alone.model)


def test_a_model_without_attention_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"MLP.*backbone=vit_glyphs"):
        PartialTuning(base=Finetune()).check(ToyScenario())
