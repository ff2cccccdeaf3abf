"""Pools, growing tables and Gram-Schmidt, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nn.prompts import (
    GrowingTable,
    PromptPool,
    attention_weights,
    cosines,
    gram_error,
    orthonormal_rows,
    uniform,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def pool_with_keys(*keys: list[float]) -> PromptPool:
    pool = PromptPool(len(keys), 2, len(keys[0]), 1.0, generator())
    pool.keys = nn.Parameter(torch.tensor(keys))
    return pool


def test_cosines_are_of_every_query_with_every_key() -> None:
    found = cosines(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [5.0, 5.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5**0.5], [0.5**0.5, 1.0]]))


def test_the_start_is_uniform_and_its_own() -> None:
    numbers = uniform((1000,), 0.01, generator())
    assert numbers.min() >= 0
    assert 0.0095 < numbers.max() < 0.01
    assert numbers.mean() == pytest.approx(0.005, abs=0.0005)
    assert torch.equal(numbers, uniform((1000,), 0.01, generator()))


def test_the_nearest_keys_are_chosen_best_first_whatever_their_length() -> None:
    pool = pool_with_keys([100.0, 0.0], [1.0, 1.0], [0.0, 0.1], [-1.0, 0.0])
    chosen, matches = pool.choose(torch.tensor([[2.0, 1.0], [-3.0, 1.0]]), 2)
    assert chosen.tolist() == [[1, 0], [3, 2]]
    expected = torch.tensor([[3 / 10**0.5, 2 / 5**0.5], [3 / 10**0.5, 1 / 10**0.5]])
    torch.testing.assert_close(matches, expected)


def test_frequent_prompts_are_chosen_less() -> None:
    """Distances 1 - cos are 0.4 and 0.2: 0.4 x 0.25 = 0.1 is less than 0.2 x 0.75 = 0.15."""
    pool = pool_with_keys([0.6, 0.8], [0.8, 0.6])
    query = torch.tensor([[1.0, 0.0]])
    assert pool.choose(query, 1)[0].tolist() == [[1]]
    chosen, matches = pool.choose(query, 1, torch.tensor([0.25, 0.75]))
    assert chosen.tolist() == [[0]]
    torch.testing.assert_close(matches, torch.tensor([[0.6]]))
    assert pool.choose(query, 1, torch.tensor([0.5, 0.5]))[0].tolist() == [[1]]


def test_a_vote_gives_all_the_same_prompts() -> None:
    pool = pool_with_keys([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    queries = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [2.0, 1.0, 3.0]])
    assert pool.choose(queries, 2)[0].tolist() == [[0, 1], [2, 1], [1, 0], [2, 0]]
    chosen, matches = pool.choose(queries, 2, vote=True)
    # Three votes for 0, three for 1, two for 2.
    assert chosen.tolist() == [[0, 1]] * 4
    torch.testing.assert_close(matches, F.normalize(queries)[:, :2])


def test_only_chosen_keys_and_prompts_learn() -> None:
    pool = pool_with_keys([1.0, 0.1], [0.1, 1.0], [-1.0, 0.0])
    chosen, matches = pool.choose(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), 1)
    (matches.sum() + pool(chosen).square().sum()).backward()
    assert pool.keys.grad is not None
    assert pool.prompts.grad is not None
    assert pool.keys.grad.any(1).tolist() == [True, False, False]
    assert pool.prompts.grad.flatten(1).any(1).tolist() == [True, False, False]


def test_chosen_prompts_stand_one_after_another() -> None:
    pool = PromptPool(3, 2, 4, 1.0, generator())
    tokens = pool(torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(tokens[0], torch.cat((pool.prompts[2], pool.prompts[0])))
    assert torch.equal(tokens[1], torch.cat((pool.prompts[1], pool.prompts[1])))


def gram_schmidt(earlier: Tensor, drawn: Tensor) -> Tensor:
    """The textbook's, one row after another."""
    basis: list[Tensor] = []
    for row in (*earlier, *drawn):
        rest = row.clone()
        for unit in basis:
            rest = rest - (rest @ unit) * unit
        basis.append(rest / rest.norm())
    return torch.stack(basis[len(earlier) :])


@pytest.mark.parametrize("n_earlier", [0, 1, 6])
def test_new_rows_are_those_of_gram_schmidt(n_earlier: int) -> None:
    earlier = drawn(n_earlier, 10).double()
    rows = orthonormal_rows(earlier, 4, generator())
    noise = torch.randn(4, 10, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(rows, gram_schmidt(earlier, noise))
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(rows @ earlier.T, torch.zeros(4, n_earlier, dtype=torch.float64))


def test_groups_are_orthogonal_each_for_itself() -> None:
    earlier = drawn(3, 5, 9)
    rows = orthonormal_rows(earlier, 4, generator())
    assert rows.shape == (3, 4, 9)
    assert rows.dtype == earlier.dtype
    for group, before in zip(rows, earlier, strict=True):
        torch.testing.assert_close(group @ group.T, torch.eye(4))
        torch.testing.assert_close(group @ before.T, torch.zeros(4, 5), atol=1e-5, rtol=0)


def test_where_there_is_no_room_new_rows_are_orthogonal_to_the_latest() -> None:
    earlier = drawn(7, 8)
    rows = orthonormal_rows(earlier, 3, generator())
    torch.testing.assert_close(rows @ rows.T, torch.eye(3))
    products = (rows @ earlier.T).abs().amax(0)
    assert (products[2:] < 1e-5).all()
    assert (products[:2] > 1e-3).all()


def test_earlier_rows_that_depend_on_each_other_do_no_harm() -> None:
    one = drawn(1, 6)
    rows = orthonormal_rows(torch.cat((one, 2 * one, torch.zeros(1, 6))), 3, generator())
    torch.testing.assert_close(rows @ rows.T, torch.eye(3))
    torch.testing.assert_close(rows @ one.T, torch.zeros(3, 1), atol=1e-5, rtol=0)


def test_more_rows_than_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows of 4 numbers"):
        orthonormal_rows(torch.empty(0, 4), 5, generator())


def test_the_error_of_a_gram_matrix() -> None:
    """R R^T - I has the entries 0, 1, 1 and 1."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    assert gram_error(rows).item() == pytest.approx(3**0.5)
    assert gram_error(rows, squared=True).item() == pytest.approx(3 / 4)
    both = gram_error(torch.stack((rows, torch.eye(2))))
    torch.testing.assert_close(both, torch.tensor([3**0.5, 0.0]))
    both.sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


def test_attention_weights_are_cosines_of_attended_queries() -> None:
    queries, attention, keys = drawn(5, 7), drawn(3, 4, 7) * 2, drawn(3, 4, 7) + 1
    weights = attention_weights(queries, attention, keys)
    assert weights.shape == (3, 5, 4)
    for g in range(3):
        for b in range(5):
            for m in range(4):
                expected = F.cosine_similarity(queries[b] * attention[g, m], keys[g, m], dim=0)
                torch.testing.assert_close(weights[g, b, m], expected)


def test_attention_that_sees_nothing_weighs_nothing() -> None:
    attention = torch.zeros(2, 3, requires_grad=True)
    weights = attention_weights(drawn(4, 3), attention, drawn(2, 3))
    weights.sum().backward()
    assert not weights.any()
    assert attention.grad is not None
    assert attention.grad.isfinite().all()


def grown() -> GrowingTable:
    table = GrowingTable(2, 3)
    for start in (0, 100):
        table.grow(torch.arange(start, start + 12.0).view(2, 2, 3))
    return table


def test_a_table_freezes_all_slices_but_the_latest() -> None:
    table = grown()
    assert len(table) == 4
    assert table().flatten()[[0, 11, 12, 23]].tolist() == [0, 11, 100, 111]
    assert [name for name, _ in table.named_parameters()] == ["latest"]
    table().sum().backward()
    assert table.latest.grad is not None
    assert torch.equal(table.latest.grad, torch.ones(2, 2, 3))
    with torch.no_grad():
        table.latest.add_(1)
    table.grow(torch.zeros(1, 2, 3))
    assert table().flatten()[[0, 11, 12, 23, 24]].tolist() == [0, 11, 101, 112, 0]
    assert len(table.latest) == 1
    assert not table.frozen.requires_grad


@pytest.mark.parametrize("slices", [0, 1, 3])
def test_a_table_restores_itself_whatever_its_size(slices: int) -> None:
    table, other = grown(), GrowingTable(2, 3)
    for _ in range(slices):
        other.grow(torch.zeros(5, 2, 3))
    model: Any = nn.ModuleDict({"table": other, "head": nn.Linear(2, 2)})
    model.load_state_dict({**model.state_dict(), **nn.ModuleDict({"table": table}).state_dict()})
    assert torch.equal(other(), table())
    assert torch.equal(other.frozen, table.frozen)
    assert other.latest.requires_grad
    with torch.no_grad():
        other.latest.zero_()
    assert table.latest.any()


def test_a_state_without_the_table_is_refused() -> None:
    with pytest.raises(RuntimeError, match="frozen"):
        grown().load_state_dict({})
