"""A fixed budget of stored samples: who is kept, how often, and what comes back."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, get_args

import pytest
import torch
from scipy import stats
from torch import Tensor

from clbench.nn.memory import Memory, Selection
from clbench.nn.transforms import Identity, ImageTransform, Transform
from clbench.samples import Batch
from clbench.testing import ToyScenario
from clbench.types import Context

SELECTIONS: tuple[Selection, ...] = get_args(Selection)
#: A right program fails a test of a distribution once in so many seeds; the seeds are fixed.
SIGNIFICANCE = 1e-3


def context(seed: int = 0, transform: Transform | None = None) -> Context:
    scenario = ToyScenario()
    return Context(
        device=torch.device("cpu"),
        seed=seed,
        scenario=scenario,
        objective=scenario.objective(),
        transform=transform or Identity(),
        n_outputs=6,
    )


def batch(ids: Sequence[int], labels: Sequence[int]) -> Batch:
    """Samples whose stored value is their id."""
    raw = torch.tensor(ids, dtype=torch.float32).unsqueeze(1)
    return Batch(raw, torch.tensor(labels), raw, torch.tensor(ids))


def offer(memory: Memory, labels: Sequence[int], size: int = 7) -> Memory:
    """Offers samples 0, 1, 2, ... with these labels in batches; their ids are kept beside them."""
    for start in range(0, len(labels), size):
        ids = range(start, min(start + size, len(labels)))
        part = batch(ids, [labels[i] for i in ids])
        memory.add(part, {"twice": 2 * part.raw, "id": part.index})
    return memory


def kept(memory: Memory) -> list[int]:
    return sorted(memory.raw.flatten().int().tolist())


def counts(memory: Memory) -> dict[int, int]:
    return dict(sorted(Counter(memory.targets.tolist()).items()))


def p_value_of_equal_chances(included: Tensor, repeats: int) -> float:
    """Whether items were included equally often by draws without replacement.

    Inclusions of one draw exclude each other, which shrinks the chi-square statistic by
    (1 - share) n / (n - 1), share being the part of the items in a draw.
    """
    n, expected = len(included), float(included.mean())
    statistic = float(((included - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic / (1 - expected / repeats) * (n - 1) / n, n - 1))


def test_reservoir_keeps_every_sample_with_equal_probability() -> None:
    n, size, repeats = 60, 10, 1500
    included = torch.zeros(n)
    for seed in range(repeats):
        included[kept(offer(Memory(size, context(seed)), [0] * n))] += 1
    assert included.sum() == size * repeats
    assert p_value_of_equal_chances(included, repeats) > SIGNIFICANCE


def test_reservoir_keeps_every_subset_with_equal_probability() -> None:
    n, size, repeats = 6, 2, 3000
    subsets = Counter(tuple(kept(offer(Memory(size, context(s)), [0] * n, 4))) for s in range(3000))
    observed = [subsets[c] for c in combinations(range(n), size)]
    assert sum(observed) == repeats
    assert stats.chisquare(observed).pvalue > SIGNIFICANCE


def test_reservoir_is_algorithm_r() -> None:
    """Sample t (from 1) takes slot floor(u t) if there is one; with the same u, the same slots."""
    n, size, step = 200, 16, 9
    lent = context(3)
    memory = Memory(size, lent)
    dice = torch.Generator().manual_seed(lent.generator("memory.select").initial_seed())
    slots: list[int] = []
    for start in range(0, n, step):
        ids = list(range(start, min(start + step, n)))
        memory.add(batch(ids, [0] * len(ids)))
        late = [i for i in ids if i >= size]
        draws = torch.rand(len(late), dtype=torch.float64, generator=dice).tolist() if late else []
        slots += [i for i in ids if i < size]
        for i, u in zip(late, draws, strict=True):
            slot = int(u * (i + 1))
            if slot < size:
                slots[slot] = i
        assert memory.raw.flatten().int().tolist() == slots


def imbalanced(seed: int) -> list[int]:
    """A shuffled stream of 400, 100, 10 and 5 samples of four classes."""
    labels = torch.tensor([0] * 400 + [1] * 100 + [2] * 10 + [3] * 5)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    picked: list[int] = labels[order].tolist()
    return picked


@pytest.mark.parametrize("seed", range(5))
def test_class_balanced_keeps_all_of_rare_classes_and_halves_the_rest(seed: int) -> None:
    memory = offer(Memory(40, context(seed), "class_balanced"), imbalanced(seed))
    found = counts(memory)
    assert found[3] == 5
    assert found[2] == 10
    assert sorted((found[0], found[1])) == [12, 13]


@pytest.mark.parametrize("seed", range(12))
def test_class_balanced_is_the_printed_algorithm(seed: int) -> None:
    """Sample by sample, with the same random numbers; "full" counts once the memory is."""
    labels, size, lent = imbalanced(seed), 30, context(seed)
    memory = Memory(size, lent, "class_balanced")
    dice = torch.Generator().manual_seed(lent.generator("memory.select").initial_seed())
    stored: list[tuple[int, int]] = []  # (class, id)
    full: set[int] = set()
    encountered: Counter[int] = Counter()
    for i, label in enumerate(labels):
        memory.add(batch([i], [label]))
        u, _ = torch.rand(2, dtype=torch.float64, generator=dice).tolist()
        encountered[label] += 1
        mine = [slot for slot, (c, _) in enumerate(stored) if c == label]
        if len(stored) < size:
            stored.append((label, i))
        elif label not in full:
            # Which instance of which largest class is taken over is the implementation's draw.
            (slot,) = (memory.raw.flatten() == i).nonzero().flatten().tolist()
            sizes = Counter(c for c, _ in stored)
            assert sizes[stored[slot][0]] == max(sizes.values())
            stored[slot] = (label, i)
        elif u < len(mine) / encountered[label]:
            slots = memory.raw.flatten() == i
            assert slots.any(), "m_c / n_c accepts it"
            slot = int(slots.nonzero())
            assert slot in mine
            stored[slot] = (label, i)
        sizes = Counter(c for c, _ in stored)
        if len(stored) == size:
            full |= {c for c, n in sizes.items() if n == max(sizes.values())}
        assert memory.raw.flatten().int().tolist() == [i for _, i in stored]


def test_class_balanced_keeps_samples_of_a_class_with_equal_probability() -> None:
    """Within the frequent classes of an imbalanced stream, which share the places left over."""
    labels, repeats = torch.tensor(imbalanced(0)), 600
    included = torch.zeros(len(labels))
    for seed in range(repeats):
        memory = offer(Memory(40, context(seed), "class_balanced"), labels.tolist(), 32)
        included[memory.raw.flatten().long()] += 1
    for label in (0, 1):
        assert p_value_of_equal_chances(included[labels == label], repeats) > SIGNIFICANCE


def test_class_balanced_lets_the_first_class_of_a_stream_grow_once_the_memory_is_full() -> None:
    """Class 0 was the largest for one step while there was room; that must not bind it."""
    labels = [0] + [1] * 9 + [0] * 50
    assert counts(offer(Memory(10, context(), "class_balanced"), labels, 1)) == {0: 5, 1: 5}


def test_greedy_follows_the_algorithm_by_hand() -> None:
    memory = Memory(4, context(), "greedy")
    offer(memory, [0, 0, 0, 1], 1)
    assert counts(memory) == {0: 3, 1: 1}
    expected: list[tuple[int, list[dict[int, int]]]] = [
        (0, [{0: 3, 1: 1}]),  # 3 >= 4/2: refused
        (1, [{0: 2, 1: 2}]),  # 1 < 4/2: in the place of a 0
        (1, [{0: 2, 1: 2}]),  # 2 >= 4/2: refused
        (2, [{0: 1, 1: 2, 2: 1}, {0: 2, 1: 1, 2: 1}]),  # new: in the place of one of the largest
    ]
    for label, allowed in expected:
        memory.add(batch([9], [label]))
        assert counts(memory) in allowed


def test_greedy_refuses_a_class_beyond_its_share_even_if_there_is_room() -> None:
    memory = offer(Memory(10, context(), "greedy"), [0] * 6 + [1] + [0] * 5)
    assert counts(memory) == {0: 6, 1: 1}


@pytest.mark.parametrize("size", [10, 12, 31])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_ends_balanced(size: int, seed: int) -> None:
    labels = torch.randint(5, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = counts(offer(Memory(size, context(seed), "greedy"), labels))
    assert sum(found.values()) == size
    assert set(found.values()) <= {size // 5, -(-size // 5)}


def test_more_classes_than_places() -> None:
    for selection in ("class_balanced", "greedy"):
        memory = offer(Memory(3, context(), selection), list(range(20)) * 3)
        assert len(memory) == 3
        assert len(counts(memory)) == 3


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("size", [1, 5, 64, 100, 1000])
def test_what_is_kept_beside_a_sample_stays_beside_it(selection: Selection, size: int) -> None:
    labels = torch.randint(6, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    memory = offer(Memory(size, context(), selection), labels)
    assert len(memory) == len(memory.targets) == len(memory.raw) == min(size, 500)
    ids = memory.extras["id"]
    assert len(ids.unique()) == len(ids)
    assert torch.equal(memory.raw.flatten(), ids.float())
    assert torch.equal(memory.targets, torch.tensor(labels)[ids])
    assert torch.equal(memory.extras["twice"], 2 * memory.raw)
    assert memory.seen == 500


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_types_of_samples_and_extras_are_kept(selection: Selection) -> None:
    images = torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8)
    memory = Memory(10, context(), selection)
    logits = torch.randn(40, 6, requires_grad=True)
    memory.add(Batch(images.float(), torch.arange(40) % 4, images, torch.arange(40)), {"z": logits})
    assert memory.raw.dtype == torch.uint8
    assert memory.raw.shape == (10, 3, 4, 4)
    assert not memory.extras["z"].requires_grad


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_is_kept_without_a_budget(selection: Selection) -> None:
    memory = offer(Memory(0, context(), selection), [0, 1, 2])
    assert len(memory) == 0
    assert memory.raw.numel() == 0
    assert memory.samples().targets.numel() == 0


def test_draws_are_uniform_and_without_repetition() -> None:
    size, n, repeats = 20, 6, 2000
    memory = offer(Memory(size, context()), [0] * size)
    drawn = torch.zeros(size)
    for _ in range(repeats):
        slots = memory.draw(n).slots
        assert len(slots.unique()) == n
        drawn[slots] += 1
    assert p_value_of_equal_chances(drawn, repeats) > SIGNIFICANCE


def test_a_draw_from_a_small_memory_is_all_of_it() -> None:
    memory = offer(Memory(20, context()), [0, 1, 2])
    recalled = memory.draw(8)
    assert sorted(recalled.slots.tolist()) == [0, 1, 2]
    assert torch.equal(recalled.targets, recalled.slots)
    assert torch.equal(recalled.extras["id"], recalled.slots)


def test_recalled_samples_are_augmented_afresh_and_stored_ones_never() -> None:
    transform = ImageTransform((0.5,), (0.25,), crop_padding=2, flip=True)
    memory = Memory(8, context(transform=transform))
    images = torch.randint(256, (8, 1, 6, 6), dtype=torch.uint8)
    memory.add(Batch(transform.test(images), torch.arange(8), images, torch.arange(8)))
    slots = torch.arange(8)
    assert not torch.equal(memory.take(slots).inputs, memory.take(slots).inputs)
    assert torch.equal(memory.take(slots, augment=False).inputs, transform.test(images))
    assert torch.equal(memory.raw, images)


def test_replaced_extras_come_back() -> None:
    memory = offer(Memory(10, context()), [0] * 10)
    slots = torch.tensor([7, 2])
    memory.replace_extra("twice", slots, torch.tensor([[-1.0], [-2.0]]))
    assert memory.take(slots).extras["twice"].flatten().tolist() == [-1.0, -2.0]
    assert memory.take(torch.tensor([3])).extras["twice"].item() == 6.0


def test_stored_samples_can_be_trained_on_for_whole_epochs() -> None:
    memory = offer(Memory(10, context()), list(range(6)) * 5)
    samples = memory.samples()
    whole = samples.take(torch.arange(10))
    assert torch.equal(whole.raw, memory.raw)
    assert torch.equal(whole.targets, memory.targets)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("stop", [1, 3, 20])
def test_stopped_and_started_again_the_bits_are_the_same(selection: Selection, stop: int) -> None:
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    parts = [batch(range(s, s + 10), labels[s : s + 10]) for s in range(0, len(labels), 10)]

    def run(memory: Memory, some: Sequence[Batch]) -> list[Tensor]:
        for part in some:
            memory.add(part, {"twice": 2 * part.raw})
        return [memory.draw(7).slots for _ in range(3)]

    whole, first = Memory(50, context(), selection), Memory(50, context(), selection)
    run(whole, parts[:stop])
    draws = run(whole, parts[stop:])

    run(first, parts[:stop])
    buffer = io.BytesIO()
    generators = {k: g.get_state() for k, g in first.context.generators.items()}
    torch.save({"memory": first.state_dict(), "generators": generators}, buffer)
    buffer.seek(0)
    saved: dict[str, Any] = torch.load(buffer, weights_only=True)
    second = Memory(50, context(seed=9), selection)
    second.load_state_dict(saved["memory"])
    for key, state in saved["generators"].items():
        second.context.generators[key].set_state(state)

    again = run(second, parts[stop:])
    assert all(map(torch.equal, draws, again))
    assert torch.equal(whole.raw, second.raw)
    assert torch.equal(whole.targets, second.targets)
    assert torch.equal(whole.extras["twice"], second.extras["twice"])


def test_loading_takes_copies() -> None:
    one, two = Memory(5, context()), Memory(5, context())
    offer(one, [0] * 5)
    two.load_state_dict(one.state_dict())
    before = one.raw.clone()
    offer(two, [0] * 100)
    assert torch.equal(one.raw, before)
