"""ITTA against its steps written out: styles, the alignment of gradients, training and test."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from adapting import adapting, answers_without_a_trace, labelled, unlabelled
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.backbones import CifarResNet, ConvNet, FeatureExtractor, ResNet18
from clbench.nn.heads import Classifier, classifier
from clbench.samples import Samples
from clbench.types import derive_seed
from strategies.itta import ITTA, Cascade, misalignment, mix_styles, stage_shapes


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TwoStages(FeatureExtractor):
    """Two convolutions with batch norm and ReLU, then the mean.

    Args:
        last: In the place of the last ReLU.
    """

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), last or nn.ReLU())
        self.n_features = 4

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer2(self.layer1(x))
        return out.mean((2, 3))


def network(last: nn.Module | None = None) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Classifier(TwoStages(last), nn.Linear(4, 3))
        model(random(16, 2, 6, 6))  # statistics of its own
    return model.eval()


def source(n: int = 12) -> Samples:
    return labelled(random(n, 2, 6, 6, seed=5), torch.arange(n) % 3)


def images(n: int = 6) -> Tensor:
    return 2 * random(n, 2, 6, 6) + 1


class Styles:
    """The random numbers of the method, drawn once more."""

    def __init__(self, purpose: str) -> None:
        self.generator = torch.Generator().manual_seed(derive_seed(0, f"{purpose}@cpu"))

    def draw(self, n: int) -> tuple[int, Tensor, Tensor]:
        stage = int(torch.randint(2, (), generator=self.generator))
        concentration = torch.full((2, n), 0.1, dtype=torch.float64)
        gamma = torch._standard_gamma(concentration, self.generator)
        order = torch.randperm(n, generator=self.generator)
        return stage, (gamma[0] / gamma.sum(0)).float(), order


def features(model: Classifier, x: Tensor, style: tuple[int, Tensor, Tensor]) -> list[Tensor]:
    """Clean and mixed features, each branch by itself as the published code does."""
    stage, share, order = style
    found = []
    for mixing in (False, True):
        out = x
        for i, part in enumerate((model.features.layer1, model.features.layer2)):
            assert isinstance(part, nn.Module)
            out = part(out)
            if mixing and i == stage:
                out = mix_styles(out, share, order)
        found.append(out.mean((2, 3)))
    return found


def test_a_style_is_mean_and_deviation_of_each_channel() -> None:
    x = random(3, 2, 4, 5)
    share, order = torch.tensor([1.0, 0.25, 0.0]), torch.tensor([2, 0, 1])
    mixed = mix_styles(x, share, order)
    torch.testing.assert_close(mixed[0], x[0])
    mean, deviation = x.mean((2, 3)), x.std((2, 3))
    torch.testing.assert_close(mixed[1].mean((1, 2)), 0.25 * mean[1] + 0.75 * mean[0])
    expected = 0.25 * deviation[1] + 0.75 * deviation[0]
    torch.testing.assert_close(mixed[1].std((1, 2)), expected, rtol=1e-5, atol=1e-5)
    # Only the style is another: what is inside stays in proportion.
    torch.testing.assert_close(
        (mixed[2] - mixed[2].mean((1, 2), keepdim=True)) / mixed[2].std((1, 2), keepdim=True),
        (x[2] - x[2].mean((1, 2), keepdim=True)) / x[2].std((1, 2), keepdim=True),
        rtol=1e-4,
        atol=1e-4,
    )


def test_images_of_one_pixel_have_a_style_too() -> None:
    assert mix_styles(random(2, 3, 1, 1), torch.ones(2), torch.tensor([1, 0])).isfinite().all()


def test_a_cascade_by_hand() -> None:
    cascade = Cascade((2,), 2)
    x = torch.tensor([[-1.0, 3.0]])
    assert torch.equal(cascade(x), torch.tensor([[0.0, 3.0]]))
    assert torch.equal(Cascade((2,), 1)(x), x)
    cascade.scale.data = torch.tensor([[2.0, 0.5], [3.0, -1.0]])
    cascade.shift.data = torch.tensor([[4.0, 0.0], [1.0, 0.5]])
    torch.testing.assert_close(cascade(x), torch.tensor([[3.0 * 2 + 1, -1.5 + 0.5]]))


def test_the_misalignment_and_its_gradient_by_hand() -> None:
    """Gradients 2 v w of Σ v w² and c of Σ c w, each standardised by constants."""
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    v = torch.tensor([0.3, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([1.0, 5.0, -3.0], dtype=torch.float64)
    loss = misalignment((v * w**2).sum(), (c * w).sum(), [w])
    g = (2 * v * w).detach()
    difference = (g - g.mean()) / g.std() - (c - c.mean()) / c.std()
    torch.testing.assert_close(loss.detach(), difference.square().mean())
    loss.backward(inputs=[v])
    torch.testing.assert_close(v.grad, 2 / 3 * difference * (2 * w / g.std()).detach())


def test_without_steps_it_is_the_source_model_to_the_bit() -> None:
    model = network()
    strategy = adapting(ITTA(source_steps=0, lr=0.0), model, 3, source())
    for n in (6, 1):
        assert torch.equal(strategy.adapt(unlabelled(images(n))), model(images(n)))


def adam(old: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """Where the first step leads."""
    return old - lr * gradient / (gradient.abs() + 1e-8)


def test_a_step_on_the_source_written_out() -> None:
    """First the network, from both cross-entropies and the consistency, then f_w alone."""
    model, samples = network(), source()
    options = {"weight_depth": 2, "alignment": 0.1, "weight_lr": 0.01, "source_lr": 0.02}
    strategy = adapting(
        ITTA(source_steps=1, source_batch_size=12, **options),  # type: ignore[arg-type]
        model,
        3,
        samples,
    )
    seed = derive_seed(0, "source order@cpu")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    batch, styles = samples.take(order), Styles("source styles")
    cascade = Cascade((4,), 2)

    def losses() -> tuple[Tensor, Tensor]:
        clean, mixed = features(model, batch.inputs, styles.draw(12))
        both = [F.cross_entropy(model.head(z), batch.targets) for z in (clean, mixed)]
        return cascade(mixed - clean).square().mean(), both[0] + both[1]

    consistency, cross_entropy = losses()
    parameters = [*model.parameters()]
    gradients = torch.autograd.grad(consistency + cross_entropy, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.data = adam(parameter.data, gradient, 0.02)
    loss = 0.1 * misalignment(*losses(), [*model.features.parameters()])
    scale, shift = torch.autograd.grad(loss, [cascade.scale, cascade.shift], allow_unused=True)
    assert scale is not None
    assert scale.abs().max() > 1e-3
    torch.testing.assert_close(strategy.weighting.scale, adam(cascade.scale.data, scale, 0.01))
    assert shift is not None
    torch.testing.assert_close(strategy.weighting.shift, adam(cascade.shift.data, shift, 0.01))
    trained = [p for n, p in strategy.model.named_parameters() if ".map." not in n]
    for ours, theirs in zip(trained, parameters, strict=True):
        torch.testing.assert_close(ours, theirs.data)


def test_a_step_at_test_time_written_out() -> None:
    """Maps of one layer behind both stages, moved by plain gradient descent."""
    model, x = network(), images()
    strategy = adapting(
        ITTA(
            source_steps=0,
            weight_depth=1,
            map_depth=1,
            consistency_weight=0.7,
            lr=0.5,
            optimizer="sgd",
            momentum=0.0,
        ),
        model,
        3,
        source(),
    )
    scales = [torch.ones(3, 4, 4, requires_grad=True), torch.ones(4, 2, 2, requires_grad=True)]
    shifts = [torch.zeros(3, 4, 4, requires_grad=True), torch.zeros(4, 2, 2, requires_grad=True)]
    stages = [model.features.get_submodule(f"layer{i}") for i in (1, 2)]
    styles = Styles("styles")
    for _ in range(3):
        stage, share, order = styles.draw(6)

        def branch(mixing: bool, stage: int, share: Tensor, order: Tensor) -> Tensor:
            out = x
            for i in range(2):
                out = stages[i](out)
                if mixing and i == stage:
                    out = mix_styles(out, share, order)
                out = scales[i] * out + shifts[i]
            return out.mean((2, 3))

        difference = branch(True, stage, share, order) - branch(False, stage, share, order)
        tensors = [*scales, *shifts]
        gradients = torch.autograd.grad(0.7 * difference.square().mean(), tensors)
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.data -= 0.5 * gradient
        expected = model.head(branch(False, stage, share, order))
        torch.testing.assert_close(strategy.adapt(unlabelled(x)), expected)
    assert max(float((s.detach() - 1).abs().max()) for s in scales) > 1e-3


def test_only_maps_change_and_reset_puts_them_back() -> None:
    strategy = adapting(ITTA(source_steps=2, lr=0.01), network(), 3, source())
    before = {k: v.clone() for k, v in strategy.model.state_dict().items()}
    batch = unlabelled(images())
    fresh = answers_without_a_trace(strategy, batch)
    first = [strategy.adapt(batch) for _ in range(3)]
    after = strategy.model.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed == {f"features.layer{i}.map.{k}" for i in (1, 2) for k in ("scale", "shift")}
    assert not torch.equal(answers_without_a_trace(strategy, batch), fresh)
    strategy.reset()
    assert torch.equal(answers_without_a_trace(strategy, batch), fresh)
    assert all(torch.equal(a, strategy.adapt(batch)) for a in first)


def test_training_on_the_source_makes_styles_matter_less() -> None:
    """Features of mixed and clean styles come closer, and the source is still known."""
    model, samples = network(), source(60)

    @torch.no_grad()
    def distance(trained: Classifier) -> float:
        styles, total = Styles("styles"), 0.0
        for _ in range(20):
            clean, mixed = features(trained, samples.take(torch.arange(60)).inputs, styles.draw(60))
            total += float((clean - mixed).square().mean() / clean.var(0).mean())
        return total

    options = {"source_batch_size": 20, "source_lr": 3e-3, "source_steps": 60}
    strategy = adapting(ITTA(**options), model, 3, samples)  # type: ignore[arg-type]
    trained = copy.deepcopy(model)
    state = strategy.model.state_dict()
    names = {k: re.sub(r"(layer\d)", r"\1.stage", k) for k in trained.state_dict()}
    trained.load_state_dict({k: state[name] for k, name in names.items()})
    assert distance(trained) < distance(model)


def test_the_source_is_passed_as_often_as_the_steps_need() -> None:
    strategy = adapting(ITTA(source_steps=0, source_batch_size=5), network(), 3, source())
    strategy.source_steps = 5
    batches = list(strategy._source_batches(source()))
    assert [len(batch) for batch in batches] == [5, 5, 2, 5, 5]
    assert sorted(torch.cat([batch.index for batch in batches[:3]]).tolist()) == list(range(12))


@pytest.mark.parametrize("backbone", [ConvNet(), CifarResNet(), ResNet18()])
def test_the_suite_s_backbones(backbone: ConvNet) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = classifier(backbone, (3, 16, 16), 3).eval()
    samples = labelled(random(4, 3, 16, 16), torch.arange(4) % 3)
    shapes = stage_shapes(model.features, samples)
    assert len(shapes) == {ConvNet: 3, CifarResNet: 3, ResNet18: 4}[type(backbone)]
    strategy = adapting(ITTA(source_steps=1), model, 3, samples)
    assert strategy.adapt(unlabelled(random(3, 3, 16, 16))).isfinite().all()


def test_what_it_needs_is_said() -> None:
    with pytest.raises(UserError, match="itta learns its loss on labelled source samples"):
        adapting(ITTA(), network(), 3)
    with pytest.raises(UserError, match="stages of a network that end in a ReLU"):
        adapting(ITTA(), network(nn.Identity()), 3, source())
    with pytest.raises(UserError, match="itta needs a model with features and a head"):
        adapting(ITTA(), nn.Linear(2, 2), 3, source())
