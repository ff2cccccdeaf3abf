"""FPF against a hand-written loop, and against the base that it must not disturb."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections import Counter
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
from clbench.errors import Diverged, UserError
from clbench.finetuning import matching, most_sensitive, only
from clbench.nn.sensitivity import Unit, units
from clbench.passes import BACKWARD, FORWARD
from clbench.progress import Silent
from clbench.protocol import run
from clbench.results import RunFolder
from clbench.samples import Samples, class_balanced
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy
from strategies.derpp import DERpp
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.fpf import FPF
from strategies.icarl import ICaRL
from strategies.lwf import LwF
from strategies.replay import Replay

Make = Callable[..., Any]
Same = Callable[[nn.Module, nn.Module], bool]
CPU = Conditions(device="cpu", threads=1)


@pytest.fixture
def deep() -> nn.Module:
    """Two batch norms, so that one can be fine-tuned and the other not."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = [nn.Flatten(), nn.Linear(36, 12), nn.BatchNorm1d(12), nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))


def by_hand(one: Any, learned: Any, samples: Samples, steps: int, lr: float, **sgd: Any) -> Any:
    """A loop that fine-tunes a copy of a whole model on class-balanced batches."""
    model, context = copy.deepcopy(learned.model), one.context()
    size = min(one.scenario.memory_batch_size or one.scenario.batch_size, len(samples))
    recall, augment = (context.generator(f"finetuning.{name}") for name in ("recall", "augment"))
    order = class_balanced(samples.targets, size, steps, recall)
    optimizer = torch.optim.SGD(model.parameters(), lr, **sgd)
    model.train()
    raw = samples.source.gather(samples.index[order])
    inputs, targets = context.transform.train(raw, augment), samples.targets[order]
    for step in range(steps):
        part = slice(step * size, (step + 1) * size)
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[part]), targets[part]).backward()
        optimizer.step()
    return model.eval()


# Fine-tuning.


@pytest.mark.parametrize("base", [Replay(lr=0.05, momentum=0.9, weight_decay=0.01), Replay()])
def test_over_all_modules_it_is_fine_tuning_on_the_memory(
    bench: Make, deep: nn.Module, same_weights: Same, base: Replay
) -> None:
    """Every bit of weights and statistics, with augmentation, after the first experience."""
    one = bench(deep, crop_padding=1, flip=True, memory_batch_size=7)
    plain = one.learned(base, 0)
    options = {"momentum": base.momentum, "weight_decay": base.weight_decay, "fused": True}
    expected = by_hand(one, plain, plain.memory.samples(), 20, base.lr, **options)
    found = one.learned(FPF(base=base, modules="all", finetune_steps=20), 0)
    assert same_weights(found.model, expected)
    assert not same_weights(found.model, plain.model)


def test_a_method_without_memory_gets_one(bench: Make, deep: nn.Module, same_weights: Same) -> None:
    one = bench(deep)
    plain = one.learned(Finetune(), 0)
    found = one.learned(FPF(base=Finetune(), modules="all", finetune_steps=9, lr=0.03), 0)
    assert len(found.memory) == found.memory_samples == one.scenario.memory_size
    expected = by_hand(one, plain, found.memory.samples(), 9, 0.03, fused=True)
    assert same_weights(found.model, expected)


@pytest.mark.parametrize("base", [Replay(), DERpp()])
def test_a_method_with_a_memory_keeps_the_only_one(bench: Make, base: GradientStrategy) -> None:
    found = bench().learned(FPF(base=base, finetune_steps=2))
    assert len(found.memory) == 0
    assert found.memory_samples == found.base.memory_samples == 30


@pytest.mark.parametrize(
    "modules", [("1",), ("2.statistics", "linear"), ("5*",), ("norm",), ("statistics",), ("6", "4")]
)
def test_what_is_not_chosen_stays_to_the_bit(
    bench: Make, deep: nn.Module, modules: tuple[str, ...]
) -> None:
    one = bench(deep)
    method = FPF(base=Replay(momentum=0.5), modules=modules, finetune_steps=5, lr=0.1)
    plain = one.learned(method.base, 0).model.state_dict()
    found = one.learned(method, 0).model.state_dict()
    chosen = [units(deep)[i] for i in matching(units(deep), modules)]
    moved = {name for name, value in found.items() if not torch.equal(value, plain[name])}
    allowed = {name for unit in chosen for name in unit.tensors}
    counters = {name.replace("running_mean", "num_batches_tracked") for name in allowed}
    assert moved <= allowed | counters
    # Of each at least one tensor: a bias before a batch norm has no gradient.
    assert all(moved & {*unit.tensors} for unit in chosen)


def test_statistics_alone_are_estimated_without_a_gradient(bench: Make, deep: nn.Module) -> None:
    """Momentum 0.1 over five batches, the inputs of the norm not moving."""
    one = bench(deep)
    base = one.learned(Replay(), 0)
    found = one.learned(FPF(base=Replay(), modules=("2.statistics",), finetune_steps=5), 0)
    samples = base.memory.samples()
    order = class_balanced(
        samples.targets, 10, 5, one.context().generator("finetuning.recall")
    ).split(10)
    mean = base.model[2].running_mean.clone()
    with torch.no_grad():
        for positions in order:
            mean += 0.1 * (base.model[:2](samples.take(positions).inputs).mean(0) - mean)
    torch.testing.assert_close(found.model[2].running_mean, mean)


def test_every_part_of_a_model_is_put_back(deep: nn.Module) -> None:
    deep.eval()
    deep[2].train()  # type: ignore[index]
    deep[1].requires_grad_(False)  # type: ignore[index]
    modes = [m.training for m in deep.modules()]
    wanted = [p.requires_grad for p in deep.parameters()]
    chosen = [u for u in units(deep) if u.name in ("1", "5", "5.statistics")]
    with only(deep, chosen):
        moving = [name for name, p in deep.named_parameters() if p.requires_grad]
        still = [name for name, m in deep.named_modules() if not m.training]
    assert moving == ["5.weight", "5.bias"]
    assert still == ["2"]
    with contextlib.suppress(ZeroDivisionError), only(deep, chosen):
        raise ZeroDivisionError
    assert [m.training for m in deep.modules()] == modes
    assert [p.requires_grad for p in deep.parameters()] == wanted


def test_a_fine_tuning_that_diverges_says_so(bench: Make) -> None:
    with pytest.raises(Diverged, match="fine-tuning loss"):
        bench().learned(FPF(base=Replay(), modules="all", lr=1e30, finetune_steps=10))


# The base.


@pytest.mark.parametrize(
    "base",
    [Finetune(momentum=0.9), Replay(), DERpp(), EWC(ewc_lambda=5.0), LwF()],
    ids=lambda base: type(base).__name__,
)
def test_the_base_runs_as_if_alone(
    bench: Make, deep: nn.Module, same_weights: Same, base: GradientStrategy
) -> None:
    """Every row is the base's run up to there, then fine-tuned: augmentation included."""
    one = bench(deep, crop_padding=1, flip=True)
    found, plain = one.prepare(FPF(base=base, finetune_steps=6)), one.prepare(base)
    for index in range(3):
        one.teach(found, index)
        one.teach(plain, index)
        assert not same_weights(found.model, plain.model)
        kept = copy.deepcopy(plain.model)
        kept.load_state_dict(found.base_weights)
        assert same_weights(kept, plain.model)


def test_it_can_go_on_from_what_was_fine_tuned(
    bench: Make, deep: nn.Module, same_weights: Same
) -> None:
    one = bench(deep)
    options: dict[str, Any] = {"base": Finetune(), "modules": "all", "finetune_steps": 4}
    found = one.prepare(FPF(**options, continues_from="finetuned"))
    one.teach(found, 0)
    assert found.base_weights == {}
    plain = one.prepare(Finetune())
    one.teach(plain, 0)
    plain.model.load_state_dict(found.model.state_dict())
    again = copy.deepcopy(found)
    again.finetune_steps = 0
    one.teach(plain, 1)
    one.teach(again, 1)
    assert same_weights(plain.model, again.model)


def test_without_steps_it_only_measures(bench: Make, same_weights: Same) -> None:
    one = bench()
    found = one.learned(FPF(base=Replay(), finetune_steps=0))
    assert same_weights(found.model, one.learned(Replay()).model)
    assert [fact["finetuned"] for fact in found.facts()["sensitivity"]] == [0, 0]
    assert all(fact["score"] > 0 for fact in found.facts()["sensitivity"])


class Remembering(Finetune):
    """Keeps its weights after every step."""

    def setup(self, model: nn.Module, context: Any) -> None:
        super().setup(model, context)
        self._path: list[Tensor] = []

    def begin(self, steps: int) -> None:
        super().begin(steps)
        self._path.append(self.flat())

    def update(self, loss: Tensor) -> None:
        super().update(loss)
        self._path.append(self.flat())

    def flat(self) -> Tensor:
        head: Tensor = self.model.get_parameter("head.weight")
        return torch.cat([head.flatten(), self.model.get_parameter("head.bias")]).detach()


@pytest.mark.parametrize("continues_from", ["base", "finetuned"])
@pytest.mark.parametrize(("epochs", "parts"), [(5, 5), (1, 4)])
def test_sensitivity_is_of_the_base_s_steps_alone(
    bench: Make, continues_from: Any, epochs: int, parts: int
) -> None:
    """From the weights after every step: eight steps an epoch, intervals of an epoch or of two."""
    found = bench(epochs=epochs).learned(
        FPF(base=Remembering(), finetune_steps=3, modules="all", continues_from=continues_from)
    )
    path = torch.stack(found.base._path).view(3, 8 * epochs + 1, -1)
    ends = path[:, :: 8 * epochs // parts]
    within = (ends[:, 2:] - ends[:, 1:-1]).abs().mean((1, 2))
    across = (ends[1:, -1] - ends[1:, 0]).abs().mean(1)
    (fact,) = [f for f in found.facts()["sensitivity"] if f["name"] == "head"]
    assert fact["within"] == pytest.approx(within.tolist(), rel=1e-4)
    assert fact["across"] == pytest.approx(across.tolist(), rel=1e-4)
    assert fact["score"] == pytest.approx(float(across.mean() / within.mean()), rel=1e-4)


# What is chosen.

UNITS = [
    Unit(name, "linear", (name,), size) for name, size in zip("abcd", (60, 20, 15, 5), strict=True)
]


@pytest.mark.parametrize(
    ("scores", "share", "at_most", "chosen"),
    [
        ([4, 3, 2, 1], 1.0, 0, "abcd"),
        ([4, 3, 2, 1], 0.6, 0, "a"),
        ([4, 3, 2, 1], 0.65, 0, "ad"),
        ([4, 3, 2, 1], 0.4, 0, "bcd"),
        ([4, 3, 2, 1], 0.4, 2, "bc"),
        ([1, 2, 3, 4], 0.4, 1, "d"),
        ([4, 3, 2, 1], 0.01, 0, "a"),
        ([None] * 4, 0.2, 0, "cd"),
        ([4, None, 1, None], 0.35, 0, "cd"),
    ],
)
def test_the_most_sensitive_that_fit(
    scores: list[float | None], share: float, at_most: int, chosen: str
) -> None:
    found = most_sensitive(UNITS, scores, range(4), share, at_most)
    assert "".join(UNITS[i].name for i in found) == chosen


def test_what_can_t_be_trained_is_not_chosen(bench: Make, deep: nn.Module) -> None:
    found = bench(deep).prepare(FPF(base=Finetune(), modules="all"))
    found.model[1].requires_grad_(False)
    names = [found.sensitivity.units[i].name for i in found.chosen()]
    assert names == ["2", "2.statistics", "4", "5", "5.statistics", "6"]


def test_the_highest_score_is_chosen(bench: Make, deep: nn.Module) -> None:
    found = bench(deep).prepare(FPF(base=Finetune(), at_most=1, share=1.0))
    one = torch.ones(7, dtype=torch.float64)
    found.sensitivity.within = [one]
    for best in range(7):
        found.sensitivity.across = [one + (torch.arange(7) == best)]
        assert found.chosen() == [best]


def test_a_name_that_matches_nothing_is_a_mistake(bench: Make) -> None:
    with pytest.raises(UserError, match=r"no module matches 'bn1'.* There are: features.layers.1"):
        bench().prepare(FPF(base=Finetune(), modules=("head", "bn1")))


def test_modules_can_be_given_on_the_command_line() -> None:
    node = composed("strategy=fpf", "strategy.modules=[norm,'*.conv1']")["strategy"]
    assert build(node, FPF, "strategy").modules == ("norm", "*.conv1")
    with pytest.raises(UserError, match="modules"):
        build({**node, "modules": "some"}, FPF, "strategy")
    with pytest.raises(UserError, match="modules is empty"):
        build({**node, "modules": []}, FPF, "strategy")


@pytest.mark.parametrize(
    "options",
    [{"share": 0.0}, {"share": 1.5}, {"at_most": -1}, {"finetune_steps": -1}, {"lr": 0.0}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="out of range"):
        FPF(base=Finetune(), **options)


def test_samples_that_can_t_be_read_are_refused(bench: Make) -> None:
    with pytest.raises(UserError, match="can't read the samples that ICaRL keeps"):
        bench().prepare(FPF(base=ICaRL()))


# Class-balanced batches.


@pytest.mark.parametrize("counts", [(50, 50, 50), (90, 9, 1), (3, 1), (7,), (40, 1, 1, 1, 1)])
@pytest.mark.parametrize("size", [1, 2, 10, 32])
def test_no_class_has_two_more_than_another(counts: tuple[int, ...], size: int) -> None:
    labels = torch.tensor([7, 2, 9, 4, 0])[: len(counts)]
    targets = labels.repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(0)
    batches = class_balanced(targets, size, 50, generator).view(50, size)
    for batch in batches:
        of_class = Counter(targets[batch].tolist())
        most = max(of_class.values())
        least = min(of_class.get(c, 0) for c in labels.tolist())
        assert most - least <= 1
        for label, count in zip(labels.tolist(), counts, strict=True):
            taken = Counter(batch[targets[batch] == label].tolist()).values()
            assert len(taken) == min(of_class.get(label, 0), count)
            assert max(taken, default=0) - min(taken, default=0) <= 1
    if size > 1 or len(counts) == 1:
        assert len({tuple(batch.tolist()) for batch in batches}) > 1


def test_classes_and_their_samples_are_drawn_alike() -> None:
    """3,000 batches of two from three classes: each class in two of three, sample by sample."""
    targets = torch.tensor([0] * 2 + [1] * 4 + [2] * 5)
    drawn = class_balanced(targets, 2, 3000, torch.Generator().manual_seed(0))
    often = drawn.bincount(minlength=11)
    expected = torch.tensor([1000.0] * 2 + [500.0] * 4 + [400.0] * 5)
    assert ((often - expected).abs() < 5 * expected.sqrt()).all()


def test_many_samples_take_no_more_memory_at_once() -> None:
    """The number of batches drawn at once is bounded; the result has the same shape."""
    targets = torch.arange(3).repeat(2**18)
    drawn = class_balanced(targets, 6, 3, torch.Generator().manual_seed(0))
    assert [sorted(Counter(targets[b].tolist()).values()) for b in drawn.split(6)] == [
        [2, 2, 2]
    ] * 3


def test_a_fine_tuning_sees_balanced_batches_of_the_memory(bench: Make) -> None:
    found = bench(memory_batch_size=9).learned(FPF(base=Replay(), finetune_steps=1))
    stored = {row.numpy().tobytes() for row in found.base.memory.raw}
    for batch in found.recalled(5):
        assert sorted(Counter(batch.targets.tolist()).values()) == [1, 1, 1, 2, 2, 2]
        assert {row.numpy().tobytes() for row in batch.raw} <= stored
        assert torch.equal(batch.targets, found.base.memory.targets[batch.index])


# In a run.


class StopAt(Silent):
    """Interrupts when the third experience begins."""

    def start(self, name: str, samples: int) -> None:  # noqa: ARG002
        if name.startswith("experience 3"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("base", [Replay(), Finetune()])
def test_a_resumed_run_ends_in_the_same_bits_and_facts(tmp_path: Path, base: Any) -> None:
    toy = ToyScenario(crop_padding=1)
    method = FPF(base=base, finetune_steps=5)
    whole, folder = run(toy, copy.deepcopy(method), CPU), RunFolder(tmp_path, "run")
    with folder.claim(), pytest.raises(KeyboardInterrupt):
        run(toy, copy.deepcopy(method), CPU, folder=folder, progress=StopAt())
    with folder.claim():
        rest = run(toy, copy.deepcopy(method), CPU, folder=folder)
    assert "resumed" in (folder.path / "log.txt").read_text()
    assert rest.accuracy_matrix == whole.accuracy_matrix
    assert rest.strategy_facts == whole.strategy_facts
    written = json.loads(folder.result_file.read_text())
    assert written["strategy_facts"] == whole.strategy_facts


def test_its_cost_is_the_base_s_and_the_fine_tunings() -> None:
    toy = ToyScenario()
    plain, found = (
        run(toy, method, CPU).costs for method in (Replay(), FPF(base=Replay(), finetune_steps=7))
    )
    for name in (FORWARD, BACKWARD):
        assert (found[name] or 0) - (plain[name] or 0) == 3 * 7 * 10
    assert found["train_samples"] == plain["train_samples"]
    assert found["trainable_parameters"] == plain["trainable_parameters"]
