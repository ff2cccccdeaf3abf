"""SLCA: two rates, rows that stay, and an alignment that leaves no trace in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.heads import CosineHead
from strategies.slca import SLCA, normalised

Make = Callable[..., Any]


def slca(**options: Any) -> SLCA:
    """With rates that make a toy learn."""
    return SLCA(**{"lr": 0.05, "backbone_lr": 0.01, "momentum": 0.9, "milestone": 1, **options})


def unaligned(one: Any, strategy: SLCA) -> Tensor:
    """What the model itself answers for the classes met so far."""
    whole = torch.cat([t.take(torch.arange(len(t))).inputs for t in one.stream.tests])
    with torch.no_grad():
        outputs: Tensor = strategy.model.eval()(whole)
    return outputs.masked_fill(~strategy.met, torch.finfo(torch.float32).min)


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_logits_are_divided_by_the_mean_norm_of_experiences_by_hand() -> None:
    """|(3, 4)| = 5, |12| = 12, |(0, 3)| = 3: n = 20 / 3; plain if the temperature is 0."""
    logits = torch.tensor([[3.0, 4, 12, 0, 3]])
    expected = logits / (20 / 3) / 0.5
    torch.testing.assert_close(normalised(logits, [2, 1, 2], 0.5), expected)
    assert normalised(logits, [2, 1, 2], 0) is logits


def test_logits_of_zero_have_a_gradient() -> None:
    logits = torch.zeros(3, 4, requires_grad=True)
    F.cross_entropy(normalised(logits, [2, 2], 0.1), torch.tensor([0, 1, 2])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_first_step_by_hand(bench: Make) -> None:
    """Cross-entropy over the experience's classes; head at lr, the rest at backbone_lr."""
    one = bench()
    strategy = one.prepare(slca(momentum=0))
    experience, batch = one.stream.experiences[1], one.batch(1, 0, 10)
    strategy.before(experience)
    strategy.begin(1)
    columns = list(experience.classes)
    where = torch.tensor([columns.index(int(label)) for label in batch.targets])
    expected = F.cross_entropy(strategy.model(batch.inputs)[:, columns], where)
    slow, fast = strategy.model.features.parameters(), strategy.model.head.parameters()
    rates = [*((p, 0.01) for p in slow), *((p, 0.05) for p in fast)]
    gradients = torch.autograd.grad(expected, [p for p, _ in rates])
    after = [p.detach() - rate * g for (p, rate), g in zip(rates, gradients, strict=True)]
    loss = strategy.loss(batch)
    torch.testing.assert_close(loss, expected)
    strategy.update(loss)
    for (parameter, _), value in zip(rates, after, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_rows_of_other_classes_stay_to_the_bit(bench: Make, head: str, optimizer: Any) -> None:
    """With weight decay and momentum, which move rows without a gradient."""
    one = bench(head=head)
    strategy = one.learned(slca(weight_decay=0.1, optimizer=optimizer), 0)
    before = weights(strategy.model.head)
    one.teach(strategy, 1)
    mine = list(one.stream.experiences[1].classes)
    others = [label for label in range(6) if label not in mine]
    for old, new in zip(before, weights(strategy.model.head), strict=True):
        assert torch.equal(old[others], new[others])
        assert not torch.isclose(old[mine], new[mine]).all(-1).any()
    assert isinstance(strategy.model.head, CosineHead if head == "cosine" else nn.Linear)


@pytest.mark.parametrize(("schedule", "factor"), [("constant", 1.0), ("cosine", 0.5)])
def test_rates_fall_to_a_tenth_at_the_milestone(bench: Make, schedule: Any, factor: float) -> None:
    """Eight steps: at the cosine's half, and not before it."""
    one = bench(epochs=1)
    strategy = one.prepare(slca(lr=1.0, backbone_lr=0.5, milestone=0.5, schedule=schedule))
    strategy.before(one.stream.experiences[0])
    strategy.begin(8)
    rates = []
    for _ in range(8):
        strategy.update(0 * strategy.loss(one.batch(0, 0, 4)))
        rates.append([group["lr"] for group in strategy._optimizer.param_groups])
    assert rates[0] == [1.0, 0.5]
    assert min(rates[3]) > 0.25
    assert rates[4] == pytest.approx([0.1 * factor, 0.05 * factor])


def test_alignment_leaves_no_trace_in_training(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    """Features and the head before alignment are those of a run that never aligned."""
    one = bench()
    plain, aligned = one.learned(slca(alignment_epochs=0)), one.learned(slca())
    assert same_weights(plain.model, aligned.model)
    assert same_weights(plain.aligned, plain.model.head)
    assert not same_weights(aligned.aligned, aligned.model.head)
    torch.testing.assert_close(one.outputs(plain), unaligned(one, plain))


def test_the_first_experience_is_not_aligned(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    one = bench()
    strategy = one.learned(slca(), 0)
    assert same_weights(strategy.aligned, strategy.model.head)


def test_answers_come_from_the_head_before_alignment_while_it_learns(bench: Make) -> None:
    one = bench()
    strategy = one.learned(slca(), 0, 1)
    between = one.outputs(strategy)
    strategy.before(one.stream.experiences[2])
    during = one.outputs(strategy)
    torch.testing.assert_close(during, unaligned(one, strategy))
    assert not torch.allclose(during[:, :4], between[:, :4], atol=1e-3)


def test_classes_that_have_not_come_are_named_last(bench: Make) -> None:
    one = bench()
    strategy = one.learned(slca(), 0, 1)
    outputs, others = one.outputs(strategy), list(one.stream.experiences[2].classes)
    met = [label for label in range(6) if label not in others]
    assert outputs.isfinite().all()
    assert outputs[:, others].max() < outputs[:, met].min()


def test_one_pass_of_alignment_by_hand(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples given, drawn as they were: SGD on the normalised logits of classes met so far."""
    one = bench()
    strategy = one.learned(slca(), 0)
    seen: list[Any] = []
    sample = strategy.statistics.sample

    def spy(*args: Any) -> Any:
        seen.append((args, sample(*args)))
        return seen[-1][1]

    monkeypatch.setattr(strategy.statistics, "sample", spy)
    strategy.alignment_epochs, strategy.alignment_samples, strategy.alignment_lr = 1, 5, 0.3
    strategy.weight_decay, strategy.temperature, strategy.mean_scale = 0.01, 0.2, 0.6
    one.teach(strategy, 1)
    ((classes, count, _, scales), (features, targets)) = seen[0]
    assert classes == [c for e in one.stream.experiences[:2] for c in e.classes]
    assert count == 5
    assert scales == pytest.approx([0.8, 0.8, 1.0, 1.0]), "0.6 + 0.4 t_c / t"

    generator = torch.Generator()
    generator.set_state(one.prepare(slca()).context.generator("alignment").get_state())
    sample(*seen[0][0][:2], generator, scales)
    order = torch.randperm(20, generator=generator)
    head = nn.Linear(32, 6)
    head.load_state_dict(strategy.model.head.state_dict())
    speeds = [torch.zeros_like(p) for p in head.parameters()]
    for some in order.split(5):
        z = F.linear(features[some], head.weight[classes], head.bias[classes])
        n = (z[:, :2].norm(dim=1) + z[:, 2:].norm(dim=1)) / 2
        where = torch.tensor([classes.index(int(label)) for label in targets[some]])
        loss = F.cross_entropy(z / n.unsqueeze(1) / 0.2, where)
        gradients = torch.autograd.grad(loss, list(head.parameters()))
        with torch.no_grad():
            for parameter, speed, g in zip(head.parameters(), speeds, gradients, strict=True):
                speed.mul_(0.9).add_(g + 0.01 * parameter)
                parameter.sub_(0.3 * speed)
    for expected, found in zip(weights(head), weights(strategy.aligned), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_alignment_lifts_old_classes(bench: Make) -> None:
    """A head whose newest rows shout is brought back into balance."""
    one = bench(per_class=60, noise=20.0)
    strategy = one.learned(slca(), 0, 1)
    with torch.no_grad():
        strategy.model.head.bias[list(one.stream.experiences[1].classes)] += 5
    old = one.stream.tests[0].take(torch.arange(len(one.stream.tests[0])))

    def right() -> float:
        answers = strategy.predict(old).argmax(1)
        return float((answers == old.targets).float().mean())

    strategy.aligned.load_state_dict(strategy.model.head.state_dict())
    before = right()
    strategy.alignment_epochs, strategy.alignment_lr = 20, 0.3
    strategy._align(2)
    assert before == 0
    assert right() > 0.9


def test_old_statistics_stay_and_new_ones_are_of_the_new_features(bench: Make) -> None:
    one = bench()
    strategy = one.learned(slca(), 0)
    label = one.stream.experiences[0].classes[0]
    before = strategy.statistics.covariance(label)
    one.teach(strategy, 1)
    assert torch.equal(strategy.statistics.covariance(label), before)
    train = one.stream.experiences[1].train
    new = one.stream.experiences[1].classes[1]
    whole = train.take((train.targets == new).nonzero().flatten())
    with torch.no_grad():
        features = strategy.model.features(whole.inputs)
    torch.testing.assert_close(strategy.statistics.mean(new), features.mean(0))
    covariance = features.double().T.cov() + 1e-4 * torch.eye(32)
    torch.testing.assert_close(
        strategy.statistics.covariance(new).double(), covariance.double(), rtol=1e-4, atol=1e-5
    )


def test_facts_tell_the_bytes(bench: Make) -> None:
    one = bench()
    facts = one.learned(slca()).facts()
    assert facts["gaussians_bytes_per_class"] == 4 * (32 * 32 + 32 + 1)
    assert facts["gaussians_bytes"] == 6 * facts["gaussians_bytes_per_class"]


@pytest.mark.parametrize("option", [{"backbone_lr": 0}, {"mean_scale": 1.1}, {"milestone": -0.1}])
def test_what_has_no_meaning_is_refused(option: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(option))):
        SLCA(**option)  # type: ignore[arg-type]


def test_a_model_without_features_is_refused(bench: Make) -> None:
    with pytest.raises(UserError, match="Sequential"):
        bench(nn.Sequential(nn.Flatten(), nn.Linear(36, 6))).prepare(SLCA())
