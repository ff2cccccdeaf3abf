"""The minibatch loop: its order, its schedule, its optimizers, against numbers made by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import Diverged, UserError
from clbench.nn.transforms import Identity
from clbench.samples import Batch, Samples, TensorSource
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy, Wrapper
from clbench.types import Context, Experience, Scenario, Split

TOY = ToyScenario(per_class=10, epochs=2)
STREAM = TOY.stream(Split.EVALUATE, 0)


class Plain(GradientStrategy):
    """Changes no seam."""


@dataclass(kw_only=True)
class Noting(GradientStrategy):
    """Writes down every moment, with the mode of the model and the learning rate."""

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self._moments: list[tuple[str, bool]] = []
        self._rates: list[float] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._observed: list[Tensor] = []
        self._norms: list[float] = []

    def note(self, moment: str) -> None:
        self._moments.append((moment, self.model.training))

    def before(self, experience: Experience) -> None:  # noqa: ARG002
        self.note("before")

    def begin(self, steps: int) -> None:
        self.note("begin")
        super().begin(steps)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer(parameters)
        self._optimizers.append(optimizer)
        optimizer.register_step_pre_hook(self._look)
        return optimizer

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._rates.append(optimizer.param_groups[0]["lr"])
        grads = [p.grad for p in self.trainable() if p.grad is not None]
        self._norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))

    def loss(self, batch: Batch) -> Tensor:
        self.note("loss")
        return super().loss(batch)

    def update(self, loss: Tensor) -> None:
        self.note("update")
        super().update(loss)

    def observe(self, batch: Batch) -> None:
        self.note("observe")
        self._observed.append(batch.index)

    def after(self, experience: Experience) -> None:  # noqa: ARG002
        self.note("after")


class Around(Wrapper):
    """Changes no seam."""


def context(scenario: Scenario = TOY, **changes: Any) -> Context:
    return Context(
        **{
            "device": torch.device("cpu"),
            "seed": 0,
            "scenario": scenario,
            "objective": scenario.objective(),
            "transform": STREAM.transform,
            "n_outputs": STREAM.n_outputs,
            **changes,
        }
    )


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TOY.model(0, STREAM)


def ready(strategy: Any, scenario: Scenario = TOY, **changes: Any) -> Any:
    strategy.setup(model(), context(scenario, **changes))
    return strategy


def learned(strategy: Any, scenario: Scenario = TOY, *indices: int) -> Any:
    ready(strategy, scenario)
    for index in indices or (0,):
        strategy.learn(STREAM.experiences[index])
    return strategy


def weights(strategy: Any) -> list[Tensor]:
    return [p.detach().clone() for p in strategy.model.parameters()]


# The order of moments.


def test_the_moments_of_an_experience_in_order_and_mode() -> None:
    strategy = learned(Noting())
    step = [("loss", True), ("update", True), ("observe", True)]
    begin = [("before", False), ("begin", False)]
    assert strategy._moments == [*begin, *(4 * step), ("after", False)]


def test_several_passes_are_steps_on_one_arriving_batch() -> None:
    online = replace(TOY, epochs=1, online=True, passes=3)
    counted: list[int] = []
    strategy = ready(Noting(), online, on_step=counted.append)
    strategy.learn(STREAM.experiences[0])
    steps = [moment for moment, _ in strategy._moments]
    assert steps == [
        *("before", "begin"),
        *(2 * [*(3 * ["loss", "update"]), "observe"]),
        "after",
    ]
    assert counted == [10, 10]


def test_every_sample_arrives_once_in_every_epoch_and_in_another_order() -> None:
    strategy = learned(Noting())
    train = STREAM.experiences[0].train
    assert train is not None
    epochs = [torch.cat(strategy._observed[:2]), torch.cat(strategy._observed[2:])]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(train.index.tolist())
    assert not torch.equal(*epochs)


def test_online_each_batch_arrives_once() -> None:
    strategy = learned(Noting(), replace(TOY, epochs=1, online=True))
    seen = Counter(torch.cat(strategy._observed).tolist())
    assert set(seen.values()) == {1}
    assert len(seen) == 20


def test_a_short_last_batch_counts() -> None:
    counted: list[int] = []
    strategy = ready(Noting(), replace(TOY, batch_size=8), on_step=counted.append)
    strategy.learn(STREAM.experiences[0])
    assert counted == [8, 8, 4, 8, 8, 4]
    assert [len(index) for index in strategy._observed] == counted
    assert strategy._steps == strategy._step == 6


def test_epochs_and_batch_size_can_be_chosen() -> None:
    strategy = ready(Noting())
    strategy.fit(STREAM.experiences[0].train, epochs=3, batch_size=5)
    assert [len(index) for index in strategy._observed] == 12 * [5]
    assert strategy._steps == 12


def test_nothing_to_learn_is_nothing_done() -> None:
    strategy = ready(Noting())
    before = weights(strategy)
    strategy.learn(Experience(0, "unlabelled", None))
    assert strategy._moments == []
    strategy.fit(STREAM.experiences[0].train, epochs=0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(strategy), strict=True))


def test_each_experience_has_a_new_optimizer_over_what_is_trainable_then() -> None:
    class Freezing(Noting):
        """Freezes the first layer from the second experience on."""

        def before(self, experience: Experience) -> None:
            if experience.index == 1:
                next(self.model.parameters()).requires_grad_(False)

    strategy = learned(Freezing(momentum=0.9), TOY, 0, 1)
    first, second = strategy._optimizers
    assert first is not second
    count = [len(o.param_groups[0]["params"]) for o in (first, second)]
    assert count == [4, 3]


def test_a_frozen_parameter_stays() -> None:
    strategy = ready(Plain(weight_decay=0.1))
    frozen = next(strategy.model.parameters()).requires_grad_(False)
    before = frozen.clone()
    strategy.learn(STREAM.experiences[0])
    assert torch.equal(frozen, before)


# Numbers.


def test_plain_steps_are_gradient_descent() -> None:
    """Against w <- w - lr * dL/dw, written out."""
    strategy = learned(Noting(lr=0.2))
    own = model()
    source = STREAM.experiences[0].train
    assert source is not None
    for index in strategy._observed:
        inputs = source.transform.test(source.source.gather(index))
        loss = nn.functional.cross_entropy(own(inputs), source.source.targets[index])
        gradients = torch.autograd.grad(loss, list(own.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(own.parameters(), gradients, strict=True):
                parameter.sub_(0.2 * gradient)
    for a, b in zip(strategy.model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a, b)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1, fused=False),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, foreach=False, fused=False),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False, fused=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_fused_optimizers_are_pytorch_s(name: Any) -> None:
    strategy = Plain(lr=0.01, momentum=0.9, weight_decay=0.1, optimizer=name)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,))]
    fused = [nn.Parameter(p.clone()) for p in start]
    plain = [nn.Parameter(p.clone()) for p in start]
    optimizers = (strategy.make_optimizer(fused), OPTIMIZERS[name](plain))
    for _ in range(20):
        for a, b in zip(fused, plain, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(fused, plain, start, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.allclose(a, before)


def test_the_cosine_schedule() -> None:
    """lr (1 + cos(pi t / T)) / 2 for t = 0 .. T - 1: full at first, never quite zero."""
    strategy = learned(Noting(lr=0.3, schedule="cosine"), replace(TOY, epochs=4))
    assert len(strategy._rates) == 8
    assert strategy._rates[0] == 0.3
    assert strategy._rates[4] == pytest.approx(0.15)
    assert strategy._rates[2] == pytest.approx(0.3 * (2 + math.sqrt(2)) / 4)
    assert strategy._rates == sorted(strategy._rates, reverse=True)
    assert strategy._rates[-1] == pytest.approx(0.15 * (1 + math.cos(math.pi * 7 / 8)))


def test_the_schedule_begins_anew_with_each_experience_and_counts_passes() -> None:
    online = replace(TOY, epochs=1, online=True, passes=2)
    strategy = learned(Noting(lr=0.3, schedule="cosine"), online, 0, 1)
    assert strategy._rates[:4] == strategy._rates[4:]
    assert strategy._rates[2] == pytest.approx(0.15)


def test_groups_of_an_optimizer_keep_the_ratio_of_their_rates() -> None:
    class Slower(Plain):
        def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.03}]
            return torch.optim.SGD(groups, self.lr)

    strategy = learned(Slower(lr=0.3, schedule="cosine"), replace(TOY, epochs=4))
    rates = [group["lr"] for group in strategy._optimizer.param_groups]
    last = (1 + math.cos(math.pi * 7 / 8)) / 2
    assert rates == pytest.approx([0.3 * last, 0.03 * last])


def test_without_a_schedule_the_rate_is_constant() -> None:
    assert set(learned(Noting(lr=0.3))._rates) == {0.3}


def test_clipping_bounds_the_gradient_s_norm() -> None:
    free, clipped = learned(Noting()), learned(Noting(clip=0.1))
    assert min(free._norms) > 0.1
    assert clipped._norms == pytest.approx([0.1] * 4, rel=1e-3)
    loose = learned(Noting(clip=1e6))
    for a, b in zip(weights(loose), weights(free), strict=True):
        assert torch.equal(a, b)


def test_a_wrapper_passes_every_seam_on() -> None:
    wrapped = learned(Around(base=Noting(momentum=0.9)), TOY, 0, 1)
    plain = learned(Noting(momentum=0.9), TOY, 0, 1)
    assert wrapped.base._moments == plain._moments
    for a, b in zip(weights(wrapped), weights(plain), strict=True):
        assert torch.equal(a, b)
    batch = STREAM.tests[0].take(torch.arange(3)).unlabelled()
    assert torch.equal(wrapped.predict(batch), plain.predict(batch))


# Predicting.


def test_predicting_puts_the_mode_back() -> None:
    strategy = ready(Plain())
    batch = STREAM.tests[0].take(torch.arange(3)).unlabelled()
    for training in (True, False):
        strategy.model.train(training)
        strategy.predict(batch)
        assert strategy.model.training is training


def test_bf16_rounds_the_forward_pass_and_gives_fp32() -> None:
    """bf16 has 8 significant bits: two layers may lose a few of the last."""
    batch = STREAM.tests[0].take(torch.arange(10)).unlabelled()
    exact = ready(Plain()).predict(batch)
    rounded = ready(Plain(), precision="bf16").predict(batch)
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).abs().max()
    assert 0 < difference <= 2**-6 * exact.abs().max()


def test_bf16_keeps_the_weights_in_fp32_and_learns() -> None:
    strategy = ready(Plain(), precision="bf16")
    strategy.fit(STREAM.experiences[0].train, epochs=10)
    assert {p.dtype for p in strategy.model.parameters()} == {torch.float32}
    train = STREAM.experiences[0].train
    assert train is not None
    whole = train.take(torch.arange(len(train)))
    assert (strategy.predict(whole).argmax(1) == whole.targets).float().mean() > 0.9


# What can't be.


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_is_said_once_the_steps_are_done(bad: float) -> None:
    class Bad(Noting):
        """One loss of many is no number."""

        def loss(self, batch: Batch) -> Tensor:
            loss = super().loss(batch)
            return loss * bad if len(self._rates) == 1 else loss

    strategy = ready(Bad())
    with pytest.raises(Diverged, match=f"the training loss is (nan|{bad})"):
        strategy.learn(STREAM.experiences[0])
    assert len(strategy._rates) == 4
    assert not strategy.model.training


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": 1.1}, "momentum=1.1"),
        ({"weight_decay": -1e-9}, "weight_decay=-1e-09"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"Plain: {said} is out of range"):
        Plain(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"passes": 0}, "passes=0"),
        ({"memory_size": -1}, "memory_size=-1"),
        ({"memory_batch_size": -1}, "memory_batch_size=-1"),
        ({"online": True, "epochs": 2}, "online=true means one pass"),
        ({"passes": 2, "epochs": 1}, "passes needs scenario.online=true"),
    ],
)
def test_budgets_that_can_t_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ToyScenario(**options)


# What the context lends.


def test_generators_are_one_a_purpose_and_differ_by_purpose_and_seed() -> None:
    def numbers(seed: int, purpose: str) -> list[float]:
        return torch.rand(3, generator=context(seed=seed).generator(purpose)).tolist()

    one = context()
    assert one.generator("a") is one.generator("a")
    assert one.generator("a") is not one.generator("b")
    assert numbers(0, "a") == numbers(0, "a")
    assert len({tuple(numbers(s, p)) for s in (0, 1) for p in ("a", "b")}) == 4


def test_replayed_batches_are_as_large_as_arriving_ones_unless_said() -> None:
    assert context().memory_batch_size == 10
    assert context(replace(TOY, memory_batch_size=64)).memory_batch_size == 64


def test_batches_shuffle_without_the_global_generator() -> None:
    source = TensorSource(torch.arange(50).view(50, 1), torch.zeros(50).long())
    samples = Samples(source, torch.arange(50), Identity())
    state = torch.get_rng_state()
    first = [b.index.tolist() for b in context().batches(samples, 2, 20)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(b) for b in first] == [20, 20, 10, 20, 20, 10]
    assert [b.index.tolist() for b in context().batches(samples, 2, 20)] == first
    assert [b.index.tolist() for b in context(seed=1).batches(samples, 2, 20)] != first


def test_predict_puts_back_the_mode_of_every_part() -> None:
    strategy = Plain()
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    strategy.setup(model, context())
    model.train()
    model[0].eval()
    before = [module.training for module in model.modules()]
    inputs, nothing = torch.randn(3, 4), torch.empty(0, dtype=torch.int64)
    strategy.predict(Batch(inputs, nothing, inputs, torch.arange(3)))
    assert [module.training for module in model.modules()] == before
