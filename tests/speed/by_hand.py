"""Class-incremental learning written by hand: tensors in memory, one model, no library."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from watch import EVALUATE_AT_ONCE, LEARNING_RATE, Job, Watch

STEPS_AT_ONCE = 32


class Finetune:
    """The loss of a step, and what is kept; methods change what they need."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        self.model, self.job = model, job

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def observe(self, x: Tensor, y: Tensor) -> None:
        """After the step on a batch."""

    def after(self, x: Tensor, y: Tensor) -> None:
        """After the last step on an experience."""


class Reservoir:
    """Samples with anything that belongs to them, each row as likely as any other."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.rows: list[Tensor] = []

    def draw(self, count: int) -> list[Tensor]:
        drawn = torch.randperm(min(self.seen, self.size))[:count]
        return [row[drawn] for row in self.rows]

    def add(self, *columns: Tensor) -> None:
        if not self.rows:
            self.rows = [column.new_empty(self.size, *column.shape[1:]) for column in columns]
        slots = reservoir_slots(torch.arange(self.seen, self.seen + len(columns[0])), self.size)
        kept = slots < self.size
        for row, column in zip(self.rows, columns, strict=True):
            row[slots[kept]] = column[kept]
        self.seen += len(columns[0])


class Replay(Finetune):
    """Stored samples beside the new ones, in one pass."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        super().__init__(model, job)
        self.memory = Reservoir(job.memory_size)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.memory.seen:
            old_x, old_y = self.memory.draw(self.job.batch_size)
            x, y = torch.cat((x, old_x)), torch.cat((y, old_y))
        return super().loss(x, y)

    def observe(self, x: Tensor, y: Tensor) -> None:
        self.memory.add(x, y)


class DERpp(Replay):
    """Three passes: new samples, stored ones against their logits, others against their labels."""

    alpha, beta = 0.1, 0.5

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        outputs = self.model(x)
        self.logits = outputs.detach()
        loss = F.cross_entropy(outputs, y)
        if not self.memory.seen:
            return loss
        old, _, logits = self.memory.draw(self.job.batch_size)
        loss = loss + self.alpha * F.mse_loss(self.model(old), logits)
        old, labels, _ = self.memory.draw(self.job.batch_size)
        return loss + self.beta * F.cross_entropy(self.model(old), labels)

    def observe(self, x: Tensor, y: Tensor) -> None:
        self.memory.add(x, y, self.logits)


class EWC(Finetune):
    """A penalty for each earlier experience; Fisher information of the batches' mean gradients."""

    #: With more, SGD diverges on the slim ResNet, whose Fisher information is large.
    ewc_lambda = 1e-3

    def __init__(self, model: nn.Module, job: Job) -> None:
        super().__init__(model, job)
        self.old: list[tuple[list[Tensor], list[Tensor]]] = []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(x, y)
        for fisher, anchors in self.old:
            for p, f, a in zip(self.model.parameters(), fisher, anchors, strict=True):
                loss = loss + 0.5 * self.ewc_lambda * (f * (p - a) ** 2).sum()
        return loss

    def after(self, x: Tensor, y: Tensor) -> None:
        self.model.eval()
        batches = torch.randperm(len(x)).split(self.job.batch_size)
        fisher = [torch.zeros_like(p) for p in self.model.parameters()]
        for chosen in batches:
            self.model.zero_grad()
            F.cross_entropy(self.model(x[chosen]), y[chosen]).backward()
            for f, p in zip(fisher, self.model.parameters(), strict=True):
                assert p.grad is not None
                f += p.grad**2 / len(batches)
        self.old.append((fisher, [p.detach().clone() for p in self.model.parameters()]))


class LwF(Finetune):
    """The answers of the model before, over the classes that it had met."""

    lwf_lambda, temperature = 3.0, 2.0

    def __init__(self, model: nn.Module, job: Job) -> None:
        super().__init__(model, job)
        self.met = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        outputs = self.model(x)
        loss = F.cross_entropy(outputs, y)
        if not self.met:
            return loss
        with torch.no_grad():
            then = F.softmax(self.teacher(x)[:, : self.met] / self.temperature, 1)
        now = F.log_softmax(outputs[:, : self.met] / self.temperature, 1)
        return loss + self.lwf_lambda * F.kl_div(now, then, reduction="batchmean")

    def after(self, x: Tensor, y: Tensor) -> None:  # noqa: ARG002
        self.teacher = copy.deepcopy(self.model).eval()
        self.met = int(y.max()) + 1


class Refresh(DERpp):
    """A noisy step uphill on DER++'s loss, on the samples of the step that follows it."""

    gamma, damping, decay, samples = 1e-9, 1e-3, 1e-5, 1000

    def __init__(self, model: nn.Module, job: Job) -> None:
        super().__init__(model, job)
        self.named = dict(model.named_parameters())
        self.weights = list(self.named.values())
        self.noise = torch.Generator().manual_seed(0)
        self.know([torch.zeros_like(w) for w in self.weights])

    def know(self, fisher: list[Tensor]) -> None:
        """What the steps of an experience need of it."""
        self.fisher = fisher
        self.drift = [self.gamma / (f + self.damping) for f in fisher]
        self.spread = [(2 * d).sqrt() for d in self.drift]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        kept, state = [b.clone() for b in self.model.buffers()], torch.get_rng_state()
        uphill = torch.autograd.grad(super().loss(x, y), self.weights)
        torch.set_rng_state(state)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(before)
            for w, g, d, s in zip(self.weights, uphill, self.drift, self.spread, strict=True):
                w.addcmul_(d, g).addcmul_(s, torch.randn(w.shape, generator=self.noise))
        return super().loss(x, y)

    def after(self, x: Tensor, y: Tensor) -> None:
        """Fisher information: squared gradients of single samples, many at once by vmap."""

        def of_one(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            outputs = functional_call(self.model, weights, (image[None],))
            return F.cross_entropy(outputs, label[None])

        self.model.eval()
        chosen = torch.randperm(len(x))[: self.samples]
        fisher = [self.decay * f for f in self.fisher]
        for some in chosen.split(STEPS_AT_ONCE):
            each = vmap(grad(of_one), (None, 0, 0))(self.named, x[some], y[some])
            for f, g in zip(fisher, each.values(), strict=True):
                f += g.detach().square().sum(0) / len(chosen)
        self.know(fisher)


Method = Callable[[nn.Module, Job], Finetune]


def plain(method: Method, job: Job, watch: Watch) -> None:
    """A loop as one would write it: no `DataLoader`, evaluation in large batches."""
    train, test, model = job.prepared()
    learner = method(model, job)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for index, (x, y) in enumerate(train):
        with watch.training():
            model.train()
            for chosen in torch.randperm(len(x)).split(job.batch_size):
                batch_x, batch_y = gathered(x, y, chosen)
                optimizer.zero_grad()
                learner.loss(batch_x, batch_y).backward()
                optimizer.step()
                learner.observe(batch_x, batch_y)
            learner.after(x, y)
        with watch.evaluating(), torch.no_grad():
            model.eval()
            met = job.classes * (index + 1)
            watch.accuracies = []
            for some_x, some_y in test[: index + 1]:
                right = 0
                for inputs, labels in zip(
                    some_x.split(EVALUATE_AT_ONCE), some_y.split(EVALUATE_AT_ONCE), strict=True
                ):
                    right += int((model(inputs)[:, :met].argmax(1) == labels).sum())
                watch.accuracies.append(right / len(some_y))


def gathered(x: Tensor, y: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """A batch."""
    return x[chosen], y[chosen]


def limit(job: Job, watch: Watch) -> None:
    """Replay with every trick that keeps the steps: a plan in advance, fused SGD, one pass to test.

    The plan names the samples of every step, replayed ones included, so that a step is a slice
    of one gather for many steps. It needs all past data at hand, which no strategy may have.
    """
    train, test, model = job.prepared()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, fused=True)
    (all_x, all_y), (test_x, test_y) = _joined(train), _joined(test)
    owner = torch.arange(len(test)).repeat_interleave(torch.tensor([len(y) for _, y in test]))
    memory = np.full(job.memory_size, -1)
    seen = 0
    for index, (_, labels) in enumerate(train):
        with watch.training():
            model.train()
            steps = _plan(seen + torch.randperm(len(labels)), memory, seen, job)
            for begin in range(0, len(steps), STEPS_AT_ONCE):
                group = steps[begin : begin + STEPS_AT_ONCE]
                sizes, joined = [len(step) for step in group], torch.cat(group)
                xs, ys = all_x.index_select(0, joined), all_y.index_select(0, joined)
                for x, y in zip(xs.split(sizes), ys.split(sizes), strict=True):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
            seen += len(labels)
        with watch.evaluating(), torch.inference_mode():
            model.eval()
            met = owner[owner <= index]
            outputs = torch.cat([model(x) for x in test_x[: len(met)].split(EVALUATE_AT_ONCE)])
            answers = outputs[:, : job.classes * (index + 1)].argmax(1)
            right = torch.bincount(met[answers == test_y[: len(met)]], minlength=index + 1)
            watch.accuracies = (right / torch.bincount(met)).tolist()


def _plan(order: Tensor, memory: np.ndarray, seen: int, job: Job) -> list[Tensor]:
    """Positions of every step's samples; leaves in `memory` who is stored at the end."""
    size, width = job.memory_size, job.batch_size
    arriving = order.numpy()
    slots = reservoir_slots(torch.arange(seen, seen + len(order)), size).numpy()
    random = np.random.default_rng(seen)
    steps = []
    for begin in range(0, len(order), width):
        batch, places = arriving[begin : begin + width], slots[begin : begin + width]
        drawn = random.permutation(min(seen + begin, size))[:width]
        steps.append(torch.from_numpy(np.concatenate((batch, memory[drawn]))))
        kept = places < size
        memory[places[kept]] = batch[kept]
    return steps


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def reservoir_slots(arrival: Tensor, size: int) -> Tensor:
    """Where each sample goes, by its place in the stream; nowhere from `size` on. Algorithm R."""
    drawn = (torch.rand(len(arrival), dtype=torch.float64) * (arrival + 1)).long()
    return torch.where(arrival < size, arrival, drawn)
