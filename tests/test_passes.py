"""Samples through a model and back, counted by hand beside what is counted."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from clbench.conditions import Conditions
from clbench.nn.heads import Classifier
from clbench.passes import BACKWARD, FORWARD, Passes
from clbench.progress import Silent
from clbench.protocol import run
from clbench.results import RunFolder
from clbench.samples import Batch
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy, Wrapper
from clbench.types import Experience

TOY = ToyScenario(per_class=10, epochs=2, noise=20.0)
CPU = Conditions(device="cpu", threads=1)


class Plain(GradientStrategy):
    """A forward and a backward pass for each arriving sample."""


class Around(Wrapper):
    """Changes no seam."""


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))


@pytest.fixture
def passes() -> Passes:
    return Passes({FORWARD: 0, BACKWARD: 0})


def counts(passes: Passes) -> tuple[int, int]:
    return passes.costs[FORWARD], passes.costs[BACKWARD]


X = torch.ones(3, 4)


def test_a_call_counts_forward_and_a_gradient_that_returns_backward(
    model: nn.Module, passes: Passes
) -> None:
    with passes.watch(model), passes.counting(True):
        loss = model(X).sum()
        assert counts(passes) == (3, 0)
        loss.backward(retain_graph=True)
        assert counts(passes) == (3, 3)
        torch.autograd.grad(loss, list(model.parameters()))
        assert counts(passes) == (3, 6)
        (model(X).sum() + model(X[:2]).sum()).backward()
        assert counts(passes) == (8, 11)


def test_without_gradients_there_is_no_way_back(model: nn.Module, passes: Passes) -> None:
    with passes.watch(model), passes.counting(True):
        with torch.no_grad():
            model(X)
        with torch.inference_mode():
            model(X)
        model.requires_grad_(False)
        model(X)
    assert counts(passes) == (9, 0)


def test_a_part_that_alone_is_trained_needs_a_whole_pass(model: nn.Module, passes: Passes) -> None:
    with passes.watch(model), passes.counting(True):
        model[0].requires_grad_(False)  # type: ignore[index]
        model(X).sum().backward()
    assert counts(passes) == (3, 3)


def test_nothing_counts_unless_asked_to(model: nn.Module, passes: Passes) -> None:
    with passes.watch(model):
        model(X).sum().backward()
        with passes.counting(True):
            with passes.counting(False):
                model(X).sum().backward()
            model(X)
        model(X)
    with passes.counting(True):
        model(X).sum().backward()
    assert counts(passes) == (3, 0)


def test_copies_count_with_their_model(model: nn.Module, passes: Passes) -> None:
    with passes.watch(model), passes.counting(True):
        teacher = copy.deepcopy(model)
        teacher(X)
        functional_call(model, dict(teacher.named_parameters()), (X,)).sum().backward()
    assert counts(passes) == (6, 3)


def test_the_part_with_most_parameters_counts_by_itself_and_only_once(passes: Passes) -> None:
    stream = TOY.stream(CPU.split, 0)
    model = TOY.model(0, stream)
    assert isinstance(model, Classifier)
    with passes.watch(model), passes.counting(True):
        images = torch.zeros(5, 1, 6, 6)
        model(images)
        assert counts(passes) == (5, 0)
        features = model.features(images)
        assert counts(passes) == (10, 0)
        model.head(features).sum().backward()
    assert counts(passes) == (10, 5)


def test_a_call_that_fails_leaves_no_trace(model: nn.Module, passes: Passes) -> None:
    with passes.watch(model), passes.counting(True):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.ones(3, 5))
        assert counts(passes) == (0, 0)
        model(X)
    assert counts(passes) == (3, 0)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", [tuple, list, dict], ids=lambda kind: kind.__name__)
def test_outputs_of_several_parts_count_once(kind: type, passes: Passes) -> None:
    """As language models answer: a scalar loss, then logits."""

    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> object:
            logits = self.layer(x)
            parts = {"loss": logits.sum(), "logits": logits, "states": logits + 1}
            return parts if kind is dict else kind(parts.values())

    model = Answering()
    with passes.watch(model), passes.counting(True):
        answer = model(X)
        logits = answer["logits"] if kind is dict else answer[1]
        logits.sum().backward()
    assert counts(passes) == (3, 3)


# In a run.


def test_a_run_writes_down_what_its_method_costs() -> None:
    """Three experiences of 20 samples, two epochs; testing costs nothing here."""
    costs = run(TOY, Plain(), CPU).costs
    assert costs[FORWARD] == costs[BACKWARD] == costs["train_samples"] == 3 * 20 * 2
    often = run(TOY, Plain(), Conditions(device="cpu", threads=1, evaluate_every=1)).costs
    assert (often[FORWARD], often[BACKWARD]) == (costs[FORWARD], costs[BACKWARD])
    assert run(TOY, Around(base=Plain()), CPU).costs[FORWARD] == costs[FORWARD]


@dataclass(kw_only=True)
class Looking(GradientStrategy):
    """Asks a copy of itself, made at the beginning of the experience, twice for each batch."""

    def before(self, experience: Experience) -> None:  # noqa: ARG002
        self._teacher = copy.deepcopy(self.model).requires_grad_(False)

    def loss(self, batch: Batch) -> Tensor:
        answer: Tensor = self._teacher(batch.inputs) + self._teacher(batch.inputs)
        distance = self.forward(batch.inputs) - answer
        return super().loss(batch) + distance.square().mean()


def test_teachers_and_second_looks_count() -> None:
    costs = run(TOY, Looking(lr=0.01), CPU).costs
    assert (costs[FORWARD], costs[BACKWARD]) == (4 * 120, 2 * 120)


class StopAt(Silent):
    """Interrupts when the second experience begins."""

    def start(self, name: str, samples: int) -> None:  # noqa: ARG002
        if name.startswith("experience 2"):
            raise KeyboardInterrupt


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    with folder.claim(), pytest.raises(KeyboardInterrupt):
        run(TOY, Plain(), CPU, folder=folder, progress=StopAt())
    with folder.claim():
        rest = run(TOY, Plain(), CPU, folder=folder)
    whole = run(TOY, Plain(), CPU)
    assert "resumed" in (folder.path / "log.txt").read_text()
    for name in (FORWARD, BACKWARD):
        assert rest.costs[name] == whole.costs[name]
