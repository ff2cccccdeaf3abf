"""SAR against a loop written from its code without its slips, and its parts by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.backbones import ResNet18
from clbench.samples import Batch
from clbench.state import capture
from strategies.sar import SAR

Make = Callable[..., Any]


def scales(strategy: Any) -> list[Tensor]:
    return [p.detach().clone() for p in strategy.model.parameters() if p.requires_grad]


def unlabelled(inputs: Tensor) -> Batch:
    nobody = torch.empty(0, dtype=torch.int64)
    return Batch(inputs, nobody, inputs, torch.arange(len(inputs)))


def test_a_step_uphill_and_one_down_by_hand(drift: Make) -> None:
    """Two samples, two logits that are the output of one batch norm; all is symmetrical."""
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-12))
    sar = drift(model).prepare(SAR(lr=0.1, momentum=0.0, rho=0.05, recovery=0.0))
    vars(sar)["_margin"] = 0.5
    outputs = sar.adapt(unlabelled(torch.tensor([[3.0, 5.0], [1.0, 9.0]])))
    torch.testing.assert_close(outputs, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    # The gradient is the same negative number for both scales and none for the shifts, so that
    # uphill is 0.05 / √2 downwards for each scale.
    uphill = 1 - 0.05 / math.sqrt(2)
    p = 1 / (1 + math.exp(-2 * uphill))
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    gradient = -p * (math.log(p) + h)
    scale, shift = sar.model.parameters()
    torch.testing.assert_close(scale.detach(), torch.full((2,), 1 - 0.1 * gradient))
    torch.testing.assert_close(shift.detach(), torch.zeros(2), atol=1e-6, rtol=0)
    assert sar.average == pytest.approx(h)


class Published:
    """The published loop, parameter by parameter, without its slips."""

    def __init__(self, model: nn.Module, margin: float, rho: float, recovery: float) -> None:
        self.model, self.margin, self.rho, self.recovery = model, margin, rho, recovery
        self.scales = [p for p in model.parameters() if p.requires_grad]
        self.begin()
        self.start = copy.deepcopy(model.state_dict())
        self.sizes: list[tuple[int, int]] = []
        self.resets = 0

    def begin(self) -> None:
        self.descent = torch.optim.SGD(self.scales, 0.05, momentum=0.9)
        self.average: float | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.model(inputs)
        h = -(outputs.softmax(1) * outputs.log_softmax(1)).sum(1)
        first = torch.where(h < self.margin)
        self.sizes.append((len(first[0]), 0))
        if len(first[0]) == 0:
            return outputs.detach()
        h[first].mean(0).backward()
        norm = torch.norm(
            torch.stack([p.grad.norm(p=2) for p in self.scales if p.grad is not None])
        )
        old = [p.data.clone() for p in self.scales]
        for p in self.scales:
            assert p.grad is not None
            p.data += p.grad * self.rho / (norm + 1e-12)
        self.descent.zero_grad()
        again = self.model(inputs)
        h2 = -(again.softmax(1) * again.log_softmax(1)).sum(1)[first]
        second = torch.where(h2 < self.margin)
        self.sizes[-1] = len(first[0]), len(second[0])
        if len(second[0]):
            loss = h2[second].mean(0)
            loss.backward()
        for p, o in zip(self.scales, old, strict=True):
            p.data = o
        if len(second[0]):
            self.descent.step()
            value = loss.item()
            self.average = value if self.average is None else 0.9 * self.average + 0.1 * value
        self.descent.zero_grad()
        if self.average is not None and self.average < self.recovery:
            self.model.load_state_dict(self.start)
            self.begin()
            self.resets += 1
        return outputs.detach()


@pytest.mark.parametrize("recovery", [0.0, 0.3])
def test_it_is_the_loop_of_the_published_code(drift: Make, recovery: float) -> None:
    bench = drift()
    strategy = SAR(lr=0.05, rho=1.0, recovery=recovery)
    sar, other = (bench.prepare(strategy) for _ in range(2))
    loop = Published(other.model, 0.4 * math.log(6), 1.0, recovery)
    for index in range(3):
        for batch in bench.arriving(index):
            found, expected = sar.adapt(batch), loop(batch.inputs)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert sar.average == (loop.average and pytest.approx(loop.average, rel=1e-4))
    moved = [p.detach() for p in loop.scales]
    torch.testing.assert_close(scales(sar), moved, rtol=1e-4, atol=1e-4)
    assert sar.facts() == {"resets": loop.resets}
    assert bool(loop.resets) == bool(recovery)
    # The comparison means something: both filters have left samples out, and kept some.
    assert any(0 < a < 10 for a, _ in loop.sizes)
    assert any(0 < b < a for a, b in loop.sizes)


def test_without_reliable_samples_not_even_momentum_moves(drift: Make) -> None:
    bench = drift()
    sar = bench.prepare(SAR(lr=0.05, recovery=0.0))
    sar.adapt(bench.arriving(0)[0])  # momentum has begun
    before = capture(sar)
    vars(sar)["_margin"] = 0.0
    outputs = sar.adapt(bench.arriving(1)[0])
    assert torch.equal(outputs, sar.predict(bench.arriving(1)[0]))
    after = capture(sar)
    assert all(torch.equal(after["model"][k], v) for k, v in before["model"].items())
    for one, two in zip(
        before["descent"]["state"].values(), after["descent"]["state"].values(), strict=True
    ):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])
    assert after["average"] == before["average"]


def test_samples_that_are_reliable_only_before_the_step_uphill_teach_nothing(drift: Make) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-12))
    sar = drift(model).prepare(SAR(lr=0.1, recovery=0.0, rho=0.5))
    batch = unlabelled(torch.tensor([[3.0, 5.0], [1.0, 9.0]]))
    sar.adapt(batch)  # momentum has begun
    answers = sar.predict(batch).detach()
    entropies = -(answers.softmax(1) * answers.log_softmax(1)).sum(1)
    vars(sar)["_margin"] = float(entropies.max()) + 0.01
    before, average = scales(sar), sar.average
    sar.adapt(batch)
    assert all(map(torch.equal, scales(sar), before))
    assert sar.average == average
    vars(sar)["rho"] = 0.0
    sar.adapt(batch)
    assert not torch.equal(scales(sar)[0], before[0])


def test_a_collapse_resets_once_and_then_begins_anew(drift: Make) -> None:
    bench = drift()
    sar = bench.prepare(SAR(lr=0.05, recovery=0.0))
    start = capture(sar)
    sar.adapt(bench.arriving(0)[0])
    assert capture(sar)["descent"]["state"]
    sar.average, sar.recovery = None, 0.2
    sar.watch(0.3)
    for left in (0.27, 0.243, 0.2187):
        sar.watch(0.0)
        assert sar.average == pytest.approx(left)
        assert sar.resets == 0
    sar.watch(0.0)
    after = capture(sar)
    assert after.pop("resets") == 1
    assert start.pop("resets") == 0
    assert after["average"] is None
    assert all(torch.equal(after["model"][k], v) for k, v in start["model"].items())
    assert after["descent"]["state"] == {}
    sar.watch(0.5)
    assert (sar.resets, sar.average) == (1, 0.5)


def test_the_top_of_known_architectures_stays(drift: Make) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = ResNet18().build((3, 8, 8))
    model = nn.Sequential(nn.ModuleDict({"features": features})["features"], nn.Linear(512, 6))
    sar = drift(model).prepare(SAR())
    trained = [n for n, p in sar.model.named_parameters() if p.requires_grad]
    assert trained
    assert not any("layer4" in name for name in trained)
    assert any("layer3" in name for name in trained)


def test_the_last_blocks_of_a_vision_transformer_stay() -> None:
    from timm.models.vision_transformer import VisionTransformer

    from clbench.nn.backbones import ModelFeatures
    from clbench.nn.batch_statistics import affine_parameters

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=12, num_heads=2)
    chosen = affine_parameters(ModelFeatures(model, 8), SAR().frozen)
    expected = {f"model.blocks.{i}.norm{j}" for i in range(9) for j in (1, 2)}
    assert {name.rpartition(".")[0] for name in chosen} == expected


@pytest.mark.parametrize("option", [{"rho": -0.1}, {"decay": 1.1}, {"recovery": -1.0}])
def test_ranges(option: dict[str, float]) -> None:
    with pytest.raises(UserError, match="out of range"):
        SAR(**option)  # type: ignore[arg-type]
