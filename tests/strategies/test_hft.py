"""HFT: what trains is half to the count, what does not is the same to the bit."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from suite import composed, gradient_bases
from torch import Tensor, nn

from clbench.config import build
from clbench.errors import UserError
from clbench.nn.partition import Matrix, Part, partition
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy
from strategies.agem import AGEM
from strategies.derpp import DERpp
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.hft import HFT, choose

Make = Callable[..., Any]
D = 6
OPTIMIZERS = pytest.mark.parametrize(
    "base",
    [
        Finetune(lr=0.05, momentum=0.9, weight_decay=0.1),
        Finetune(lr=0.01, optimizer="adam", weight_decay=0.1),
        Finetune(lr=0.01, optimizer="adamw", weight_decay=0.1, clip=0.5, schedule="cosine"),
    ],
    ids=["sgd", "adam", "adamw"],
)


class Columns(nn.Module):
    """GPT-2's linear layer: the weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    """A transformer block with the names of GPT-2 or of timm's ViT."""

    def __init__(self, gpt: bool) -> None:
        super().__init__()
        linear: Callable[[int, int], nn.Module] = Columns if gpt else nn.Linear
        self.norms = ("ln_1", "ln_2") if gpt else ("norm1", "norm2")
        self.fused, self.out = ("c_attn", "c_proj") if gpt else ("qkv", "proj")
        self.up, self.down = ("c_fc", "c_proj") if gpt else ("fc1", "fc2")
        for name in self.norms:
            self.add_module(name, nn.LayerNorm(D))
        self.attn = nn.ModuleDict({self.fused: linear(D, 3 * D), self.out: linear(D, D)})
        self.mlp = nn.ModuleDict({self.up: linear(D, 2 * D), self.down: linear(2 * D, D)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn[self.fused](self.get_submodule(self.norms[0])(x)).chunk(3, -1)
        x = x + self.attn[self.out]((q @ k.mT / D**0.5).softmax(-1) @ v)
        hidden = self.mlp[self.up](self.get_submodule(self.norms[1])(x))
        return x + self.mlp[self.down](nn.functional.gelu(hidden))


class Transformer(nn.Module):
    """Reads the rows of the toy's images as words."""

    def __init__(self, gpt: bool, blocks: int = 2) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6, D) / 10)
        self.stack = "h" if gpt else "blocks"
        self.add_module(self.stack, nn.Sequential(*(Block(gpt) for _ in range(blocks))))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule(self.stack)(x.flatten(0, 1).float() + self.position)
        outputs: Tensor = self.head(self.norm(x).mean(1))
        return outputs


class ConvNet(nn.Module):
    """Two blocks with the names of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, bias=False)
        for name in ("layer1", "layer2"):
            block = nn.Sequential()
            for i in (1, 2):
                block.add_module(f"conv{i}", nn.Conv2d(4, 4, 3, padding=1, bias=False))
                block.add_module(f"bn{i}", nn.BatchNorm2d(4))
            self.add_module(name, nn.Sequential(block))
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for name in ("layer1", "layer2"):
            x = x + self.get_submodule(name)(x).relu()
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


def model(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ConvNet() if kind == "resnet" else Transformer(kind == "gpt2")


KINDS = pytest.mark.parametrize("kind", ["gpt2", "vit", "resnet"])


def values(module: nn.Module, matrix: Matrix) -> list[Tensor]:
    parameters = dict(module.named_parameters())
    return [part.of(parameters[part.name].detach()).clone() for part in matrix.parts]


def rows(blocks: int, **sizes: int) -> list[Matrix]:
    """Matrices of so many blocks."""
    return [
        Matrix(f"{b}.{category}.{i}", str(b), category, (Part(f"{b}.{category}.{i}"),))
        for b in range(blocks)
        for category, size in sizes.items()
        for i in range(size)
    ]


def drawn(matrices: list[Matrix], level: str, ratio: float = 0.5, seed: int = 0) -> set[str]:
    return choose(matrices, level, ratio, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(20))
def test_of_each_category_in_each_block_half(seed: int) -> None:
    """Llama's: 2 of 4, 1 of 2, and of 3 either 1 or 2, which each half of the blocks has."""
    matrices = rows(8, attention=4, ffn=3, norm=2)
    chosen = drawn(matrices, "category", seed=seed)
    found = Counter((m.block, m.category) for m in matrices if m.name in chosen)
    assert all(found[str(b), "attention"] == 2 and found[str(b), "norm"] == 1 for b in range(8))
    assert Counter(found[str(b), "ffn"] for b in range(8)) == {1: 4, 2: 4}
    assert len(chosen) == len(matrices) / 2


@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_an_odd_number_is_rounded_up_or_down(level: str) -> None:
    matrices = rows(5, ffn=3)
    sizes = Counter(len(drawn(matrices, level, seed=seed)) for seed in range(400))
    expected = {6, 9} if level == "layer" else {7, 8}
    assert sizes.keys() == expected
    assert abs(sizes[max(expected)] - 200) < 4 * (400 / 4) ** 0.5


@pytest.mark.parametrize("level", ["category", "layer", "model"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_every_matrix_has_the_same_chance(level: str, ratio: float) -> None:
    matrices = rows(4, attention=4, ffn=3, norm=1)
    seen = Counter(name for seed in range(1000) for name in drawn(matrices, level, ratio, seed))
    bound = 4.5 * (1000 * ratio * (1 - ratio)) ** 0.5
    assert all(abs(seen[m.name] - 1000 * ratio) < bound for m in matrices)


def test_layers_are_whole_and_models_are_free() -> None:
    matrices = rows(6, attention=4, ffn=3)
    layers = Counter(m.block for m in matrices if m.name in drawn(matrices, "layer"))
    assert sorted(layers.values()) == [7, 7, 7]
    assert len(drawn(matrices, "model")) == 21
    per_block = {
        sum(m.name in drawn(matrices, "model", seed=s) for m in matrices if m.block == "0")
        for s in range(50)
    }
    assert len(per_block) > 3


@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_none_and_all(level: str) -> None:
    matrices = rows(3, attention=4, ffn=3)
    assert drawn(matrices, level, 0.0) == set()
    assert drawn(matrices, level, 1.0) == {m.name for m in matrices}


@KINDS
@OPTIMIZERS
@pytest.mark.parametrize("level", ["category", "layer", "model"])
def test_the_frozen_half_is_the_same_to_the_bit(
    bench: Make, kind: str, base: Finetune, level: Any
) -> None:
    one = bench(model(kind), epochs=2)
    hft = one.prepare(HFT(base=base, level=level))
    matrices = partition(hft.model)
    outside = {n for n, _ in hft.model.named_parameters()}
    outside -= {part.name for m in matrices for part in m.parts}
    for experience in range(3):
        before = {m.name: values(hft.model, m) for m in matrices}
        rest = {n: p.detach().clone() for n, p in hft.model.named_parameters() if n in outside}
        one.teach(hft, experience)
        assert 0 < len(hft.trained) < len(matrices)
        for m in matrices:
            same = [
                torch.equal(a, b) for a, b in zip(before[m.name], values(hft.model, m), strict=True)
            ]
            assert not any(same) if m.name in hft.trained else all(same), m.name
        assert outside
        assert not any(torch.equal(hft.model.get_parameter(n), p) for n, p in rest.items())


@KINDS
def test_no_state_for_what_is_frozen(bench: Make, kind: str) -> None:
    """AdamW keeps two numbers for each number that trains, and none else."""
    one = bench(model(kind))
    hft = one.prepare(HFT(base=Finetune(lr=0.01, optimizer="adamw")))
    first = one.stream.experiences[0]
    hft.before(first)
    hft.fit(first.train)
    matrices = partition_of(hft)
    trained = sum(
        v.numel() for m in matrices if m.name in hft.trained for v in values(hft.model, m)
    )
    blocks = sum(v.numel() for m in matrices for v in values(hft.model, m))
    everything = sum(p.numel() for p in hft.model.parameters())
    optimizer = hft.base._optimizer
    kept = [t for s in optimizer.state.values() for t in s.values() if t.numel() > 1]
    assert sum(t.numel() for t in kept) == 2 * (everything - blocks + trained)
    assert abs(trained / blocks - 0.5) < 0.1
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state)


def partition_of(hft: HFT) -> list[Matrix]:
    return hft._matrices


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
@OPTIMIZERS
def test_the_trained_half_goes_where_the_base_would_take_it(
    bench: Make, kind: str, base: Finetune
) -> None:
    """A plain loop with the whole optimizer, its gradient and its weights put back by hand."""
    one = bench(model(kind), epochs=2)
    hft = one.prepare(HFT(base=base))
    plain = one.prepare(base)
    one.teach(hft, 0)
    frozen = [m for m in partition(plain.model) if m.name not in hft.trained]
    kept = [values(plain.model, m) for m in frozen]
    parameters = dict(plain.model.named_parameters())
    train = one.stream.experiences[0].train
    plain.begin(steps=2 * 8)
    for batch in plain.context.batches(train):
        plain._optimizer.zero_grad()
        plain.loss(batch).backward()
        for m in frozen:
            for part in m.parts:
                part.of(parameters[part.name].grad).zero_()
        plain.descend()
        with torch.no_grad():
            for m, old in zip(frozen, kept, strict=True):
                for part, value in zip(m.parts, old, strict=True):
                    part.of(parameters[part.name]).copy_(value)
    for name, parameter in hft.model.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "base",
    [Finetune(momentum=0.9), DERpp(), EWC(ewc_lambda=1), AGEM(lr=0.05, optimizer="adamw")],
    ids=lambda base: type(base).__name__,
)
@KINDS
def test_all_trained_it_is_its_base_bit_for_bit(
    bench: Make, same_weights: Callable[..., bool], base: GradientStrategy, kind: str
) -> None:
    one = bench(model(kind), epochs=2)
    whole = one.learned(HFT(base=base, ratio=1.0))
    assert same_weights(whole.model, one.learned(base).model)
    assert not same_weights(whole.model, one.learned(HFT(base=base)).model)


@pytest.mark.parametrize("name", gradient_bases())
def test_around_any_gradient_strategy(bench: Make, name: str) -> None:
    node = composed("strategy=hft", f"strategy@strategy.base={name}")["strategy"]
    hft = build(node, HFT, "strategy")
    hft.check(ToyScenario())
    one = bench(epochs=2)
    hft = one.prepare(hft)
    matrix = partition(hft.model)[0]
    frozen = 0
    for experience in range(3):
        before = values(hft.model, matrix)
        one.teach(hft, experience)
        same = [torch.equal(a, b) for a, b in zip(before, values(hft.model, matrix), strict=True)]
        frozen += not hft.trained
        assert any(same) != bool(hft.trained)
    assert 0 < frozen < 3
    assert hft.memory_samples == hft.base.memory_samples


def test_replayed_exemplars_reach_the_base(bench: Make) -> None:
    """The wrapper learns from what its base would learn from."""
    one = bench(epochs=1)
    node = composed("strategy=hft", "strategy@strategy.base=icarl")["strategy"]
    hft = one.learned(build(node, HFT, "strategy"), 0)
    second = one.stream.experiences[1]
    assert len(hft.material(second)) == len(second.train) + hft.memory_samples > len(second.train)


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_projections_and_norms_see_no_frozen_gradient(bench: Make, kind: str) -> None:
    """Neither backward() nor torch.autograd.grad() fills a frozen piece of a fused tensor."""
    one = bench(model(kind))
    hft = one.prepare(HFT(base=AGEM()))
    hft.before(one.stream.experiences[0])
    hft.begin(steps=1)
    batch = one.batch(0, 0, 10)
    parameters = hft.base.trainable()
    by_name = {id(p): n for n, p in hft.model.named_parameters()}
    hft.loss(batch).backward()
    other = torch.autograd.grad(hft.loss(batch), parameters)
    gradients = {by_name[id(p)]: (p.grad, g) for p, g in zip(parameters, other, strict=True)}
    partly = 0
    for m in partition_of(hft):
        for part in m.parts:
            for gradient in gradients.get(part.name, ()):
                assert part.of(gradient).any() == (m.name in hft.trained)
                partly += m.name not in hft.trained
    assert partly


def test_after_the_experience_all_is_free_and_known_to_the_base(bench: Make) -> None:
    """A Fisher information covers frozen weights: the next half is another."""
    one = bench(model("vit"), epochs=1)
    hft = one.learned(HFT(base=EWC()), 0)
    assert all(p.requires_grad for p in hft.model.parameters())
    frozen = [m for m in partition_of(hft) if m.name not in hft.trained and m.category == "ffn"]
    curvature = dict(zip(hft.base.anchor.names, hft.base.anchor.curvature(), strict=True))
    assert frozen
    assert all(curvature[part.name].any() for m in frozen for part in m.parts)


def test_what_the_user_froze_stays_frozen(bench: Make) -> None:
    start = model("vit")
    start.get_submodule("blocks.0").requires_grad_(False)
    one = bench(start, epochs=1)
    hft = one.learned(HFT(base=Finetune()))
    for name, parameter in hft.model.named_parameters():
        assert parameter.requires_grad != name.startswith("blocks.0.")
        if name.startswith("blocks.0."):
            assert torch.equal(parameter, start.get_parameter(name))


def test_drawn_anew_for_each_experience_and_logged(
    bench: Make, caplog: pytest.LogCaptureFixture
) -> None:
    one = bench(model("vit"), epochs=1)
    caplog.set_level(logging.INFO, "strategies.hft")
    hft = one.prepare(HFT(base=Finetune()))
    chosen = []
    for experience in range(3):
        one.teach(hft, experience)
        chosen.append(tuple(hft.trained))
    assert len(set(chosen)) == 3
    assert [
        ", ".join(names) in line for names, line in zip(chosen, caplog.messages, strict=True)
    ] == [True] * 3
    again = one.learned(HFT(base=Finetune()))
    assert tuple(again.trained) == chosen[2]


@pytest.mark.parametrize("statistics", ["follow", "keep"])
def test_statistics_of_frozen_batch_norms(bench: Make, statistics: Any) -> None:
    one = bench(model("resnet"), epochs=1)
    hft = one.prepare(HFT(base=Finetune(), statistics=statistics))
    before = copy.deepcopy(hft.model)
    first = one.stream.experiences[0]
    hft.before(first)
    hft.fit(first.train)
    norms = [m.name for m in partition_of(hft) if m.category == "norm"]
    frozen = [name for name in norms if name not in hft.trained]
    assert len(frozen) == len(norms) / 2
    for name in norms:
        still = torch.equal(
            before.get_submodule(name).running_mean, hft.model.get_submodule(name).running_mean
        )
        assert still == (statistics == "keep" and name in frozen)
    hft.begin(steps=1)
    for name in norms:
        training = hft.model.get_submodule(name).training
        assert training != (statistics == "keep" and name in frozen)


def test_half_a_category_by_size_where_matrices_have_one_size(bench: Make) -> None:
    hft = bench(model("vit")).prepare(HFT(base=Finetune()))
    attention = [m for m in partition_of(hft) if m.category == "attention"]
    chosen = drawn(partition_of(hft), "category")
    sizes = [sum(v.numel() for v in values(hft.model, m)) for m in attention]
    half = sum(s for m, s in zip(attention, sizes, strict=True) if m.name in chosen)
    assert half == sum(sizes) / 2


def test_what_has_no_meaning_is_refused(bench: Make, normalised: nn.Module) -> None:
    with pytest.raises(UserError, match=r"ratio=1\.5"):
        HFT(base=Finetune(), ratio=1.5)
    with pytest.raises(UserError, match="no blocks"):
        bench(normalised).prepare(HFT(base=Finetune()))
