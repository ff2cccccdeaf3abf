"""GDumb: its memory, the schedule of the official code, CutMix, and a new model each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.testing import ToyScenario
from strategies.gdumb import GDumb, cutmix

Make = Callable[..., Any]


def test_the_memory_is_balanced_after_every_experience(bench: Make) -> None:
    one = bench(memory_size=31)
    gdumb = one.prepare(GDumb(memory_epochs=1))
    for index, experience in enumerate(one.stream.experiences):
        one.teach(gdumb, index)
        counts = Counter(gdumb.memory.targets.tolist())
        seen = [c for e in one.stream.experiences[: index + 1] for c in e.classes]
        assert sorted(counts) == sorted(seen)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert gdumb.memory_samples == 31
        assert set(experience.classes) <= set(counts)


def test_every_sample_is_offered_once_whatever_the_epochs(bench: Make) -> None:
    one = bench(memory_size=1000, epochs=5)
    gdumb = one.learned(GDumb(memory_epochs=1))
    assert gdumb.memory.seen == sum(len(e.train) for e in one.stream.experiences)
    # With room for all, the share is 1000 / classes; every sample of 40 per class is there once.
    assert len(gdumb.memory.raw.flatten(1).unique(dim=0)) == gdumb.memory_samples == 240


def test_the_learning_rate_is_that_of_the_official_code() -> None:
    """Its loop: a tenth, then the highest, then steps of SGDR with T_0 = 1, doubling."""
    gdumb = GDumb(lr=0.05, lr_min=0.0005)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=gdumb.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=1, T_mult=2, eta_min=gdumb.lr_min
    )
    for epoch in range(256):
        optimizer.step()
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = gdumb.lr * 0.1
        elif epoch == 1:
            optimizer.param_groups[0]["lr"] = gdumb.lr
        else:
            schedule.step()
        assert gdumb.rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert gdumb.rate(256) == gdumb.lr  # 256 epochs end with a whole cosine


def test_it_takes_its_own_steps_whatever_the_scenario_says(bench: Make) -> None:
    one = bench(memory_size=30, epochs=7, batch_size=5)
    one.learned(GDumb(memory_epochs=3, batch_size=16), 0)
    assert one.steps == [16, 14] * 3


def test_a_model_owes_nothing_to_the_one_before(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    one = bench()
    straight, disturbed = (
        one.learned(GDumb(memory_epochs=2), 0),
        one.learned(GDumb(memory_epochs=2), 0),
    )
    with torch.no_grad():
        for parameter in disturbed.model.parameters():
            parameter.add_(1.0)
    assert not same_weights(straight.model, disturbed.model)
    for strategy in (straight, disturbed):
        one.teach(strategy, 1)
    assert same_weights(straight.model, disturbed.model)


def test_one_step_by_hand(bench: Make) -> None:
    """SGD of lr / 10 on the whole memory, with the gradient cut to its largest norm."""
    one = bench(memory_size=12)
    options: dict[str, Any] = {"memory_epochs": 1, "batch_size": 12, "momentum": 0.0}
    options |= {"weight_decay": 0.0, "cutmix_probability": 0.0, "clip": 0.01}
    gdumb = one.prepare(GDumb(lr=2.0, **options))
    initial = [p.detach().clone() for p in gdumb.model.parameters()]
    one.teach(gdumb, 0)
    start = one.prepare(GDumb()).model
    stored = gdumb.context.transform.test(gdumb.memory.raw)
    F.cross_entropy(start(stored), gdumb.memory.targets).backward()
    gradient = [p.grad for p in start.parameters()]
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert norm > 0.01
    for new, old, g in zip(gdumb.model.parameters(), initial, gradient, strict=True):
        torch.testing.assert_close(new.detach(), old - 0.2 * g * 0.01 / norm, rtol=1e-3, atol=1e-6)


def test_cutmix_pastes_one_box_and_says_how_much_is_left() -> None:
    """Every pixel of image b holds b, so that pasted ones show whom they come from."""
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 10, 6)
    shares = []
    for _ in range(400):
        mixed, partner, share = cutmix(images, 1.0, generator)
        assert sorted(partner.tolist()) == list(range(8))
        pasted = mixed != images
        moved = partner != torch.arange(8)
        assert not pasted[~moved].any()
        assert torch.equal(mixed[pasted], partner.float().view(8, 1, 1, 1).expand_as(mixed)[pasted])
        for image in pasted[moved]:
            assert 1 - image.float().mean() == pytest.approx(share)
            rows, columns = image[0].any(1).nonzero(), image[0].any(0).nonzero()
            if len(rows):
                height = int(rows.max() - rows.min()) + 1
                width = int(columns.max() - columns.min()) + 1
                assert image[0].sum() == height * width, "not one box"
        shares.append(share)
    assert min(shares) < 0.5
    assert max(shares) == 1.0
    assert torch.equal(images[3], torch.full((3, 10, 6), 3.0))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 5.0])
def test_the_box_of_cutmix_has_the_size_of_a_beta_variable(alpha: float) -> None:
    """In the limit of large images and boxes that lie inside: area 1 - s, s ~ Beta(a, a)."""
    from scipy import stats

    generator = torch.Generator().manual_seed(1)
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 200, 200)
    shares: list[float] = []
    while len(shares) < 200:
        mixed, partner, share = cutmix(images, alpha, generator)
        pasted = (mixed[0] != images[0])[0]
        inside = not (pasted[0].any() or pasted[-1].any() or pasted[:, 0].any())
        if partner[0] and inside and not pasted[:, -1].any():
            shares.append(share)
    # Given that it lies inside, a box of side r is (1 - r)² as likely to be met.
    grid = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    density = torch.from_numpy(stats.beta.pdf(grid.numpy(), alpha, alpha))
    density = density * (1 - (1 - grid).sqrt()) ** 2
    cumulative = density.cumsum(0) / density.sum()

    def below(x: Any) -> Any:
        places = torch.searchsorted(grid, torch.as_tensor(x).clamp(1e-6, 1 - 1e-6))
        return cumulative[places.clamp(max=len(grid) - 1)].numpy()

    assert stats.kstest(shares, below).pvalue > 1e-3


def test_a_mixed_batch_has_both_labels_by_their_shares(bench: Make) -> None:
    one = bench()
    gdumb = one.prepare(GDumb(cutmix_probability=1.0))
    batch = one.batch(0, 0, 10)
    dice = torch.Generator()
    dice.set_state(gdumb._dice.get_state())
    shares = []
    for _ in range(10):
        torch.rand((), generator=dice)  # whether to mix
        inputs, partner, share = cutmix(batch.inputs, 1.0, dice)
        outputs = gdumb.model(inputs)
        expected = share * F.cross_entropy(outputs, batch.targets)
        expected = expected + (1 - share) * F.cross_entropy(outputs, batch.targets[partner])
        torch.testing.assert_close(gdumb.loss(batch), expected)
        shares.append(share)
    assert 0 < min(shares) < 0.9


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_as_many_batches_are_mixed_as_asked(bench: Make, probability: float) -> None:
    one = bench()
    gdumb = one.prepare(GDumb(cutmix_probability=probability))
    batch = one.batch(0, 0, 10)
    plain = F.cross_entropy(gdumb.model(batch.inputs), batch.targets)
    losses = [gdumb.loss(batch) for _ in range(300)]
    # A mixed batch may be left as it was: no box, or a box from images like these.
    mixed = sum(not torch.equal(loss, plain) for loss in losses) / 300
    spread = 4 * (probability * (1 - probability) / 300) ** 0.5
    assert mixed <= probability + spread
    assert mixed >= 0.8 * (probability - spread)


def test_it_refuses_to_learn_from_nothing() -> None:
    with pytest.raises(UserError, match="memory_size"):
        GDumb().check(ToyScenario(memory_size=0))


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr_min": 0.1}, {"memory_epochs": 0}, {"cutmix_probability": 1.1}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        GDumb(**options)
