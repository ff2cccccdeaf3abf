"""SeqLoRA: what trains, and what it equals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from clbench.errors import UserError
from clbench.testing import ToyInstructions, ToyScenario
from strategies.finetune import Finetune
from strategies.seq_lora import SeqLoRA


def test_the_weights_stay_to_the_bit_and_the_update_goes_on(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions(epochs=1)
    strategy = toy.prepare(SeqLoRA())
    kept = [(p, p.detach().clone()) for p in strategy.model.parameters() if not p.requires_grad]
    first = [u.a.detach().clone() for u in strategy._updates]
    toy.teach(strategy)
    assert all(torch.equal(p, before) for p, before in kept)
    pairs = zip(strategy._updates, first, strict=True)
    assert all(0 < (u.a - a).norm() < a.norm() for u, a in pairs), "A was drawn anew"


def test_it_is_fine_tuning_of_a_model_with_low_rank_updates(
    instructions: Callable[..., Any],
) -> None:
    whole = instructions(epochs=2)
    model = replace(whole.scenario.language_model, tuning="lora", lora_rank=4)
    part = instructions(epochs=2, language_model=model)
    one = whole.prepare(SeqLoRA(lora_rank=4))
    other = part.prepare(Finetune(lr=one.lr, optimizer=one.optimizer))
    named = dict(one.model.named_parameters())
    for name, p in other.model.named_parameters():
        p.data.copy_(named[name.replace("decoder.base_model.model.", "decoder.")])
    whole.teach(one)
    part.teach(other)
    for name, p in other.model.named_parameters():
        assert torch.equal(p, named[name.replace("decoder.base_model.model.", "decoder.")])


def test_a_seed_decides_the_update_and_nothing_global_is_drawn_from(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions()
    state = torch.get_rng_state()
    one, other = (toy.prepare(SeqLoRA()) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    for u, v in zip(one._updates, other._updates, strict=True):
        assert torch.equal(u.a, v.a)


def test_a_model_of_which_only_a_part_trains_is_refused() -> None:
    toy = ToyInstructions()
    part = replace(toy, language_model=replace(toy.language_model, tuning="lora"))
    with pytest.raises(UserError, match=r"Set language_model.tuning=full"):
        SeqLoRA().check(part)
    with pytest.raises(UserError, match="does not work in the class_incremental setting"):
        SeqLoRA().check(ToyScenario())
