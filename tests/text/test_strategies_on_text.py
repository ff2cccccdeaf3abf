"""Methods that know nothing of text, where samples are sequences: against loops by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench import protocol
from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.nn.fisher import Fisher, diagonal_fisher
from clbench.nn.partition import partition
from clbench.nn.sample_gradients import mean_gradient_powers
from clbench.samples import Samples
from clbench.state import capture
from clbench.testing import ToyInstructions
from clbench.text.encoding import IGNORED
from clbench.text.language_model import LanguageModel
from clbench.types import Context, Split, Strategy, Stream
from strategies.der import DER
from strategies.derpp import DERpp
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.hft import HFT
from strategies.l2_anchor import L2Anchor
from strategies.lwf import LwF
from strategies.refresh import Refresh
from strategies.replay import Replay

pytest.importorskip("transformers", reason="the extra `text` is not installed")

TOY = ToyInstructions()


def start(seed: int = 0) -> tuple[LanguageModel, Stream, Context]:
    stream = TOY.stream(Split.EVALUATE, seed)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        model = TOY.model(seed, stream)
    assert isinstance(model, LanguageModel)
    context = Context(
        device=torch.device("cpu"),
        seed=seed,
        scenario=TOY,
        objective=TOY.objective(),
        transform=stream.transform,
        n_outputs=stream.n_outputs,
        stream_batches=stream.batches(TOY),
    )
    return model.eval(), stream, context


def learned(strategy: Any, experiences: int = 1) -> tuple[Any, Stream]:
    model, stream, context = start()
    strategy.setup(model, context)
    for experience in stream.experiences[:experiences]:
        strategy.learn(experience)
    return strategy, stream


def some(stream: Stream, count: int = 6) -> Samples:
    train = stream.experiences[0].train
    assert train is not None
    return train.subset(torch.arange(count))


def by_hand(model: LanguageModel, samples: Samples, kind: str) -> Mapping[str, Tensor]:
    """One backward pass for each sample: the square of the gradient of log p of its answer."""
    named = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in named.items()}
    for i in range(len(samples)):
        batch = samples.take(torch.tensor([i]))
        model.zero_grad()
        outputs = model(batch.inputs)[0]
        known = batch.targets[0] != IGNORED
        log_p = outputs[known].log_softmax(1).gather(1, batch.targets[0][known, None]).sum()
        log_p.backward()
        weight = log_p.exp().detach() if kind == "weighted" else 1.0
        for name, p in named.items():
            assert p.grad is not None
            totals[name] += weight * p.grad.square()
    return {name: total / len(samples) for name, total in totals.items()}


@pytest.mark.parametrize("kind", ["empirical", "weighted"])
@pytest.mark.parametrize("tied", [False, True])
def test_fisher_information_of_answers_is_that_of_a_loop(kind: Fisher, tied: bool) -> None:
    """Also where a table of embeddings serves twice, so that no formula fits."""
    model, stream, _ = start()
    if tied:
        decoder: Any = model.decoder
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    samples = some(stream)
    found = diagonal_fisher(model, samples, kind, batch_size=4)
    expected = by_hand(model, samples, kind)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-8), name


def test_fisher_information_of_batches_is_of_their_mean_gradient() -> None:
    model, stream, _ = start()
    samples = some(stream, 4)
    found = diagonal_fisher(model, samples, "batch", batch_size=2)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for positions in ([0, 1], [2, 3]):
        model.zero_grad()
        batch = samples.take(torch.tensor(positions))
        outputs = model(batch.inputs).log_softmax(2)
        log_p = [
            outputs[b, t, y]
            for b, row in enumerate(batch.targets.tolist())
            for t, y in enumerate(row)
            if y != IGNORED
        ]
        (torch.stack(log_p).sum() / 2).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            total[name] += p.grad.square() / 2
    for name, value in found.items():
        assert torch.allclose(value, total[name], rtol=1e-4, atol=1e-8), name


def test_the_exact_fisher_information_is_met_on_average() -> None:
    """Σ over answer tokens of Σ_v p(v) (∂ log p(v))², in closed form for the final layer's bias.

    Many copies of one sample, each with a draw of its own.
    """
    model, stream, _ = start()
    many = Samples(some(stream).source, torch.zeros(4000, dtype=torch.int64), stream.transform)
    decoder: Any = model.decoder
    decoder.lm_head.bias = torch.nn.Parameter(torch.zeros(stream.n_outputs))
    found = diagonal_fisher(model, many, "exact", names=["decoder.lm_head.bias"])
    p = model(many.take(torch.tensor([0])).inputs)[0].softmax(1)
    expected = (p * (1 - p)).sum(0)
    total = found["decoder.lm_head.bias"]
    assert total.sum() == pytest.approx(expected.sum().item(), rel=0.05)
    assert torch.allclose(total, expected, atol=0.05)


def test_magnitudes_of_gradients_of_sequences() -> None:
    """As MAS wants them: of ‖h‖², by formulas for embeddings and norms, against a loop."""
    model, stream, _ = start()
    samples = some(stream, 3)
    found = mean_gradient_powers(model, samples, lambda h, _: [2 * h], power=1)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(3):
        model.zero_grad()
        model(samples.take(torch.tensor([i])).inputs).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            expected[name] += p.grad.abs() / 3
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-6), name


def test_der_compares_the_logits_of_answer_tokens() -> None:
    """Its second term, worked out beside it on what its memory will hand out."""
    strategy, stream = learned(DER(alpha=0.7))
    train = stream.experiences[1].train
    assert train is not None
    batch = train.take(torch.arange(4))
    generator = strategy.memory._recall
    state = generator.get_state()
    loss = strategy.loss(batch)
    generator.set_state(state)
    recalled = strategy.memory.draw(strategy.context.memory_batch_size)
    known = recalled.targets != IGNORED
    now, then = strategy.model(recalled.inputs)[known], recalled.extras["logits"][known]
    outputs = strategy.model(batch.inputs)
    plain = F.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    assert loss.item() == pytest.approx(
        (plain + 0.7 * (now - then).square().mean()).item(), rel=1e-5
    )
    assert not then.isnan().any()
    assert recalled.extras["logits"].shape[1:] == (TOY_ANSWER, stream.n_outputs)


#: A letter and the end token.
TOY_ANSWER = 2


def test_lwf_distils_the_tokens_of_new_answers() -> None:
    strategy, stream = learned(LwF(lwf_lambda=2.0, temperature=3.0))
    experience = stream.experiences[1]
    strategy.before(experience)
    assert experience.train is not None
    batch = experience.train.take(torch.arange(4))
    with torch.no_grad():
        strategy.model.decoder.lm_head.weight.mul_(1.1)
    outputs, answers = strategy.model(batch.inputs), strategy.teacher(batch.inputs)
    known = batch.targets != IGNORED
    p = (answers[known] / 3).softmax(1)
    log_q = (outputs[known] / 3).log_softmax(1)
    divergence = (p * (p.log() - log_q)).sum(1).mean()
    plain = F.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
    assert divergence > 1e-4
    assert strategy.loss(batch).item() == pytest.approx((plain + 2 * divergence).item(), rel=1e-5)


def test_hft_keeps_half_of_the_matrices_of_a_llama_to_the_bit() -> None:
    model, stream, context = start()
    strategy = HFT(base=Finetune())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    strategy.setup(model, context)
    strategy.learn(stream.experiences[0])
    categories = {m.category for m in partition(model)}
    assert categories == {"attention", "ffn", "norm"}
    trained = set(strategy.trained)
    for name, p in model.named_parameters():
        module = name.removesuffix(".weight")
        inside = ".layers." in name
        assert torch.equal(p, before[name]) == (inside and module not in trained), name


def same(one: Strategy, other: Strategy) -> bool:
    (a, _), (b, _) = learned(one, 2), learned(other, 2)
    left, right = (capture(x)["model"] for x in (a, b))
    return all(torch.equal(left[name], right[name]) for name in left)


def test_limits_in_which_methods_are_fine_tuning_hold_on_text_too() -> None:
    assert same(EWC(ewc_lambda=0.0), Finetune())
    assert same(LwF(lwf_lambda=0.0), Finetune())
    assert same(DERpp(alpha=0.0, beta=0.0), Finetune())
    assert not same(Replay(), Finetune())
    refreshed, _ = learned(Refresh(base=Finetune(), gamma=0.0), 2)
    plain, _ = learned(Finetune(), 2)
    for p, q in zip(refreshed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_l2_anchor_holds_everything_that_trains() -> None:
    """½ · 2 l2_lambda ‖θ − θ*‖² beside the loss of the answers; no head is treated apart."""
    strategy, stream = learned(L2Anchor(l2_lambda=0.3))
    train = stream.experiences[1].train
    assert train is not None
    batch = train.take(torch.arange(4))
    plain = TOY.objective().loss(strategy.model(batch.inputs), batch.targets)
    assert strategy.loss(batch).item() == pytest.approx(plain.item(), rel=1e-4)
    with torch.no_grad():
        for p in strategy.model.parameters():
            p += 0.01
    count = sum(p.numel() for p in strategy.model.parameters())
    plain = TOY.objective().loss(strategy.model(batch.inputs), batch.targets)
    expected = plain.item() + 0.3 * count * 0.01**2
    assert strategy.loss(batch).item() == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match=r"Set outputs=softmax"):
        L2Anchor(outputs="sigmoid").check(TOY)


def test_a_memory_by_class_needs_one_label_a_sample() -> None:
    with pytest.raises(UserError, match="selection=class_balanced needs one label"):
        learned(Replay(selection="class_balanced"))


def test_bf16_runs() -> None:
    conditions = Conditions(device="cpu", threads=1, precision="bf16")
    assert protocol.run(TOY, Finetune(), conditions).status == "complete"
