"""k-FPF against a hand-written loop: when, on what, and what it costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import composed
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.conditions import Conditions
from clbench.config import build
from clbench.errors import UserError
from clbench.finetuning import ModuleFinetuning
from clbench.nn.memory import Memory
from clbench.passes import BACKWARD, FORWARD
from clbench.progress import Silent
from clbench.protocol import run
from clbench.results import RunFolder
from clbench.samples import Batch, Samples, class_balanced, concatenate
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy
from clbench.types import Experience, Strategy
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.kfpf import KFPF
from strategies.replay import Replay

Make = Callable[..., Any]
Same = Callable[[nn.Module, nn.Module], bool]
CPU = Conditions(device="cpu", threads=1)


# When.


@pytest.mark.parametrize("k", [1, 2, 7, 10, 119, 120])
def test_exactly_k_times_and_the_last_time_at_the_end(bench: Make, k: int) -> None:
    """Five epochs of eight batches in each of three experiences are 120."""
    found = bench().learned(KFPF(base=Finetune(), triggers=k, finetune_steps=1))
    after = found.facts()["finetuned_after"]
    assert len(after) == k
    assert after[-1] == 120
    gaps = [b - a for a, b in zip([0, *after], after, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert sum(fact["finetuned"] for fact in found.facts()["sensitivity"]) >= k


@pytest.mark.parametrize("options", [{"epochs": 1, "online": True, "passes": 3}, {"batch_size": 7}])
def test_batches_are_counted_not_steps_or_samples(bench: Make, options: dict[str, Any]) -> None:
    one = bench(**options)
    found = one.learned(KFPF(base=Finetune(), triggers=4, finetune_steps=1))
    batches = len(one.steps)
    assert found.finetuned_after == [j * batches // 4 for j in (1, 2, 3, 4)]


def test_a_stream_shorter_than_k_has_a_fine_tuning_after_every_batch(bench: Make) -> None:
    found = bench(epochs=1, batch_size=79).learned(KFPF(base=Finetune(), finetune_steps=1))
    assert found.finetuned_after == [1, 2, 3, 4, 5, 6]


def test_boundaries_of_experiences_play_no_part(bench: Make) -> None:
    """120 / 7 is no boundary's number; the second experience ends after batch 80."""
    found = bench().learned(KFPF(base=Finetune(), triggers=7, finetune_steps=1))
    assert found.finetuned_after == [17, 34, 51, 68, 85, 102, 120]


def test_the_plan_needs_the_length_of_the_stream(bench: Make) -> None:
    one = bench()
    method = KFPF(base=Finetune())
    blind = one.context()
    blind.stream_batches = 0
    with pytest.raises(UserError, match="nobody says how long"):
        method.setup(one.scenario.model(0, one.stream), blind)


class Doubling(Finetune):
    """Goes through everything twice."""

    def material(self, experience: Experience) -> Samples:
        own = super().material(experience)
        return concatenate([own, own])


def test_a_base_that_takes_more_steps_is_refused_before_it_does(bench: Make) -> None:
    one = bench()
    found = one.prepare(KFPF(base=Doubling()))
    one.teach(found, 0)
    with pytest.raises(UserError, match="Doubling takes more steps than the 120 batches"):
        one.teach(found, 1)
    assert found.arrived == 80


def test_a_base_with_a_memory_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="Replay stores samples itself"):
        KFPF(base=Replay()).check(ToyScenario())


# What.


class Hand:
    """Plain SGD on the stream, a reservoir, and fine-tunings of one layer; a loop by itself."""

    def __init__(self, one: Any, model: nn.Module, after: set[int], steps: int) -> None:
        self.model, self.context = copy.deepcopy(model), one.context()
        self.memory = Memory(one.scenario.memory_size, self.context, name="finetuning")
        self.steps, arrived = steps, 0
        for experience in one.stream.experiences:
            optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, fused=True)
            self.model.train()
            for batch in self.context.batches(experience.train):
                optimizer.zero_grad()
                F.cross_entropy(self.model(batch.inputs), batch.targets).backward()
                optimizer.step()
                self.memory.add(batch)
                arrived += 1
                if arrived in after:
                    self.finetune()
        self.model.eval()

    def finetune(self) -> None:
        targets, inputs = self.memory.targets, self.memory.raw
        recall = self.context.generator("finetuning.recall")
        order = class_balanced(targets, 10, self.steps, recall)
        augment = self.context.generator("finetuning.augment")
        inputs = self.context.transform.train(inputs[order], augment)
        head = list(self.model[-1].parameters())  # type: ignore[index]
        optimizer = torch.optim.SGD(head, 0.05, momentum=0.9, fused=True)
        self.model[2].eval()  # type: ignore[index]
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * step / self.steps))
            part = slice(10 * step, 10 * step + 10)
            gradients = torch.autograd.grad(
                F.cross_entropy(self.model(inputs[part]), targets[order[part]]), head
            )
            for parameter, gradient in zip(head, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        self.model[2].train()  # type: ignore[index]


def test_the_whole_stream_is_a_loop_written_by_hand(
    bench: Make, normalised: nn.Module, same_weights: Same
) -> None:
    """To the bit: momentum, batch norm, augmentation, seven fine-tunings at odd places."""
    one = bench(normalised, crop_padding=1)
    base = Finetune(momentum=0.9)
    method = KFPF(base=base, triggers=7, finetune_steps=5, modules=("4",), lr=0.05)
    found = one.learned(method)
    hand = Hand(one, normalised, {17, 34, 51, 68, 85, 102, 120}, 5)
    assert same_weights(found.model, hand.model)
    assert torch.equal(found.memory.raw, hand.memory.raw)
    assert not same_weights(found.model, one.learned(base).model)


def test_what_is_not_chosen_stays_to_the_bit_through_a_fine_tuning(
    bench: Make, normalised: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at before and after each: weights, statistics, modes, and what requires gradients."""
    whole, seen = ModuleFinetuning.finetune, []

    def look(self: KFPF) -> list[Any]:
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        modes = [m.training for m in self.model.modules()]
        return [state, modes, [p.requires_grad for p in self.model.parameters()]]

    def watched(self: KFPF, steps: int) -> None:
        before = look(self)
        whole(self, steps)
        seen.append((before, look(self)))

    monkeypatch.setattr(ModuleFinetuning, "finetune", watched)
    bench(normalised).learned(
        KFPF(base=Finetune(), triggers=3, finetune_steps=2, modules=("2", "4"))
    )
    assert len(seen) == 3
    for (before, *how), (after, *then) in seen:
        assert how == then
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert moved == {"2.weight", "2.bias", "4.weight", "4.bias"}


class Stepping(Finetune):
    """Keeps what each of its own steps adds to the head."""

    def setup(self, model: nn.Module, context: Any) -> None:
        super().setup(model, context)
        self._added: list[Tensor] = []

    def update(self, loss: Tensor) -> None:
        before = self.model.get_parameter("head.weight").detach().clone()
        super().update(loss)
        self._added.append(self.model.get_parameter("head.weight").detach() - before)


def test_sensitivity_is_of_the_stream_s_steps_alone(bench: Make) -> None:
    """Forty steps in each experience, eight an epoch; twelve fine-tunings leave no trace in it.

    A head without a bias, so that the weights are the whole unit.
    """
    model = nn.Sequential()
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(36, 6, bias=False))
    found = bench(model).learned(KFPF(base=Stepping(), triggers=12, finetune_steps=5))
    assert [fact["finetuned"] for fact in found.facts()["sensitivity"]] == [12]
    epochs = torch.stack(found.base._added).view(3, 5, 8, -1).sum(2)
    (fact,) = found.facts()["sensitivity"]
    within = epochs[:, 1:].abs().mean((1, 2))
    across = epochs.sum(1).abs().mean(1)[1:]
    assert fact["within"] == pytest.approx(within.tolist(), rel=1e-4)
    assert fact["across"] == pytest.approx(across.tolist(), rel=1e-4)


@pytest.mark.parametrize(("k", "steps"), [(10, 6), (7, 8), (60, 1), (120, 1)])
def test_by_default_all_fine_tunings_are_half_as_long_as_the_stream(
    bench: Make, k: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(ModuleFinetuning, "finetune", lambda _, steps: taken.append(steps))
    bench().learned(KFPF(base=Finetune(), triggers=k))
    assert taken == [steps] * k


# Distillation.


def test_logits_at_storing_hold_the_classes_met_by_then(bench: Make) -> None:
    one = bench(memory_size=240, epochs=1)
    found = one.prepare(KFPF(base=Finetune(), distillation=1.0, triggers=1, finetune_steps=1))
    outputs: list[Tensor] = []
    found.model.register_forward_hook(lambda *call: outputs.append(call[-1].detach()))
    one.teach(found)
    logits, met = found.memory.extras["logits"], torch.zeros(6, dtype=torch.bool)
    assert logits.shape == (240, 6)
    for step in range(24):
        part = slice(10 * step, 10 * step + 10)
        met[found.memory.targets[part]] = True
        assert torch.equal(logits[part][:, met], outputs[step][:, met])
        assert (logits[part][:, ~met] == -torch.inf).all()
    assert met.all()


def test_the_second_term_by_hand(bench: Make) -> None:
    """Two samples, six classes; three of the first and one of the second were known."""
    one = bench()
    found = one.learned(KFPF(base=Finetune(), distillation=0.5, triggers=2, finetune_steps=1))
    samples = found.memory.samples()
    batch = samples.take(torch.tensor([4, 9]))
    no = -math.inf
    rows = torch.tensor([[1.0, 2.0, 3.0, no, no, no], [0.5, no, no, no, no, no]])
    found.memory.replace_extra("logits", batch.index, rows)
    outputs = found.model(batch.inputs)
    gaps = [outputs[0, j] - rows[0, j] for j in range(3)] + [outputs[1, 0] - 0.5]
    expected = F.cross_entropy(outputs, batch.targets) + 0.5 * sum(gap**2 for gap in gaps) / 4
    loss = found.finetune_loss(batch)
    torch.testing.assert_close(loss, expected)
    weights = list(found.model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()


def test_distillation_changes_the_fine_tunings_and_nothing_else(
    bench: Make, same_weights: Same
) -> None:
    one = bench()
    options: dict[str, Any] = {"base": Finetune(), "triggers": 3, "finetune_steps": 4}
    plain, found = one.learned(KFPF(**options)), one.learned(KFPF(**options, distillation=0.5))
    assert torch.equal(plain.memory.raw, found.memory.raw)
    assert not same_weights(plain.model, found.model)


def test_it_goes_round_a_method_with_a_penalty(bench: Make, same_weights: Same) -> None:
    one = bench()
    found = one.learned(KFPF(base=EWC(ewc_lambda=1.0), triggers=3, finetune_steps=4))
    assert found.base.anchor.active
    assert not same_weights(found.model, one.learned(EWC(ewc_lambda=1.0)).model)


# In a run.


class StopAt(Silent):
    """Interrupts when an experience begins."""

    def __init__(self, experience: int) -> None:
        self.name = f"experience {experience}/"

    def start(self, name: str, samples: int) -> None:  # noqa: ARG002
        if name.startswith(self.name):
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("name", ["kfpf", "kfpf_kd"])
def test_a_resumed_run_ends_in_the_same_bits_and_facts(
    tmp_path: Path, name: str, stop: int
) -> None:
    method = build(composed(f"strategy={name}")["strategy"], Strategy, "strategy")
    toy = ToyScenario(crop_padding=1)
    whole, folder = run(toy, copy.deepcopy(method), CPU), RunFolder(tmp_path, "run")
    with folder.claim(), pytest.raises(KeyboardInterrupt):
        run(toy, copy.deepcopy(method), CPU, folder=folder, progress=StopAt(stop))
    with folder.claim():
        rest = run(toy, copy.deepcopy(method), CPU, folder=folder)
    assert "resumed" in (folder.path / "log.txt").read_text()
    assert rest.accuracy_matrix == whole.accuracy_matrix
    assert rest.strategy_facts == whole.strategy_facts
    for count in (FORWARD, BACKWARD):
        assert rest.costs[count] == whole.costs[count]


def test_it_costs_less_than_replay_with_as_much_memory() -> None:
    """1.5 passes for each sample of the stream; replay has 2, but for its first batch."""
    toy = ToyScenario(memory_size=30)
    methods: list[GradientStrategy | KFPF] = [Finetune(), Replay(), KFPF(base=Finetune())]
    costs = [run(toy, method, CPU).costs for method in methods]
    for count in (FORWARD, BACKWARD):
        assert [cost[count] for cost in costs] == [1200, 2390, 1800]
    assert costs[1]["memory_samples"] == costs[2]["memory_samples"] == 30


def test_the_memory_is_a_reservoir_of_the_stream(bench: Make) -> None:
    one = bench()
    found = one.learned(KFPF(base=Finetune(), triggers=1, finetune_steps=1))
    assert found.memory.selection == "reservoir"
    assert found.memory.seen == 1200
    assert len(found.memory) == found.memory_samples == 30


def test_batches_of_a_fine_tuning_are_those_of_the_budget(bench: Make) -> None:
    found = bench(memory_batch_size=64).learned(KFPF(base=Finetune(), triggers=1, finetune_steps=1))
    batches: list[Batch] = list(found.recalled(2))
    assert [len(b) for b in batches] == [30, 30]
