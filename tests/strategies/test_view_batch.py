"""View-batch learning: who is shown when, and the distillation by hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from suite import composed, gradient_bases
from torch import Tensor, nn

from clbench.config import build
from clbench.errors import UserError
from clbench.nn.transforms import Identity
from clbench.samples import Batch, Samples, TensorSource
from clbench.testing import ToyScenario
from clbench.training import GradientStrategy
from strategies.derpp import DERpp
from strategies.finetune import Finetune
from strategies.replay import Replay
from strategies.view_batch import ViewBatch, by_label

Make = Callable[..., Any]


def shown(one: Any, method: ViewBatch, epochs: int, size: int) -> list[list[Batch]]:
    """The batches of each epoch of the first experience."""
    method = one.prepare(method)
    found: list[list[Batch]] = [[] for _ in range(epochs)]
    for batch in method.batches(one.stream.experiences[0].train, epochs, size):
        found[method._epoch].append(batch)
    return found


def indices(epochs: list[list[Batch]]) -> list[int]:
    return [i for epoch in epochs for batch in epoch for i in batch.index.tolist()]


@pytest.mark.parametrize(
    ("per_class", "size", "views"), [(40, 10, 4), (40, 16, 4), (39, 9, 4), (37, 80, 3), (41, 7, 8)]
)
def test_each_sample_exactly_v_times_in_v_epochs(
    bench: Make, per_class: int, size: int, views: int
) -> None:
    one = bench(per_class=per_class)
    train = one.stream.experiences[0].train
    everybody = sorted(train.index.tolist())
    epochs = shown(one, ViewBatch(base=Finetune(), views=views), 3 * views, size)
    orders = []
    for cycle in range(3):
        part = epochs[cycle * views : (cycle + 1) * views]
        for epoch in part:
            assert [len(b) for b in epoch] == [len(b) for b in plain_epoch(train, size)]
        order = indices(part)
        assert Counter(order) == dict.fromkeys(everybody, views)
        assert all(len({*order[i : i + views]}) == 1 for i in range(0, len(order), views))
        orders.append(order)
    assert len({*map(tuple, orders)}) == 3
    assert one.steps == [len(batch) for epoch in epochs for batch in epoch]


def plain_epoch(train: Samples, size: int) -> Iterator[Batch]:
    return train.batches(torch.arange(len(train)), size)


def test_a_batch_has_few_samples_and_an_epoch_its_share(bench: Make) -> None:
    """B / V samples in a batch, N / V in an epoch, none of them in the next V - 1 epochs."""
    epochs = shown(bench(), ViewBatch(base=Finetune()), 8, 16)
    assert {len({*b.index.tolist()}) for epoch in epochs for b in epoch} == {4}
    for cycle in (epochs[:4], epochs[4:]):
        members = [{*indices([epoch])} for epoch in cycle]
        assert [len(m) for m in members] == [20] * 4
        assert len(set().union(*members)) == 80


@pytest.mark.parametrize("epochs", [1, 3, 5, 6, 8])
def test_all_are_shown_as_often_as_there_are_epochs(bench: Make, epochs: int) -> None:
    found = indices(shown(bench(), ViewBatch(base=Finetune()), epochs, 10))
    assert len(found) == 80 * epochs
    assert {*Counter(found).values()} == {epochs}


@pytest.mark.parametrize("base", [Finetune(momentum=0.9), Replay(), DERpp()])
def test_with_one_view_it_is_its_base_bit_for_bit(
    bench: Make, same_weights: Callable[..., bool], base: GradientStrategy
) -> None:
    one = bench()
    single = one.learned(ViewBatch(base=base, views=1, distill_from=0))
    assert same_weights(single.model, one.learned(base).model)
    assert not same_weights(single.model, one.learned(ViewBatch(base=base)).model)


def test_code_form_rounds_epochs_down(bench: Make) -> None:
    one = bench(per_class=150)
    epochs = shown(one, ViewBatch(base=Finetune(), form="code"), 8, 32)
    assert [sum(map(len, epoch)) for epoch in epochs] == [256] * 8
    order = indices(epochs[:4])
    assert all(len({*order[i : i + 4]}) == 1 for i in range(0, len(order), 4))
    assert len({*order}) == 256
    assert sum(map(len, epochs[4])) == 256
    assert len({*indices(shown(one, ViewBatch(base=Finetune(), form="code"), 1, 32))}) == 64


def test_code_form_needs_256_samples(bench: Make) -> None:
    with pytest.raises(UserError, match="80 samples"):
        shown(bench(), ViewBatch(base=Finetune(), form="code"), 1, 10)


def official(labels: list[int], size: int, views: int) -> list[int]:
    """The official loop, as it stands: a counter that is compared with V, not V - 1."""
    back = []
    for start in range(0, len(labels), size):
        previous, count = -1, 0
        for label in labels[start : start + size]:
            if label == previous and count < views:
                count += 1
            else:
                count, previous = 0, label
            back.append(count)
    return back


@pytest.mark.parametrize("views", [1, 2, 4])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_code_form_takes_labels_for_samples(views: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(classes, (30,), generator=generator).repeat_interleave(views)
    found = by_label(targets, torch.arange(len(targets)) % 16, views)
    assert found.tolist() == official(targets.tolist(), 16, views)


def in_training(one: Any, method: ViewBatch, size: int) -> tuple[ViewBatch, Iterator[Batch]]:
    method = one.prepare(method)
    method.before(one.stream.experiences[0])
    method.begin(steps=1)
    return method, method.batches(one.stream.experiences[0].train, 4, size)


def divergences(outputs: Tensor, pairs: list[tuple[int, int]], classes: int) -> Tensor:
    """KL(p_first ‖ p_view) of each pair (first, view), from the definition."""
    p = outputs[:, :classes].exp() / outputs[:, :classes].exp().sum(1, keepdim=True)
    first = p.detach()
    return torch.stack([(first[i] * (first[i] / p[j]).log()).sum() for i, j in pairs])


@pytest.mark.parametrize("size", [8, 10, 3])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_by_hand(bench: Make, normalised: nn.Module, size: int, weight: float) -> None:
    """Pairs are found by identity; a view whose first lies in the batch before has none."""
    one = bench(normalised)
    method = ViewBatch(base=Finetune(), distillation=weight, distill_from=0, augmentation="none")
    method, batches = in_training(one, method, size)
    position, paired = 0, 0
    for _ in range(6):
        batch = next(batches)
        numbers = [(position + row) % 4 for row in range(len(batch))]
        position += len(batch)
        pairs = [(row - n, row) for row, n in enumerate(numbers) if 0 < n <= row]
        assert all(batch.index[i] == batch.index[j] for i, j in pairs)
        twin = copy.deepcopy(method.model)
        outputs = twin(batch.inputs)
        expected = nn.functional.cross_entropy(outputs, batch.targets)
        if pairs:
            expected = expected + weight * divergences(outputs, pairs, 2).mean()
            paired += 1
        expected.backward()
        method.model.zero_grad()
        found = method.loss(batch)
        torch.testing.assert_close(found, expected)
        found.backward()
        for mine, other in zip(method.model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)
    assert paired > 2


def test_the_loss_of_the_code_by_hand(bench: Make, normalised: nn.Module) -> None:
    """Divided by the number of classes as well; neighbours of one label are views."""
    one = bench(normalised, per_class=150)
    method = ViewBatch(base=Finetune(), distill_from=0, augmentation="none", form="code")
    method, batches = in_training(one, method, 16)
    strangers = 0
    for _ in range(5):
        batch = next(batches)
        back = official(batch.targets.tolist(), 16, 4)
        pairs = [(row - n, row) for row, n in enumerate(back) if n]
        strangers += sum(bool(batch.index[i] != batch.index[j]) for i, j in pairs)
        outputs = copy.deepcopy(method.model)(batch.inputs)
        expected = nn.functional.cross_entropy(outputs, batch.targets)
        expected = expected + divergences(outputs, pairs, 2).mean() / 2
        torch.testing.assert_close(method.loss(batch), expected)
    assert strangers


def test_classes_still_to_come_are_left_out(bench: Make) -> None:
    """All that have come are in; the gradient of the term is none elsewhere."""
    one = bench()
    method = one.learned(ViewBatch(base=Finetune(), distill_from=0), 0)
    second = one.stream.experiences[1]
    method.before(second)
    assert method.known == [0, 1, 2, 3]
    method.begin(steps=1)
    batch = next(iter(method.batches(second.train, 4, 8)))
    head = list(method.model.parameters())[-1]
    whole, base = method.loss(batch), method.base.loss(batch)
    (gradient,) = torch.autograd.grad(whole - base, head)
    assert (gradient.abs() > 1e-7).tolist() == [True] * 4 + [False] * 2


def test_distillation_begins_with_its_epoch(bench: Make) -> None:
    one = bench()
    method = one.prepare(ViewBatch(base=Finetune(), distill_from=2))
    method.before(one.stream.experiences[0])
    method.begin(steps=1)
    extra: dict[int, list[bool]] = {}
    for batch in method.batches(one.stream.experiences[0].train, 4, 8):
        difference = (method.loss(batch) - method.base.loss(batch)).item()
        extra.setdefault(method._epoch, []).append(difference > 1e-6)
    assert not any(extra[0] + extra[1])
    assert all(extra[2] + extra[3])


def inverted(images: Tensor, generator: torch.Generator) -> Tensor:
    """In place of a strong augmentation: nothing stays as it was."""
    assert generator.device.type == "cpu"
    return 255 - images


def test_the_first_view_is_the_scenario_s_and_the_others_are_strong(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where samples lie across batches and chunks; what a memory keeps is as it was."""
    monkeypatch.setattr("strategies.view_batch._STRONG", {"autoaugment": inverted})
    monkeypatch.setattr(Samples, "CHUNK", 36 * 20)
    one = bench()
    method, batches = in_training(one, ViewBatch(base=Finetune()), 10)
    train, transform, position = one.stream.experiences[0].train, method.context.transform, 0
    for batch in batches:
        numbers = torch.arange(position, position + len(batch)) % 4
        position += len(batch)
        assert torch.equal(batch.raw, train.source.gather(batch.index))
        first = (numbers == 0).view(-1, 1, 1, 1)
        expected = torch.where(first, batch.raw, 255 - batch.raw)
        assert torch.equal(batch.inputs, transform.test(expected))
    assert position == 320


def test_code_form_augments_what_it_takes_for_views(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.view_batch._STRONG", {"autoaugment": inverted})
    one = bench(per_class=150)
    method, batches = in_training(one, ViewBatch(base=Finetune(), form="code"), 16)
    for batch in batches:
        back = torch.tensor(official(batch.targets.tolist(), 16, 4)).view(-1, 1, 1, 1)
        expected = torch.where(back == 0, batch.raw, 255 - batch.raw)
        assert torch.equal(batch.inputs, method.context.transform.test(expected))


@pytest.mark.parametrize("augmentation", ["autoaugment", "randaugment"])
def test_views_are_augmented_one_by_one(bench: Make, augmentation: Any) -> None:
    method = ViewBatch(base=Finetune(), augmentation=augmentation)
    _, batches = in_training(bench(), method, 16)
    inputs = torch.cat([batch.inputs for batch in batches]).view(-1, 4, 36)
    assert max(len({*map(tuple, views.tolist())}) for views in inputs) == 4


def test_no_augmentation_leaves_all_views_alike(bench: Make) -> None:
    method, batches = in_training(bench(), ViewBatch(base=Finetune(), augmentation="none"), 16)
    for batch in batches:
        assert torch.equal(batch.inputs, method.context.transform.test(batch.raw))


@pytest.mark.parametrize("name", gradient_bases())
def test_around_any_gradient_strategy(bench: Make, name: str) -> None:
    """The outputs that are distilled are those of the arriving batch, whatever is replayed."""
    node = composed("strategy=view_batch", f"strategy@strategy.base={name}")["strategy"]
    method = build(node, ViewBatch, "strategy")
    method.check(ToyScenario())
    method.distill_from = 0
    one = bench(epochs=4)
    method = one.learned(method, 0)
    second = one.stream.experiences[1]
    method.before(second)
    method.begin(steps=1)
    passes: list[Tensor] = []
    method.model.register_forward_hook(lambda _, inputs, __: passes.append(inputs[0]))
    material = method.material(second)
    for batch in method.batches(material, 4, 8):
        passes.clear()
        method.update(method.loss(batch))
        assert torch.equal(passes[0][: len(batch)], batch.inputs)
        method.observe(batch)
    method.model.eval()
    method.after(second)
    assert method.memory_samples == method.base.memory_samples
    assert (len(material) > len(second.train)) == (name == "icarl")


def test_one_pass_is_no_place_for_it() -> None:
    with pytest.raises(UserError, match=r"scenario\.epochs"):
        ViewBatch(base=Finetune()).check(ToyScenario(epochs=1, online=True))


def test_strong_augmentation_is_for_images(bench: Make) -> None:
    method = bench().prepare(ViewBatch(base=Finetune()))
    words = TensorSource(torch.zeros(8, 5, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    samples = Samples(words, torch.arange(8), Identity())
    with pytest.raises(UserError, match=r"strategy\.augmentation=none"):
        list(method.batches(samples, 4, 4))


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(UserError, match="views=0"):
        ViewBatch(base=Finetune(), views=0)
    with pytest.raises(UserError, match="distillation=-1"):
        ViewBatch(base=Finetune(), distillation=-1)
