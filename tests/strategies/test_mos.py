"""MOS: merging by hand and in its limits, retrieval on made-up cases and beside a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.adapters import Adapters
from clbench.nn.vit import vision_transformer
from clbench.samples import Batch
from clbench.testing import ToyScenario, ToyViT, resumes_with_the_same_bits
from strategies.adapter_finetune import AdapterFinetune
from strategies.finetune import Finetune
from strategies.mos import MOS, apartness, merge

Make = Callable[..., Any]
QUICK = MOS(lr=0.1, momentum=0.9, bottleneck=4, alignment_epochs=2)
#: Nothing but adapters and the head, at one rate.
BARE = MOS(
    lr=0.1, momentum=0.9, bottleneck=4, alpha=0, orthogonality=0, head_ratio=1, alignment_epochs=0
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Dropout draws from torch's global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def vit(bench: Make, **options: Any) -> Any:
    return bench(backbone=ToyViT(), **options)


def tensors(adapters: Any) -> list[Tensor]:
    return [p.detach().clone() for p in adapters.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) > 0 and all(map(torch.equal, one, two))


# Merging.


def test_a_merge_worked_out_by_hand(bench: Make) -> None:
    one = vit(bench)
    model = one.prepare(Finetune()).model
    adapters = Adapters(vision_transformer(model), 2, 0.1, 0.0, torch.Generator())
    for parameter in adapters.parameters():
        nn.init.constant_(parameter, 10)
    means = [torch.full_like(p, 2) for p in adapters.parameters()]
    merge(adapters, means, 0.1, [1, 2])
    # 0.9 · 10 + 0.1 · 2, and once more on the second block: 0.9 · 9.2 + 0.1 · 2.
    for block, value in ((adapters[0], 9.2), (adapters[1], 8.48)):
        for parameter in block.parameters():
            torch.testing.assert_close(parameter.data, torch.full_like(parameter, value))


def test_a_step_pulls_the_new_adapters_to_the_mean_of_the_earlier_ones(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(replace(QUICK, weight_decay=0.0), 0, 1)
    mos.before(one.stream.experiences[2])
    mos.begin(1)
    first, second = tensors(mos.adapters[0]), tensors(mos.adapters[1])
    for parameter in mos._current.parameters():
        nn.init.constant_(parameter, 3.0)
    mos.update(sum(0 * p.sum() for p in mos.trainable()))  # no gradient: merging alone moves them
    for a, b, merged in zip(first, second, tensors(mos._current), strict=True):
        torch.testing.assert_close(merged, 0.9 * 3 + 0.1 * (a + b) / 2)


def test_with_alpha_1_adapters_are_the_mean_of_the_earlier_ones(bench: Make) -> None:
    mos = vit(bench).learned(replace(QUICK, alpha=1.0))
    first, second, third = map(tensors, mos.adapters)
    assert same(second, first)
    assert not same(first, tensors(vit(bench).prepare(QUICK)._current))
    for a, b, c in zip(first, second, third, strict=True):
        torch.testing.assert_close(c, (a + b) / 2)


def test_with_alpha_0_and_one_experience_it_is_adapter_tuning(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(replace(BARE, ensemble=False), 0)
    torch.manual_seed(0)
    tuned = one.learned(AdapterFinetune(lr=0.1, momentum=0.9, bottleneck=4), 0)
    classes = list(one.stream.experiences[0].classes)
    assert torch.equal(one.outputs(mos)[:, classes], one.outputs(tuned)[:, classes])
    assert same(tensors(mos.adapters[0]), tensors(tuned.model.get_submodule("adapters")))


def test_with_alpha_0_adapters_go_on_from_where_they_were(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(BARE)
    torch.manual_seed(0)
    tuned = one.learned(AdapterFinetune(lr=0.1, momentum=0.9, bottleneck=4))
    assert same(tensors(mos.adapters[2]), tensors(tuned.model.get_submodule("adapters")))
    assert torch.equal(mos.model.head.weight, tuned.model.head.weight)
    assert not same(tensors(mos.adapters[1]), tensors(mos.adapters[2]))


def test_an_experience_starts_from_the_adapters_of_the_one_before(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(QUICK, 0)
    mos.before(one.stream.experiences[1])
    assert same(tensors(mos._current), tensors(mos.adapters[0]))


def test_older_adapters_and_pre_trained_weights_stay_to_the_bit(bench: Make) -> None:
    one = vit(bench)
    mos, fresh = one.learned(QUICK, 0), one.prepare(Finetune())
    first = tensors(mos.adapters[0])
    one.teach(mos, 1, 2)
    assert same(tensors(mos.adapters[0]), first)
    states = mos.model.features.state_dict(), fresh.model.features.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])
    assert all(p.grad is None for p in mos.model.features.parameters())


# The loss.


def test_the_term_that_keeps_features_apart_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    expected = (math.log(1 + math.exp(-1 / 0.8)) + math.log(1 + math.exp(-4 / 0.8))) / 2
    torch.testing.assert_close(apartness(rows).item(), expected)


def test_the_loss_is_of_the_experience_s_classes_and_the_features_likeness(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(replace(QUICK, dropout=0.0), 0)
    mos.before(one.stream.experiences[1])
    batch, classes = one.batch(1, 0, 8), list(one.stream.experiences[1].classes)
    old = one.stream.experiences[0]
    means = torch.stack([mos.statistics.mean(c) for c in mos.statistics.classes])
    assert len(means) == len(old.classes)
    features = mos.features(batch.inputs, mos._current)
    logits = mos.model.head(features)[:, classes]
    wanted = torch.tensor([classes.index(int(t)) for t in batch.targets])
    expected = F.cross_entropy(logits, wanted) + 0.1 * apartness(torch.cat((means, features)))
    torch.testing.assert_close(mos.loss(batch), expected)


def test_the_head_learns_more_slowly_than_the_adapters(bench: Make) -> None:
    one = vit(bench)
    mos = one.prepare(replace(QUICK, schedule="cosine"))
    mos.before(one.stream.experiences[0])
    mos.begin(4)
    mos.update(sum(p.sum() for p in mos.trainable()))
    adapters, head = mos._optimizer.param_groups
    assert [adapters["lr"], head["lr"]] == pytest.approx([0.1, 0.01])
    assert set(head["params"]) == set(mos.model.head.parameters())
    assert set(adapters["params"]) == set(mos._current.parameters())
    mos.update(sum(p.sum() for p in mos.trainable()))
    factor = (1 + math.cos(math.pi / 4)) / 2
    assert [adapters["lr"], head["lr"]] == pytest.approx([0.1 * factor, 0.01 * factor])


def test_frozen_parts_are_in_evaluation_mode_while_adapters_train(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(QUICK, 0)
    mos.before(one.stream.experiences[1])
    mos.begin(1)
    assert not any(m.training for m in mos.model.features.modules())
    assert not any(m.training for m in mos.adapters[0].modules())
    assert all(m.training for m in mos._current.modules())


# Statistics and alignment.


def test_statistics_are_of_features_with_the_class_s_own_adapters(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(QUICK)
    assert set(mos.statistics.classes) == set(range(6))
    for label in range(6):
        owner = int(mos.owners[label])
        assert label in one.stream.experiences[owner].classes
        train = one.stream.experiences[owner].train
        inputs = train.take((train.targets == label).nonzero().flatten()).inputs
        own = mos.features(inputs, mos.adapters[owner]).detach()
        torch.testing.assert_close(mos.statistics.mean(label), own.mean(0), rtol=1e-4, atol=1e-5)
        covariance = torch.cov(own.T) + 1e-4 * torch.eye(16)
        torch.testing.assert_close(
            mos.statistics.covariance(label), covariance, rtol=1e-3, atol=1e-5
        )
        first = mos.features(inputs, mos.adapters[0]).detach().mean(0)
        torch.testing.assert_close(mos.prototypes.means()[label], first, rtol=1e-4, atol=1e-5)


def test_alignment_is_a_plain_loop_over_samples_of_the_gaussians(bench: Make) -> None:
    one = vit(bench)
    without = one.prepare(replace(QUICK, alignment_epochs=0))
    aligned = one.prepare(replace(QUICK, alignment_epochs=3))
    for mos in (without, aligned):
        torch.manual_seed(0)
        one.teach(mos, 0, 1)
    assert same(tensors(aligned.adapters), tensors(without.adapters))
    head, size = without.model.head, 5 * 10
    generator = without.context.generator("alignment")
    optimizer = torch.optim.SGD(head.parameters(), 0.005, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    classes = without.statistics.classes
    for _ in range(3):
        features, targets = without.statistics.sample(classes, size, generator)
        order = torch.randperm(len(targets), generator=generator)
        for step in range(len(classes)):
            some = order[step * size : (step + 1) * size]
            logits = head(features[some])[:, list(classes)]
            wanted = torch.tensor([classes.index(int(t)) for t in targets[some]])
            optimizer.zero_grad()
            F.cross_entropy(logits, wanted).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(aligned.model.head.weight, head.weight)
    assert not torch.allclose(one.prepare(QUICK).model.head.weight, head.weight)


def test_the_first_experience_is_not_aligned(bench: Make) -> None:
    one = vit(bench)
    heads = []
    for epochs in (0, 3):
        torch.manual_seed(0)
        mos = one.learned(replace(QUICK, alignment_epochs=epochs), 0)
        heads.append(mos.model.head.weight)
    assert torch.equal(*heads)


def test_alignment_gives_old_classes_their_due(bench: Make) -> None:
    """Of the head alone, without retrieval: how often the old classes win on their own tests."""
    one = vit(bench)
    rates = []
    for epochs in (0, 30):
        torch.manual_seed(0)
        mos = one.learned(replace(QUICK, alignment_epochs=epochs, alignment_lr=0.05), 0, 1)
        test = one.stream.tests[0].take(torch.arange(40))
        outputs = mos.model.head(mos.features(test.inputs, mos.adapters[0]))
        outputs[:, mos.owners < 0] = -torch.inf
        rates.append((outputs.argmax(1) == test.targets).float().mean().item())
    assert rates[1] > rates[0]


@pytest.mark.parametrize("gaussians", ["diagonal", "centroids"])
def test_smaller_statistics_work_and_are_restored(gaussians: Any) -> None:
    resumes_with_the_same_bits(
        replace(QUICK, gaussians=gaussians), ToyScenario(backbone=ToyViT(), epochs=1)
    )


# Retrieval.


class Scripted:
    """Answers of adapters, by their position, for samples whose input is their number."""

    def __init__(self, mos: Any, answers: list[list[int]]) -> None:
        self.mos = mos
        #: [K, N, C]: other logits for each set, so that it shows whose they are.
        self.logits = torch.stack(
            [(10 + k) * F.one_hot(torch.tensor(row), 6).float() for k, row in enumerate(answers)]
        )
        self.runs: list[tuple[int, list[int]]] = []
        mos.owners = torch.tensor([0, 0, 1, 1, 2, 2])
        for _ in answers:
            mos.adapters.add(mos._current)
        mos._head, mos.features = nn.Identity(), self.features

    def features(self, inputs: Tensor, adapters: Any) -> Tensor:
        k = next(i for i, a in enumerate(self.mos.adapters) if a is adapters)
        numbers = inputs.flatten().long()
        self.runs.append((k, numbers.tolist()))
        return self.logits[k, numbers]

    def retrieve(self, guess: list[int]) -> Tensor:
        numbers = torch.arange(len(guess)).unsqueeze(1).float()
        outputs: Tensor = self.mos.retrieve(numbers, self.logits[0], torch.tensor(guess))
        return outputs


def test_retrieval_on_constructed_cases(bench: Make) -> None:
    mos = vit(bench).prepare(QUICK)
    #       0: names itself    1: 1 -> 2, stays    2: 1 -> 2 -> 1 ...    3: 1 -> 0, stays
    answers = [[1, 0, 0, 0], [0, 4, 5, 1], [0, 5, 2, 0]]
    script = Scripted(mos, answers)
    outputs = script.retrieve([0, 1, 1, 1])
    expected = [(0, 0), (2, 1), (2, 2), (0, 3)]  # whose logits of which sample
    for row, (k, number) in zip(outputs, expected, strict=True):
        assert torch.equal(row, script.logits[k, number])
    assert script.runs == [(1, [1, 2, 3]), (2, [1, 2])], "nothing runs twice, A_1 not at all"
    assert mos._passes == 5


@pytest.mark.parametrize(("steps", "whose"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_retrieval_that_never_settles_stops_after_its_steps(
    bench: Make, steps: int, whose: int
) -> None:
    mos = vit(bench).prepare(replace(QUICK, retrieval_steps=steps))
    script = Scripted(mos, [[0], [5], [2]])
    assert torch.equal(script.retrieve([1])[0], script.logits[whose, 0])
    assert len(script.runs) == min(steps, 2)


def test_classes_that_have_not_come_are_never_named(bench: Make) -> None:
    mos = vit(bench).prepare(QUICK)
    script = Scripted(mos, [[5], [5]])
    mos.owners = torch.tensor([0, 0, 1, 1, -1, -1])
    outputs = script.retrieve([0])
    assert outputs[0, 4:].tolist() == [torch.finfo(torch.float32).min] * 2


def eager(mos: Any, inputs: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """As the released code does it: every adapter on every image, then image by image.

    Returns:
        z⁰ and z of every image, and how many sets of adapters each one needed.
    """
    with torch.no_grad():
        features = torch.stack([mos.features(inputs, a) for a in mos.adapters], 1)
        known = [c for c in range(6) if mos.owners[c] >= 0]
        distant = F.cosine_similarity(features[:, :1], mos.prototypes.means()[known], dim=2)
        rows, needed = [], []
        for i in range(len(inputs)):
            k, visited, loops = int(mos.owners[known[int(distant[i].argmax())]]), {0}, 0
            while True:
                loops += 1
                visited.add(k)
                z = mos.model.head(features[i, k])[known]
                named = int(mos.owners[known[int(z.argmax())]])
                if loops >= 4 or named == k:
                    break
                k = named
            rows.append(z)
            needed.append(len(visited))
    return distant, torch.stack(rows), needed


def wandering(bench: Make) -> tuple[Any, Any]:
    """A learner whose head and prototypes disagree, so that retrieval has something to do."""
    one = vit(bench)
    mos = one.learned(QUICK)
    generator = torch.Generator().manual_seed(3)
    nn.init.normal_(mos.model.head.weight, generator=generator)
    return one, mos


@pytest.mark.parametrize("ensemble", [False, True])
def test_lazy_retrieval_answers_as_eager_retrieval_does(bench: Make, ensemble: bool) -> None:
    one, mos = wandering(bench)
    mos.ensemble = ensemble
    inputs = torch.cat([t.take(torch.arange(len(t))).inputs for t in one.stream.tests])
    distant, z, needed = eager(mos, inputs)
    assert max(needed) == 3, "the case is too easy"
    mos._images = mos._passes = 0
    outputs = one.outputs(mos)
    if ensemble:
        torch.testing.assert_close(
            2 * outputs.exp(), z.softmax(1) + (3 * distant).softmax(1), rtol=1e-4, atol=1e-6
        )
    else:
        torch.testing.assert_close(outputs, z, rtol=1e-4, atol=1e-5)
    facts = mos.facts()["mean_passes_per_prediction"]
    assert facts == pytest.approx(sum(needed) / len(needed))
    assert 1 < facts < 3


def test_passes_are_those_that_go_through_the_model(bench: Make) -> None:
    one, mos = wandering(bench)
    assert mos.facts() == {}
    seen: list[int] = []
    hook = mos._features.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    one.outputs(mos)
    hook.remove()
    assert mos.facts()["mean_passes_per_prediction"] == sum(seen) / 120


def test_answers_do_not_depend_on_who_else_is_in_the_batch(bench: Make) -> None:
    one, mos = wandering(bench)
    batch = one.batch(1, 0, 12).unlabelled()
    whole = mos.predict(batch)
    for i in range(12):
        alone = Batch(*(part[i : i + 1] for part in (batch.inputs,)), *[batch.targets] * 3)
        torch.testing.assert_close(mos.predict(alone)[0], whole[i], rtol=1e-4, atol=1e-5)


def test_one_experience_takes_one_pass(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(QUICK, 0)
    outputs = one.outputs(mos)
    classes = list(one.stream.experiences[0].classes)
    assert mos.facts() == {"mean_passes_per_prediction": 1}
    assert outputs.isfinite().all()
    torch.testing.assert_close(outputs[:, classes].exp().sum(1), torch.ones(120))


def test_nothing_is_known_before_the_first_experience(bench: Make) -> None:
    one = vit(bench)
    outputs = one.outputs(one.prepare(QUICK))
    assert outputs.isfinite().all()
    assert len(outputs.unique()) == 1


# The released code's form.


def test_a_step_of_the_code_s_form_is_one_with_merges_inside_the_forward_pass(bench: Make) -> None:
    one = vit(bench)
    code = replace(QUICK, merge_mode="code", dropout=0.0, weight_decay=0.01, momentum=0.0)
    mos, naive = one.prepare(code), one.prepare(code)
    for each in (mos, naive):
        one.teach(each, 0)
        each.before(one.stream.experiences[1])
        each.begin(1)
        for i, p in enumerate(each._current.parameters()):
            nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    batch = one.batch(1, 0, 10)
    mos.update(mos.loss(batch))

    def pull(*_: Any) -> None:
        for p, mean in zip(naive._current.parameters(), naive._mean, strict=True):
            p.data = 0.9 * p.data + 0.1 * mean

    hooks = [block.register_forward_pre_hook(pull) for block in naive._vit.blocks]
    features = naive.features(batch.inputs, naive._current)
    logits = naive.model.head(features).masked_fill(naive._absent, -torch.inf)
    loss = F.cross_entropy(logits, batch.targets)
    loss = loss + 0.1 * apartness(torch.cat((naive._means, features)))
    for hook in hooks:
        hook.remove()
    naive._optimizer.zero_grad()
    loss.backward()
    naive._optimizer.step()
    pull()
    for a, b in zip(tensors(mos.model), tensors(naive.model), strict=True):
        torch.testing.assert_close(a, b)
    before = one.prepare(code)
    assert not torch.allclose(mos.model.head.weight, before.model.head.weight)


def test_the_code_s_form_answers_with_means_of_earlier_adapters(bench: Make) -> None:
    one = vit(bench)
    mos = one.learned(replace(QUICK, merge_mode="code"))
    first, second, third = map(tensors, mos.adapters)
    assert same(second, first)
    own = [total - a for total, a in zip(mos.total, first, strict=True)]  # A_2 + A_3 as trained
    assert not any(torch.allclose(a, 2 * b) for a, b in zip(own, first, strict=True))
    assert not same(third, first)


def test_the_code_s_form_drifts_while_it_gathers_statistics(bench: Make) -> None:
    """L merges for every batch of 3 batch sizes of one class: 2 batches, 2 classes, 2 blocks."""
    one = vit(bench)
    mos = one.learned(replace(QUICK, merge_mode="code"), 0, 1)
    first = tensors(mos.adapters[0])
    trained = [total - a for total, a in zip(mos.total, first, strict=True)]
    for a, b, drifted in zip(first, trained, tensors(mos._current), strict=True):
        torch.testing.assert_close(drifted, a + 0.9**8 * (b - a), rtol=1e-4, atol=1e-6)


def test_without_merging_both_forms_are_one(bench: Make) -> None:
    one = vit(bench)
    outputs = []
    for mode in ("paper", "code"):
        torch.manual_seed(0)
        mos = one.learned(replace(QUICK, alpha=0.0, merge_mode=mode))
        outputs.append(one.outputs(mos))
    assert torch.equal(*outputs)


def test_a_backbone_without_blocks_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"MLP.*backbone=vit_glyphs"):
        QUICK.check(ToyScenario())
