"""ER-ACE against its masked cross-entropy, by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.samples import Batch
from strategies.er_ace import ERACE
from strategies.finetune import Finetune

Make = Callable[..., Any]


class Fixed(nn.Module):
    """Answers with its input: logits as given."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def logits(rows: Sequence[Sequence[float]], labels: Sequence[int]) -> Batch:
    inputs, targets = torch.tensor(rows), torch.tensor(labels)
    return Batch(inputs, targets, inputs, torch.arange(len(labels)))


def by_hand(z: Tensor, label: int, competing: Sequence[int]) -> Tensor:
    return -(z[label].exp() / z[list(competing)].exp().sum()).log()


def test_old_classes_compete_only_where_the_batch_holds_them(bench: Make) -> None:
    one = bench(Fixed(), memory_size=0)
    ace = one.prepare(ERACE())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 6, generator=generator)
    first = logits(rows.tolist(), [0, 1])
    ace.observe(first)  # 0 and 1 are met
    second = logits(rows.tolist(), [2, 2])
    # 2 is in the batch; 3, 4 and 5 have not come; 0 and 1 are out.
    expected = sum(by_hand(z, 2, (2, 3, 4, 5)) for z in rows) / 2
    torch.testing.assert_close(ace.loss(second), expected)
    ace.loss(second).backward()
    gradient = ace.model.bias.grad
    assert torch.equal(gradient[:2], torch.zeros(2))
    assert (gradient[3:] > 0).all()

    ace.observe(second)
    third = logits(rows.tolist(), [1, 2])
    expected = (by_hand(rows[0], 1, (1, 2, 3, 4, 5)) + by_hand(rows[1], 2, (1, 2, 3, 4, 5))) / 2
    torch.testing.assert_close(ace.loss(third), expected)


def test_classes_that_have_not_come_are_not_told_by_their_number(bench: Make) -> None:
    """Labels 0 and 5 are met: 1 to 4 have not come and compete."""
    one = bench(Fixed(), memory_size=0)
    ace = one.prepare(ERACE())
    rows = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    ace.observe(logits(rows.tolist(), [0, 5]))
    expected = sum(by_hand(z, 3, (1, 2, 3, 4)) for z in rows) / 2
    torch.testing.assert_close(ace.loss(logits(rows.tolist(), [3, 3])), expected)


def test_the_memory_has_a_pass_of_its_own_with_all_classes(
    bench: Make, normalised: nn.Module
) -> None:
    one = bench(normalised, memory_size=10, memory_batch_size=10)
    ace = one.prepare(ERACE())
    ace.begin(steps=1)
    ace.observe(one.batch(0, 0, 10))
    batch, twin = one.batch(1, 0, 6), copy.deepcopy(ace.model)
    old = one.stream.experiences[0].classes
    others = [c for c in range(6) if c not in old]
    stream = twin(batch.inputs)
    expected = torch.stack(
        [by_hand(z, int(y), others) for z, y in zip(stream, batch.targets, strict=True)]
    ).mean()
    stored = twin(ace.context.transform.test(ace.memory.raw))
    expected = expected + F.cross_entropy(stored, ace.memory.targets)
    torch.testing.assert_close(ace.loss(batch), expected)


def test_with_one_experience_and_no_memory_it_is_fine_tuning_up_to_the_classes_of_a_batch(
    bench: Make, same_weights: Callable[..., bool]
) -> None:
    """Every batch of 40 holds both classes with near certainty: nothing is masked."""
    one = bench(memory_size=0, batch_size=40)
    assert same_weights(one.learned(ERACE(), 0).model, one.learned(Finetune(), 0).model)


def test_the_loss_alone_meets_no_class(bench: Make) -> None:
    one = bench()
    ace = one.prepare(ERACE())
    ace.loss(one.batch(0, 0, 10))
    assert not ace.met.any()
    ace.observe(one.batch(0, 0, 10))
    assert ace.met.nonzero().flatten().tolist() == sorted(one.stream.experiences[0].classes)
