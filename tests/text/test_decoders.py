"""What of a decoder trains, and what its memory options change: nothing but the memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench import protocol
from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.machine import isolated_rng
from clbench.nn.fisher import diagonal_fisher
from clbench.testing import ToyInstructions
from clbench.text.decoders import Llama
from clbench.text.language_model import LanguageModel
from clbench.types import Split
from strategies.derpp import DERpp
from strategies.finetune import Finetune

peft = pytest.importorskip("peft", reason="the extra `text` is not installed")

TOY = ToyInstructions()
SAVING: list[dict[str, Any]] = [
    {"gradient_checkpointing": True},
    {"micro_batch_size": 3},
    {"gradient_checkpointing": True, "micro_batch_size": 1},
]


def with_model(**options: Any) -> ToyInstructions:
    return replace(TOY, language_model=replace(TOY.language_model, **options))


def start(**options: Any) -> tuple[LanguageModel, Any]:
    toy = with_model(**options)
    stream = toy.stream(Split.EVALUATE, 0)
    with isolated_rng(0, "test"):
        model = toy.model(0, stream)
    assert isinstance(model, LanguageModel)
    return model, stream.experiences[0].train


def gradients(model: LanguageModel, samples: Any) -> tuple[float, list[Tensor]]:
    batch = samples.take(torch.arange(8))
    model.train()
    loss = TOY.objective().loss(model(batch.inputs), batch.targets)
    loss.backward()
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return loss.item(), found  # type: ignore[return-value]


@pytest.mark.parametrize("options", SAVING, ids=str)
def test_saving_memory_changes_no_gradient(options: dict[str, Any]) -> None:
    expected, wanted = gradients(*start())
    loss, found = gradients(*start(**options))
    assert loss == pytest.approx(expected, rel=1e-5)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("options", SAVING, ids=str)
def test_saving_memory_changes_no_fisher_information(options: dict[str, Any]) -> None:
    (plain, samples), (saving, _) = start(), start(**options)
    expected = diagonal_fisher(plain.eval(), samples, "empirical")
    for name, value in diagonal_fisher(saving.eval(), samples, "empirical").items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-8), name


def test_no_more_rows_than_a_micro_batch_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples = start(micro_batch_size=3)
    seen: list[int] = []
    decode = LanguageModel._decode

    def counted(self: Any, ids: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(len(ids))
        return decode(self, ids, *args, **options)

    monkeypatch.setattr(LanguageModel, "_decode", counted)
    gradients(model, samples)
    assert seen == [3, 3, 2, 2, 3, 3], "forward, and again on the way back"
    seen.clear()
    model.eval()(samples.take(torch.arange(8)).inputs)
    assert seen == [8]


@pytest.mark.parametrize("options", SAVING, ids=str)
def test_a_method_that_replays_runs_with_it(options: dict[str, Any]) -> None:
    conditions = Conditions(device="cpu", threads=1)
    one, other = (
        protocol.run(replace(toy, epochs=2), DERpp(), conditions)
        for toy in (with_model(**options), TOY)
    )
    assert one.accuracy_matrix == other.accuracy_matrix


def test_any_configuration_of_peft_from_its_folder(tmp_path: Path) -> None:
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )
    config.save_pretrained(tmp_path)
    toy = with_model(tuning="peft", peft_config=str(tmp_path))
    model, _ = start(tuning="peft", peft_config=str(tmp_path))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3
    assert all("ia3" in name for name in trained)
    result = protocol.run(toy, Finetune(), Conditions(device="cpu", threads=1))
    assert result.status == "complete"
    assert result.costs["trainable_parameters"] == sum(
        p.numel() for n, p in model.named_parameters() if n in trained
    )


def test_a_peft_configuration_that_is_not_there_or_does_not_fit_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="belong together"):
        Llama(tuning="peft")
    with pytest.raises(UserError, match="belong together"):
        Llama(peft_config="somewhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"peft_config=.*empty can't be read"):
        start(tuning="peft", peft_config=str(empty))
    peft.LoraConfig(target_modules=["nothing"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tuning=peft does not fit"):
        start(tuning="peft", peft_config=str(tmp_path))
