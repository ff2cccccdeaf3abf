"""The category-balanced memory, worked out by hand and beside plain lists."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from clbench.nn.category_memory import CategoryMemory


def offer(memory: CategoryMemory, number: int, label: int, uncertainty: float) -> None:
    """A sample that is its own number, with an entropy as a part of the largest one."""
    entropy = uncertainty * math.log(memory.n_classes)
    memory.add(torch.tensor([[number]]), [label], [entropy])


def kept(memory: CategoryMemory) -> list[int]:
    return [int(v) for v in memory.content()[0].flatten()]


def test_by_hand() -> None:
    """Four places for two classes, A = 0 and B = 1; s(x) = 1 / (1 + e^-x), s(1/4) = 0.562,
    s(1/2) = 0.622.
    """
    memory = CategoryMemory(4, 2)
    offer(memory, 0, 0, 0.5)  # A takes a free place
    offer(memory, 1, 0, 0.1)  # A takes another, its last
    # A is full: 0 has s(2/4) + 0.5 = 1.122, 1 has s(1/4) + 0.1 = 0.662, the newcomer 0.5 + 0.3.
    offer(memory, 2, 0, 0.3)
    assert kept(memory) == [1, 2]
    # 1 has s(2/4) + 0.1 = 0.722, 2 has s(1/4) + 0.3 = 0.862, the newcomer 1.4: it is worse.
    offer(memory, 3, 0, 0.9)
    assert kept(memory) == [1, 2]
    offer(memory, 4, 1, 0.2)
    offer(memory, 5, 1, 0.2)
    # B is full: of two that are as unsure the older one goes.
    offer(memory, 6, 1, 0.0)
    assert kept(memory) == [1, 2, 5, 6]
    # Ages: seven samples came, and each has aged once since it came itself.
    assert memory.content()[1].tolist() == [6 / 4, 5 / 4, 2 / 4, 1 / 4]


def test_a_small_class_takes_from_the_largest() -> None:
    """Five places for two classes: a share of 2.5 is exceeded with 3."""
    memory = CategoryMemory(5, 2)
    for number, (label, uncertainty) in enumerate([(0, 0.2), (0, 0.7), (0, 0.1), (1, 0.9)]):
        offer(memory, number, label, uncertainty)
    offer(memory, 4, 1, 0.9)
    assert kept(memory) == [0, 1, 2, 3, 4]
    # B has 2 < 2.5 and there is no place: the worst of A, number 1, has s(4/5) + 0.7 = 1.39.
    offer(memory, 5, 1, 0.6)
    assert kept(memory) == [0, 2, 3, 4, 5]
    # A has 2 < 2.5, B is the largest; its worst, 3, has s(3/5) + 0.9 = 1.55, the newcomer 1.5.
    offer(memory, 6, 0, 1.0)
    assert kept(memory) == [0, 2, 6, 4, 5]
    # The same with a newcomer that nobody is worse than: 4 has at most s(∞) + 0.9.
    memory = CategoryMemory(5, 2, timeliness=0.0)
    for number, label in enumerate([0, 0, 0, 1, 1]):
        offer(memory, number, label, 0.3)
    offer(memory, 5, 1, 0.3)
    assert kept(memory) == [0, 1, 2, 3, 4]


def plain_lists(
    offers: list[tuple[int, float]], size: int, n: int, weights: tuple[float, float]
) -> tuple[list[int], list[float]]:
    """As the published code goes about it: an age for each item, everything counted anew."""
    held: list[list[dict[str, float]]] = [[] for _ in range(n)]

    def badness(item: dict[str, float]) -> float:
        old = 1 / (1 + math.exp(-item["age"] / size))
        return weights[0] * old + weights[1] * item["entropy"] / math.log(n)

    for number, (label, entropy) in enumerate(offers):
        new = {"number": float(number), "entropy": entropy, "age": 0.0}
        total = sum(len(members) for members in held)
        if len(held[label]) < size / n and total < size:
            held[label].append(new)
        else:
            most = max(len(members) for members in held)
            small = len(held[label]) < size / n
            classes = [c for c in range(n) if len(held[c]) == most] if small else [label]
            pool = [(c, i) for c in classes for i in range(len(held[c]))]
            scores = [badness(held[c][i]) for c, i in pool]
            last = max(i for i, score in enumerate(scores) if score == max(scores))
            if scores[last] > badness(new):
                held[pool[last][0]].pop(pool[last][1])
                held[label].append(new)
        for members in held:
            for item in members:
                item["age"] += 1
    items = [item for members in held for item in members]
    return [int(item["number"]) for item in items], [item["age"] / size for item in items]


@pytest.mark.parametrize(("size", "n"), [(12, 4), (10, 4), (8, 20), (1, 3)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 1.0), (2.0, 0.0)])
def test_it_does_what_plain_lists_do(size: int, n: int, weights: tuple[float, float]) -> None:
    """On a stream whose labels cling together, in batches of unequal size."""
    rng = random.Random(size * n)
    labels = [
        min(n - 1, int(i / 40) % n if rng.random() < 0.7 else rng.randrange(n)) for i in range(300)
    ]
    offers = [(label, rng.random() * math.log(n)) for label in labels]
    memory = CategoryMemory(size, n, *weights)
    start = 0
    for width in [1, 7, 40, 2, 100, 150]:
        part = offers[start : start + width]
        numbers = torch.arange(start, start + width).view(-1, 1)
        memory.add(numbers, [label for label, _ in part], [entropy for _, entropy in part])
        start += width
        expected, ages = plain_lists(offers[:start], size, n, weights)
        assert kept(memory) == expected
        torch.testing.assert_close(memory.content()[1], torch.tensor(ages))
        assert len(memory) == len(expected) <= size


def test_what_is_put_back_goes_on_alike() -> None:
    def stream(memory: CategoryMemory, numbers: range) -> Tensor:
        for number in numbers:
            offer(memory, number, number % 3, (number * 7 % 11) / 11)
        return torch.cat([v.flatten() for v in memory.content()])

    memory, other = CategoryMemory(6, 3), CategoryMemory(6, 3)
    stream(memory, range(30))
    state = memory.state_dict()
    other.load_state_dict(state)
    expected = stream(memory, range(30, 60))
    assert torch.equal(stream(other, range(30, 60)), expected)
    empty = CategoryMemory(6, 3)
    other.load_state_dict(empty.state_dict())
    assert len(other) == 0
