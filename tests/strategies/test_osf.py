"""OSF: its projection and ranks by hand, and what an experience leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.text.decoders import Llama
from strategies.osf import OSF, Kept


def layers(strategy: Any) -> dict[str, Tensor]:
    """The weight of each decomposed layer, between experiences."""
    modules = dict(strategy.model.decoder.named_modules())
    return {name: modules[name].weight.detach().clone() for name in strategy._shapes}


def test_the_projection_by_hand() -> None:
    """W = diag(3, 2, 1), the largest kept: the first row of U_l, the first column of V_l go."""
    kept = Kept.of(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
    left = torch.tensor([[5.0, 6.0], [1.0, 2.0], [3.0, 4.0]])
    right = torch.tensor([[7.0, 1.0, 2.0], [8.0, 3.0, 4.0]])
    kept.project(left, right)
    assert torch.allclose(left, torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]))
    assert torch.allclose(right, torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]]))


def test_a_step_of_sgd_by_hand(instructions: Callable[..., Any]) -> None:
    """θ_l ← θ_l − lr P ∂L/∂θ_l, the gradients by autograd through U diag(S) V of a copy."""
    toy = instructions(epochs=1)
    strategy = toy.prepare(OSF(rank="constant", share=0.5, optimizer="sgd", lr=0.1))
    name = "model.layers.0.mlp.up_proj"
    weight = layers(strategy)[name]
    rank = min(weight.shape) // 2
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    leaves = [nn.Parameter(t) for t in (u[:, rank:], s[rank:], v[rank:])]
    batch = toy.batch(0, 0, 8)
    kept = (u[:, :rank] * s[:rank]) @ v[:rank]
    rebuilt = kept + (leaves[0] * leaves[1]) @ leaves[2]
    outputs = torch.func.functional_call(
        strategy.model, {f"decoder.{name}.weight": rebuilt}, (batch.inputs,)
    )
    toy.context().objective.loss(outputs, batch.targets).backward()
    du, ds, dv = (p.grad for p in leaves)
    new_u = u[:, rank:] - 0.1 * (du - u[:, :rank] @ u[:, :rank].T @ du)
    new_v = v[rank:] - 0.1 * (dv - dv @ v[:rank].T @ v[:rank])
    expected = kept + (new_u * (s[rank:] - 0.1 * ds)) @ new_v
    strategy.before(toy.stream.experiences[0])
    strategy.begin(1)
    strategy.update(strategy.loss(batch))
    strategy.after(toy.stream.experiences[0])
    assert strategy.ranks[name] == rank
    assert (expected - weight).norm() > 1e-4
    assert torch.allclose(layers(strategy)[name], expected, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_kept_singular_vectors_stay_and_the_rest_is_learned(
    instructions: Callable[..., Any], optimizer: Any
) -> None:
    """UₕᵀW = SₕVₕ and W Vₕᵀ = UₕSₕ, whatever Adam's scaling and weight decay do."""
    toy = instructions(epochs=2)
    strategy = toy.prepare(OSF(optimizer=optimizer, lr=0.01, weight_decay=0.1))
    for index in range(2):
        before = layers(strategy)
        toy.teach(strategy, index)
        for name, after in layers(strategy).items():
            u, s, v = torch.linalg.svd(before[name], full_matrices=False)
            rank = strategy.ranks[name]
            assert torch.allclose(u[:, :rank].T @ after, s[:rank, None] * v[:rank], atol=1e-5)
            assert torch.allclose(after @ v[:rank].T, u[:, :rank] * s[:rank], atol=1e-5)
            assert (after - before[name]).norm() > 1e-3


def test_everything_else_stays_to_the_bit_and_is_free_again(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions(epochs=1)
    strategy = toy.prepare(OSF())
    names = [n for n, _ in strategy.model.named_parameters()]
    decomposed = {f"decoder.{n}.weight" for n in strategy._shapes}
    before = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
    toy.teach(strategy, 0)
    after = dict(strategy.model.named_parameters())
    assert list(after) == names
    assert all(p.requires_grad for p in after.values())
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} == decomposed
    assert "decoder.lm_head.weight" not in decomposed


def test_what_was_learned_is_not_lost_when_the_layers_are_put_together(
    instructions: Callable[..., Any],
) -> None:
    toy = instructions(epochs=2)
    strategy = toy.prepare(OSF(lr=0.01))
    first = toy.stream.experiences[0]
    rows = toy.batch(0, 0, 6).inputs
    start = strategy.model(rows)
    strategy.before(first)
    assert torch.allclose(strategy.model(rows), start, atol=1e-4), "the parts are the whole"
    strategy.fit(strategy.material(first))
    learned = strategy.model(rows)
    strategy.after(first)
    assert torch.allclose(strategy.model(rows), learned, atol=1e-4)
    assert not torch.allclose(learned, start, atol=0.1)


def ranks(toy: Any, strategy: OSF, *experiences: int) -> list[dict[str, int]]:
    """Kept ranks of two layers in each experience."""
    one, found = toy.prepare(strategy), []
    for index in experiences:
        toy.teach(one, index)
        found.append({n.rpartition(".")[2]: r for n, r in one.ranks.items()})
    return found


def test_ranks_by_hand(instructions: Callable[..., Any]) -> None:
    """Layers of 16 x 16 and 40 x 16."""
    toy = instructions(epochs=1, language_model=Llama(width=16, depth=1, heads=2, inner=40))
    (found,) = ranks(toy, OSF(rank="constant", share=0.7), 0)
    assert (found["q_proj"], found["up_proj"]) == (11, 11)
    (found,) = ranks(toy, OSF(rank="constant", share=1.0), 0)
    assert (found["q_proj"], found["up_proj"]) == (15, 15), "something has to train"
    growing = ranks(toy, OSF(rank="growing", share=0.07), 0, 1, 2)
    assert [r["q_proj"] for r in growing] == [1, 1, 2]
    assert [r["up_proj"] for r in growing] == [1, 2, 5]
    # The only block has the mean importance, 1.
    (found,) = ranks(toy, OSF(rank="importance", share=0.5, min_share=0.25), 0)
    assert (found["q_proj"], found["down_proj"]) == (8, 8)


def test_importance_is_the_cosine_of_what_a_block_gets_and_gives(
    instructions: Callable[..., Any],
) -> None:
    model = Llama(width=16, depth=2, heads=2, inner=40, spread=0.3)
    toy = instructions(language_model=model)
    strategy = toy.prepare(OSF(importance_samples=1000))
    every = toy.stream.experiences[0].train.take(torch.arange(40))
    hidden = strategy.model.decoder.model(
        input_ids=every.inputs[:, [0, 1, 2, 4]].clamp(min=0), output_hidden_states=True
    ).hidden_states
    blocks = strategy.model.decoder.model.layers
    given = [hidden[0], hidden[1]]
    taken = [hidden[1], blocks[1](hidden[1], position_embeddings=_rotary(strategy, hidden[1]))]
    cosines = [
        nn.functional.cosine_similarity(a, b, -1).mean().item()
        for a, b in zip(given, taken, strict=True)
    ]
    found = strategy.importance(toy.stream.experiences[0])
    for block, cosine in enumerate(cosines):
        share = found[f"model.layers.{block}.self_attn.q_proj"]
        assert share == pytest.approx(2 * cosine / sum(cosines), abs=0.01)
    assert abs(cosines[0] - cosines[1]) > 0.05


def _rotary(strategy: Any, hidden: Tensor) -> Any:
    positions = torch.arange(hidden.shape[1])[None]
    return strategy.model.decoder.model.rotary_emb(hidden, positions)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UserError, match=r"min_share=0.9 is more than share=0.5"):
        OSF(share=0.5, min_share=0.9)
