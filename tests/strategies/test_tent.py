"""TENT against a loop written from its code, batch-norm adaptation, and a step by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.samples import Batch
from clbench.testing import ToyViT
from strategies.bn_adapt import BNAdapt
from strategies.source import Source
from strategies.tent import Tent

Make = Callable[..., Any]


def unlabelled(inputs: Tensor) -> Batch:
    nobody = torch.empty(0, dtype=torch.int64)
    return Batch(inputs, nobody, inputs, torch.arange(len(inputs)))


def test_without_a_step_it_is_batch_norm_adaptation(drift: Make) -> None:
    bench = drift()
    tent, floor = bench.prepare(Tent(lr=0.0)), bench.prepare(BNAdapt())
    for index in range(3):
        for batch in bench.arriving(index):
            assert torch.equal(tent.adapt(batch), floor.adapt(batch))
            with torch.inference_mode():
                assert torch.equal(tent.predict(batch), floor.predict(batch))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_is_the_loop_of_the_published_code(drift: Make, optimizer: Any) -> None:
    bench = drift()
    tent = bench.prepare(Tent(lr=0.01, optimizer=optimizer, momentum=0.9))
    model = bench.prepare(Source()).model.train().requires_grad_(False)
    scales: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
            module.track_running_stats = False
            module.running_mean = module.running_var = None
            scales += [module.weight, module.bias]
    descent: torch.optim.Optimizer = torch.optim.SGD(scales, 0.01, momentum=0.9)
    if optimizer == "adam":
        descent = torch.optim.Adam(scales, 0.01, betas=(0.9, 0.999))
    start = [p.clone() for p in scales]
    for index in range(3):
        for batch in bench.arriving(index):
            outputs = model(batch.inputs)
            torch.testing.assert_close(tent.adapt(batch), outputs)
            loss = -(outputs.softmax(1) * outputs.log_softmax(1)).sum(1).mean(0)
            loss.backward()
            descent.step()
            descent.zero_grad()
    found = [p for p in tent.model.parameters() if p.requires_grad]
    torch.testing.assert_close(found, scales)
    moved = [float((a - b).detach().abs().max()) for a, b in zip(start, scales, strict=True)]
    assert min(moved) > 1e-3


def test_one_step_by_hand(drift: Make) -> None:
    """Two samples, two logits that are the output of one batch norm."""
    tent = drift(nn.Sequential(nn.BatchNorm1d(2, eps=1e-12))).prepare(
        Tent(lr=0.1, optimizer="sgd", momentum=0.0)
    )
    outputs = tent.adapt(unlabelled(torch.tensor([[3.0, 5.0], [1.0, 9.0]])))
    # Normalised: [1, -1] and [-1, 1]; answers before the step: sure by e²/(1 + e²) = 0.881.
    torch.testing.assert_close(outputs, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    p = 1 / (1 + math.exp(-2))
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    gradient = -p * (math.log(p) + h)  # of the surer logit; the other's is its negative
    assert gradient == pytest.approx(-0.20998, abs=1e-5)
    scale, shift = tent.model.parameters()
    torch.testing.assert_close(scale.detach(), torch.full((2,), 1 - 0.1 * gradient))
    torch.testing.assert_close(shift.detach(), torch.zeros(2), atol=1e-7, rtol=0)


def test_only_scales_and_shifts_move(drift: Make) -> None:
    bench = drift()
    tent, source = bench.prepare(Tent(lr=0.01)), bench.prepare(Source())
    for batch in bench.arriving(1):
        tent.adapt(batch)
    before = dict(source.model.named_parameters())
    moved = [n for n, p in tent.model.named_parameters() if not torch.equal(p, before[n])]
    norms = [n for n, m in source.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert moved == [f"{n}.{kind}" for n in norms for kind in ("weight", "bias")]


def test_layer_norms_adapt_too(drift: Make) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ToyViT().build((3, 6, 6))
    tent = drift(model).prepare(Tent(lr=0.01))
    before = {n: p.clone() for n, p in tent.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tent.adapt(unlabelled(torch.randn(4, 3, 6, 6, generator=generator)))
    moved = [n for n, p in tent.model.named_parameters() if not torch.equal(p, before[n])]
    assert moved
    assert all("norm" in name for name in moved)


def test_dropout_stays_off(drift: Make) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9))
    tent = drift(model).prepare(Tent())
    outputs = tent.adapt(unlabelled(torch.eye(4)))
    assert (outputs != 0).all()


def test_a_model_without_norms_is_refused(drift: Make) -> None:
    with pytest.raises(UserError, match="no scales and shifts"):
        drift(nn.Sequential(nn.Flatten(), nn.Linear(192, 6))).prepare(Tent())
