"""Low-rank updates: where they are, what they compute, and that merging them changes no output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.machine import isolated_rng
from clbench.testing import ToyInstructions
from clbench.text.decoders import Llama
from clbench.text.language_model import LanguageModel
from clbench.text.lora import place
from clbench.types import Split

pytest.importorskip("peft", reason="the extra `text` is not installed")


def start() -> tuple[LanguageModel, Tensor]:
    """A model and rows that it can read."""
    toy = ToyInstructions(language_model=Llama(width=16, depth=2, heads=2, inner=24, spread=0.2))
    stream = toy.stream(Split.EVALUATE, 0)
    with isolated_rng(0, "test"):
        model = toy.fresh(stream)
    return model.eval(), stream.tests[0].take(torch.arange(4)).inputs


def test_all_linear_layers_but_the_head_are_updated_and_nothing_else_trains() -> None:
    model, _ = start()
    linear = [n for n, m in model.decoder.named_modules() if isinstance(m, nn.Linear)]
    with isolated_rng(0, "test"):
        updates = place(model, 3, 6.0, 0.0, ())
    assert [u.name for u in updates] == [n for n in linear if n != "lm_head"]
    for u in updates:
        outputs, inputs = u.layer.base_layer.weight.shape
        assert (u.a.shape, u.b.shape) == ((3, inputs), (outputs, 3))
        assert not u.b.any()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for u in updates for p in (u.a, u.b)}


def test_layers_are_chosen_by_name() -> None:
    with isolated_rng(0, "test"):
        found = [u.name.rpartition(".")[2] for u in place(start()[0], 2, 2.0, 0.0, ("q_proj",))]
    assert found == ["q_proj"] * 2
    with pytest.raises(UserError, match=r"lora_targets=\['nothing'\] does not fit"):
        place(start()[0], 2, 2.0, 0.0, ("nothing",))


def test_a_layer_computes_wx_plus_scaled_bax() -> None:
    generator = torch.Generator().manual_seed(0)
    with isolated_rng(0, "test"):
        update = place(start()[0], 2, 6.0, 0.0, ())[0]
    nn.init.normal_(update.b, generator=generator)
    x = torch.randn(5, 16, generator=generator)
    expected = x @ update.layer.base_layer.weight.T + 3 * (x @ update.a.T) @ update.b.T
    assert torch.allclose(update.layer(x), expected, atol=1e-5)
    assert torch.equal(update.product(), update.b @ update.a)


def test_merging_changes_no_output_and_a_new_update_changes_nothing_yet() -> None:
    model, rows = start()
    generator = torch.Generator().manual_seed(0)
    with isolated_rng(0, "test"):
        updates = place(model, 2, 6.0, 0.0, ())
    untouched = model(rows)
    for u in updates:
        nn.init.normal_(u.b, generator=generator)
    before = model(rows)
    assert not torch.allclose(before, untouched, atol=1e-2)
    for u in updates:
        expected = u.layer.base_layer.weight + 3 * u.b @ u.a
        old = u.a.detach().clone()
        u.merge()
        u.renew(generator)
        assert torch.allclose(u.layer.base_layer.weight, expected, atol=1e-6)
        assert not u.b.any()
        assert not torch.equal(u.a, old)
        assert u.a.abs().max() <= u.a.shape[1] ** -0.5
    assert torch.allclose(model(rows), before, atol=1e-4)
