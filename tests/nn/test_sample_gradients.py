"""Per-sample gradient sums against a loop that takes one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.heads import CosineHead
from clbench.nn.sample_gradients import LIMITS, Power, mean_gradient_powers
from clbench.nn.transforms import Identity
from clbench.samples import Samples, TensorSource

OUTPUTS = 3


def mixed(outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Two cotangents that depend on outputs and targets."""
    yield outputs.softmax(1) * (1 + targets[:, None])
    yield outputs.sin()


class Residual(nn.Module):
    """Strides, groups, dilation, operations in place, a layer that is met twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.groups = nn.GroupNorm(2, 4)
        self.down = nn.Conv2d(4, 6, (3, 1), stride=(2, 1))
        self.twice = nn.Linear(6, 6)
        self.rows = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        x = x + self.groups(self.grouped(x)).relu_()
        x = self.down(x).mean((2, 3))
        outputs: Tensor = self.head(self.rows(self.twice(self.twice(x).tanh())))
        return outputs


class Attention(nn.Module):
    """Sequences, a free parameter, weights that no module's forward reads, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.place = nn.Parameter(torch.randn(5, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.unused = nn.Linear(2, 2)
        self.head = CosineHead(8, OUTPUTS, learnable=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        x = self.norm(x + self.attend(x, x, x, need_weights=False)[0])
        outputs: Tensor = self.head(x.mean(1))
        return outputs


class Reflecting(nn.Module):
    """Convolutions whose border the formulas do not know, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(2, 3, 3, padding="same")
        self.mirror = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.mirror(self.same(x).tanh()).mean((2, 3))
        outputs: Tensor = self.two(self.one(x).tanh())
        return outputs


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(True), nn.Linear(5, OUTPUTS))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (3, 4)),
    "residual": (Residual, (2, 7, 6)),
    "attention": (Attention, (5, 8)),
    "reflecting": (Reflecting, (2, 5, 5)),
}


def prepared(name: str, seed: int = 0) -> tuple[nn.Module, Samples]:
    make, shape = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        for module in model.modules():  # statistics and scales that differ from 0 and 1
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        inputs = torch.randn(11, *shape, dtype=torch.float64)
        targets = torch.randint(OUTPUTS, (11,))
    source = TensorSource(inputs, targets)
    return model.eval(), Samples(source, torch.arange(11), Identity())


def one_by_one(model: nn.Module, samples: Samples, power: int, size: int = 1) -> dict[str, Tensor]:
    """The definition, with plain autograd: size 1 is one sample at a time."""
    named = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in named.items()}
    everything = torch.arange(len(samples))
    for batch in samples.batches(everything, size):
        outputs = model(batch.inputs)
        for v in mixed(outputs.detach(), batch.targets):
            scalar = (outputs * v).sum() / len(batch)
            found = torch.autograd.grad(
                scalar, list(named.values()), retain_graph=True, materialize_grads=True
            )
            for name, g in zip(named, found, strict=True):
                totals[name] += g.abs() ** power
    return {name: total / -(-len(samples) // size) for name, total in totals.items()}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_sample_at_a_time(name: str, power: Power) -> None:
    model, samples = prepared(name)
    expected = one_by_one(model, samples, power)
    found = mean_gradient_powers(model, samples, mixed, power, batch_size=4)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)
    assert any(value.any() for value in expected.values())


@pytest.mark.parametrize("name", MODELS)
def test_of_batches_equals_plain_autograd(name: str) -> None:
    model, samples = prepared(name)
    found = mean_gradient_powers(model, samples, mixed, 2, batch_size=4, of_batches=True)
    for key, value in one_by_one(model, samples, 2, size=4).items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("name", MODELS)
def test_batch_size_and_pieces_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = prepared(name)
    whole = mean_gradient_powers(model, samples, mixed, 2, batch_size=11)
    monkeypatch.setitem(LIMITS, "cpu", 1)  # one sample at a time
    pieces = mean_gradient_powers(model, samples, mixed, 2, batch_size=3)
    for key, value in whole.items():
        torch.testing.assert_close(pieces[key], value)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, samples = prepared(name)
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = mean_gradient_powers(model, samples, mixed, 2)
    assert frozen not in found
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.get_parameter(frozen).requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frozen_parameter_can_be_asked_for() -> None:
    model, samples = prepared("residual")
    expected = mean_gradient_powers(model, samples, mixed, 2)
    model.requires_grad_(False)
    found = mean_gradient_powers(model, samples, mixed, 2, names=["stem.weight", "head.bias"])
    assert found.keys() == {"stem.weight", "head.bias"}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


def test_order_selects_samples() -> None:
    model, samples = prepared("perceptron")
    some = torch.tensor([7, 2, 5])
    found = mean_gradient_powers(model, samples, mixed, 1, order=some)
    for key, value in one_by_one(model, samples.subset(some), 1).items():
        torch.testing.assert_close(found[key], value)


def test_images_in_channels_last_memory_are_no_exception() -> None:
    model, samples = prepared("residual")
    expected = mean_gradient_powers(model, samples, mixed, 2)
    inputs = samples.take(torch.arange(11)).inputs.contiguous(memory_format=torch.channels_last)
    moved = Samples(TensorSource(inputs, samples.targets), torch.arange(11), Identity())
    model = model.to(memory_format=torch.channels_last)
    for key, value in mean_gradient_powers(model, moved, mixed, 2).items():
        torch.testing.assert_close(value, expected[key])


def test_training_mode_is_refused() -> None:
    model, samples = prepared("perceptron")
    with pytest.raises(ValueError, match="evaluation mode"):
        mean_gradient_powers(model.train(), samples, mixed, 2)


def test_statistics_of_the_batch_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    samples = Samples(TensorSource(torch.randn(3, 4), torch.zeros(3)), torch.arange(3), Identity())
    with pytest.raises(UserError, match="1 keeps no running statistics"):
        mean_gradient_powers(model, samples, mixed, 2)
