"""AdaContrast against its steps written out, and its parts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from adapting import Features, adapting, answers_without_a_trace, unlabelled
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.contrastive_views import MoCoViews
from clbench.nn.heads import Classifier
from clbench.nn.transforms import ImageTransform
from clbench.samples import Batch
from strategies.adacontrast import AdaContrast

TRANSFORM = ImageTransform((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def network() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        return Classifier(Features(body, 6), nn.Linear(6, 4)).eval()


def batch(seed: int, n: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return unlabelled(TRANSFORM.test(raw), raw)


def set_up(strategy: AdaContrast) -> AdaContrast:
    return adapting(strategy, network(), 4, transform=TRANSFORM)


def two_dimensional(**options: float) -> AdaContrast:
    """Features are the inputs, logits ten times the features."""
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = 10 * torch.eye(2)
    model = Classifier(Features(nn.Identity(), 2), head)
    return adapting(AdaContrast(**options), model, 2)  # type: ignore[arg-type]


def test_the_contrast_by_hand() -> None:
    """Of two keys one has the pseudo-label of the query and is no negative."""
    strategy = two_dimensional(queue_size=2, temperature=0.5)
    strategy.keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    strategy.key_labels = torch.tensor([0, 1])
    query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    for label, other in ((0, 0.0), (1, 1.0)):
        loss = strategy._contrast(query, key, torch.tensor([label]))
        own = math.exp(0.6 / 0.5)
        assert loss.item() == pytest.approx(-math.log(own / (own + math.exp(other / 0.5))))


def test_neighbours_vote_by_the_mean_of_their_probabilities() -> None:
    """The two most similar say 0.9 and 0.2 for class 0; the third nearest is not asked."""
    strategy = two_dimensional(queue_size=4, neighbours=2, warm_up=3)
    strategy.bank = torch.tensor([[5.0, 0.5], [1.0, 0.2], [0.0, 1.0], [1.0, 0.0]])
    p = torch.tensor([0.9, 0.2, 0.0, 0.5])
    strategy.bank_probabilities = torch.stack((p, 1 - p), 1)
    query = torch.tensor([[2.0, 0.3]])
    strategy.seen = 3
    assert strategy.pseudo_labels(query).tolist() == [0]
    strategy.neighbours = 3
    assert strategy.pseudo_labels(query).tolist() == [1]
    strategy.seen = 2  # not enough yet: its own answer
    assert strategy.pseudo_labels(query).tolist() == [0]
    assert strategy.pseudo_labels(query.flip(1)).tolist() == [1]


def test_the_oldest_entries_make_way() -> None:
    strategy = two_dimensional(queue_size=5)
    for first, n in ((0, 3), (3, 3), (6, 1)):
        values = torch.arange(first, first + n).float()
        keys = torch.stack((values, values), 1)
        strategy._remember(keys + 100, keys, values.long())
    assert strategy.key_labels.tolist() == [5, 6, 2, 3, 4]
    assert strategy.keys[:, 0].tolist() == [5, 6, 2, 3, 4]
    assert strategy.bank[:, 1].tolist() == [105, 106, 102, 103, 104]
    strategy._remember(torch.zeros(7, 2), torch.zeros(7, 2), torch.arange(7))
    assert sorted(strategy.key_labels.tolist()) == [2, 3, 4, 5, 6]


class WrittenOut:
    """The published training loop with PyTorch's own modes, without a queue that is a ring."""

    def __init__(self, strategy: AdaContrast) -> None:
        self.model, self.key_model = network(), network()
        self.options = strategy
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), strategy.lr, 0.9, weight_decay=1e-4, nesterov=True
        )
        self.keys = [
            (k, int(y)) for k, y in zip(strategy.keys.clone(), strategy.key_labels, strict=True)
        ]
        self.bank: list[tuple[Tensor, Tensor]] = []
        self.views = MoCoViews(set_up(AdaContrast()).context)

    def pseudo_label(self, feature: Tensor, logits: Tensor) -> int:
        if len(self.bank) < self.options.warm_up:
            return int(logits.argmax())
        ranked = sorted(self.bank, key=lambda e: -float(F.cosine_similarity(feature, e[0], dim=0)))
        voters = [p for _, p in ranked[: self.options.neighbours]]
        return int(torch.stack(voters).mean(0).argmax())

    def step(self, batch: Batch) -> Tensor:
        weak = self.views.weak(batch.raw)
        query, key = self.views.strong(batch.raw), self.views.strong(batch.raw)
        self.model.train()
        self.key_model.train()
        with torch.no_grad():
            features = self.model.features(weak)
            pairs = zip(features, self.model.head(features), strict=True)
            labels = torch.tensor([self.pseudo_label(*pair) for pair in pairs])
        q = self.model.features(query)
        logits = self.model.head(q)
        with torch.no_grad():
            for k, p in zip(self.key_model.parameters(), self.model.parameters(), strict=True):
                k.copy_(self.options.key_momentum * k + (1 - self.options.key_momentum) * p)
            keys = F.normalize(self.key_model.features(key))
        loss = F.cross_entropy(logits, labels)
        mean = logits.softmax(1).mean(0)
        loss = loss + self.options.diversity * (mean * mean.log()).sum()
        for row, own, label in zip(F.normalize(q), keys, labels.tolist(), strict=True):
            others = [(row @ k) / 0.07 for k, y in self.keys if y != label]
            scores = torch.stack([(row @ own) / 0.07, *others])
            loss = loss + F.cross_entropy(scores[None], torch.tensor([0])) / len(keys)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.keys += zip(keys, labels.tolist(), strict=True)
        with torch.no_grad():
            features = self.key_model.features(weak)
            self.bank += zip(features, self.key_model.head(features).softmax(1), strict=True)
        size = self.options.queue_size
        self.keys, self.bank = self.keys[-size:], self.bank[-size:]
        self.model.eval()
        with torch.no_grad():
            answer: Tensor = self.model(batch.inputs)
        return answer


def test_a_stream_written_out() -> None:
    """Five batches: pseudo-labels of the model, then of neighbours; queue and bank overflow."""
    strategy = set_up(
        AdaContrast(queue_size=20, warm_up=10, neighbours=3, lr=0.05, key_momentum=0.9)
    )
    oracle = WrittenOut(strategy)
    for seed in range(5):
        torch.testing.assert_close(
            strategy.adapt(batch(seed)), oracle.step(batch(seed)), rtol=1e-4, atol=1e-5
        )
    for ours, theirs in (
        (strategy.model, oracle.model),
        (strategy.key_model, oracle.key_model),
    ):
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    held = sorted(zip(strategy.keys.tolist(), strategy.key_labels.tolist(), strict=True))
    wanted = sorted((k.tolist(), y) for k, y in oracle.keys)
    torch.testing.assert_close(
        torch.tensor([k for k, _ in held]), torch.tensor([k for k, _ in wanted])
    )
    assert [y for _, y in held] == [y for _, y in wanted]


def test_without_a_rate_only_the_statistics_move() -> None:
    """Twice for each batch: its weak view, then a strong one."""
    strategy = set_up(AdaContrast(lr=0.0, key_momentum=1.0))
    reference, views = network(), MoCoViews(set_up(AdaContrast()).context)
    first = batch(0)
    answer = strategy.adapt(first)
    weak, query = views.weak(first.raw), views.strong(first.raw)
    reference.train()
    with torch.no_grad():
        reference(weak)
        reference(query)
        torch.testing.assert_close(answer, reference.eval()(first.inputs))
    for p, q in zip(strategy.model.parameters(), network().parameters(), strict=True):
        assert torch.equal(p, q)


def test_predict_leaves_no_trace_and_reset_forgets() -> None:
    strategy = set_up(AdaContrast(queue_size=20, warm_up=8, lr=0.05))
    fresh = answers_without_a_trace(strategy, batch(9))
    first = [strategy.adapt(batch(seed)) for seed in range(4)]
    assert not torch.equal(answers_without_a_trace(strategy, batch(9)), fresh)
    assert strategy.seen == 32
    strategy.reset()
    assert strategy.seen == 0
    assert torch.equal(answers_without_a_trace(strategy, batch(9)), fresh)
    assert all(torch.equal(a, strategy.adapt(batch(seed))) for seed, a in enumerate(first))


def test_a_batch_of_one_and_a_wide_batch() -> None:
    strategy = set_up(AdaContrast(queue_size=5, warm_up=1))
    for n in (1, 12, 3):
        assert strategy.adapt(batch(n, n)).isfinite().all()
    assert strategy.keys.norm(dim=1).allclose(torch.ones(5))


def test_a_model_without_features_is_refused() -> None:
    with pytest.raises(UserError, match="adacontrast needs a model with features and a head"):
        adapting(AdaContrast(), nn.Linear(2, 2), 2)


def test_optimizers() -> None:
    assert set_up(AdaContrast()).descent.defaults["nesterov"]
    assert not set_up(AdaContrast(momentum=0.0)).descent.defaults["nesterov"]
    assert isinstance(set_up(AdaContrast(optimizer="adam")).descent, torch.optim.Adam)
