"""The reconstruction of NHL: its rule by hand and by a loop, its modulation by hand."""

from __future__ import annotations

import math

import pytest
import torch
from adapting import adapting, answers_without_a_trace, unlabelled
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.backbones import CifarResNet, ConvNet, ResNet18
from clbench.nn.batch_statistics import normalise_by_batch
from clbench.nn.heads import classifier
from strategies.nhl import NHL, HebbianConv, first_convolution


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    """Two blocks of convolution and batch norm, three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, 3),
        ).eval()


def images(n: int = 8) -> Tensor:
    return random(n, 2, 8, 8)


def shown(conv: nn.Conv2d, x: Tensor, lr: float, temperature: float) -> Tensor:
    """The filters after one look."""
    layer = HebbianConv(conv, lr, temperature)
    layer.learning = True
    layer(x)
    return layer.conv.weight.detach()


def test_one_patch_by_hand() -> None:
    """x = (3, 4) and filters (2, 0), (0, 5): cosines 0.6 and 0.8."""
    conv = nn.Conv2d(2, 2, 1)
    conv.weight.data = torch.tensor([[2.0, 0.0], [0.0, 5.0]]).view(2, 2, 1, 1)
    weight = shown(conv, torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), 0.5, 0.4)
    one, two = math.exp(0.6 / 0.4), math.exp(0.8 / 0.4)
    y = one / (one + two), two / (one + two)
    first = torch.tensor([1.0, 0.5 * y[0] * 0.8])
    second = torch.tensor([0.5 * y[1] * 0.6, 1.0])
    expected = torch.stack((2 * first / first.norm(), 5 * second / second.norm()))
    torch.testing.assert_close(weight.view(2, 2), expected)


@pytest.mark.parametrize("kernel", [(3, 2, 1), (2, 2, 0), (3, 1, 0)])
def test_all_patches_by_a_loop(kernel: tuple[int, int, int]) -> None:
    size, stride, padding = kernel
    conv, x = nn.Conv2d(2, 3, size, stride, padding), images(3)
    old = conv.weight.detach().clone().flatten(1)
    rows, lengths = F.normalize(old), old.norm(dim=1)
    change, count = torch.zeros_like(rows), 0
    for image in F.unfold(x, size, stride=stride, padding=padding):
        for patch in image.T:
            patch = patch / patch.norm()
            u = rows @ patch
            y = (u / 0.3).softmax(0)
            for k in range(3):
                change[k] += y[k] * (patch - u[k] * rows[k])
            count += 1
    expected = F.normalize(rows + 0.2 * change / count) * lengths[:, None]
    torch.testing.assert_close(shown(conv, x, 0.2, 0.3).flatten(1), expected)


def test_black_patches_teach_nothing() -> None:
    conv = nn.Conv2d(2, 3, 3)
    before = conv.weight.detach().clone()
    torch.testing.assert_close(shown(conv, torch.zeros(2, 2, 8, 8), 0.2, 0.3), before)


def test_without_rates_it_is_batch_normalisation() -> None:
    reference = network()
    normalise_by_batch(reference)
    strategy = adapting(NHL(lr=0.0, hebbian_lr=0.0), network(), 3)
    for seed in range(3):
        batch = unlabelled(random(8, 2, 8, 8, seed=seed))
        torch.testing.assert_close(strategy.adapt(batch), reference(batch.inputs))


def test_the_modulation_by_hand() -> None:
    """∂H/∂z_k = −p_k (ln p_k + H) for logits z = gain · u + shift, and one step of SGD."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Flatten())
    model[0].weight.data = torch.eye(2).view(2, 2, 1, 1)
    strategy = adapting(NHL(lr=0.1, optimizer="sgd", momentum=0.0, hebbian_lr=0.0), model, 2)
    u = torch.tensor([1.0, 0.5])
    p = u.softmax(0)
    h = -(p * p.log()).sum()
    slope = -p * (p.log() + h)
    gain, shift = 1 - 0.1 * slope * u, -0.1 * slope
    answer = strategy.adapt(unlabelled(u.view(1, 2, 1, 1)))
    torch.testing.assert_close(answer[0], gain * u + shift)


def test_hebb_then_entropy_then_the_answer() -> None:
    """The same three steps written out on a network without batch norm."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
    strategy = adapting(
        NHL(lr=0.5, optimizer="sgd", momentum=0.0, hebbian_lr=0.3, temperature=0.2), model, 3
    )
    x = images()
    answer = strategy.adapt(unlabelled(x))
    first, *_, last = model
    assert isinstance(first, nn.Conv2d)
    taught = F.conv2d(x, shown(first, x, 0.3, 0.2), first.bias, 2).detach()
    gain = torch.ones(3, 1, 1, requires_grad=True)
    shift = torch.zeros(3, 1, 1, requires_grad=True)

    def answered() -> Tensor:
        logits: Tensor = last((gain * taught + shift).tanh().flatten(1))
        return logits

    log_p = answered().log_softmax(1)
    (-(log_p.exp() * log_p).sum(1).mean()).backward()
    assert gain.grad is not None
    assert shift.grad is not None
    with torch.no_grad():
        gain -= 0.5 * gain.grad
        shift -= 0.5 * shift.grad
    torch.testing.assert_close(answer, answered().detach())


def test_only_the_first_filters_and_the_modulation_change() -> None:
    strategy = adapting(NHL(hebbian_lr=0.1, lr=0.1), network(), 3)
    before = {k: v.clone() for k, v in strategy.model.state_dict().items()}
    strategy.adapt(unlabelled(images()))
    after = strategy.model.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed == {"0.conv.weight", "1.1.gain", "1.1.shift"}
    torch.testing.assert_close(
        after["0.conv.weight"].flatten(1).norm(dim=1),
        before["0.conv.weight"].flatten(1).norm(dim=1),
    )


def test_the_modulation_is_behind_a_batch_norm_that_would_undo_it() -> None:
    assert first_convolution(network()) == ("0", "1")
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3))
    assert first_convolution(plain) == ("0", "2")
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))
    assert first_convolution(grouped) == ("0", "0")


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (ConvNet(), ("features.blocks.0.0", "features.blocks.0.1")),
        (CifarResNet(), ("features.conv1", "features.bn1")),
        (ResNet18(stem="imagenet"), ("features.conv1", "features.bn1")),
    ],
)
def test_the_suite_s_backbones(backbone: ConvNet, expected: tuple[str, str]) -> None:
    model = classifier(backbone, (3, 32, 32), 3)
    strategy = adapting(NHL(), model, 3)
    assert list(strategy.facts().values())[1:] == list(expected)
    assert strategy.adapt(unlabelled(random(2, 3, 32, 32))).isfinite().all()


def test_a_vision_transformer_s_patches_are_a_convolution() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, num_classes=3, embed_dim=8, depth=1, num_heads=2
    )
    strategy = adapting(NHL(hebbian_lr=0.1), model, 3)
    assert strategy.facts()["modulated_behind"] == "patch_embed.proj"
    start = strategy.predict(unlabelled(random(4, 3, 8, 8)))
    assert not torch.equal(strategy.adapt(unlabelled(random(4, 3, 8, 8))), start)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "this model has none"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), "'0' is grouped"),
    ],
)
def test_models_without_such_a_layer_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapting(NHL(), model, 2)


def test_predict_leaves_no_trace_and_reset_forgets() -> None:
    strategy = adapting(NHL(hebbian_lr=0.1, lr=0.1), network(), 3)
    batch = unlabelled(images())
    fresh = answers_without_a_trace(strategy, batch)
    first = [strategy.adapt(batch) for _ in range(3)]
    assert not torch.equal(answers_without_a_trace(strategy, batch), fresh)
    strategy.reset()
    assert torch.equal(answers_without_a_trace(strategy, batch), fresh)
    again = [strategy.adapt(batch) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
