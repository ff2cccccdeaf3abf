"""MOS and L2P beside plain loops: the same steps on one small vision transformer. Not a test.

    python tests/speed/vit_by_loops.py [--rounds 5] [--epochs 4] [--images 20]

Glyphs, ten classes in each experience. Both sides learn the second experience, again and again,
from the weights that the suite had after the first; images are in memory, batches and dropout are
the same, so that the accuracies agree to the digit. The loops call the modules of timm's
transformer one after another; they have no hooks, no strategies, PyTorch's default optimizers. A
ratio compares CPU seconds of two runs of one round. Accuracy: on test images of the experience,
among its classes, after all rounds.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mos_passes import LEARNERS, RandomViT, prepared
from torch import Tensor, nn
from torch.nn import functional as F
from turns import Pass, compare, show

from clbench.machine import isolated_rng
from clbench.training import GradientStrategy
from clbench.types import Experience, Split
from scenarios.glyphs import Glyphs
from strategies.l2p import L2P
from strategies.mos import MOS

#: With the optimizers of conf/strategy.
METHODS: Mapping[str, GradientStrategy] = {"mos": LEARNERS["mos"], "l2p": L2P()}

Answer = Callable[[Tensor], Tensor]


class Task:
    """The second experience of a stream, and a method of the suite that has learned the first."""

    def __init__(self, name: str, epochs: int, images: int) -> None:
        self.name = name
        self.scenario = Glyphs(
            backbone=RandomViT(),
            n_experiences=2,
            n_classes=20,
            train_per_class=images,
            epochs=epochs,
        )
        stream = self.scenario.stream(Split.EVALUATE, 0)
        self.strategy = prepared(METHODS[name], self.scenario)
        with isolated_rng(0, "learn"):
            self.strategy.learn(stream.experiences[0])
        self.experience: Experience = stream.experiences[1]
        assert self.experience.train is not None
        self.classes = torch.tensor(self.experience.classes)
        train, test = self.experience.train, stream.tests[1]
        whole = (part.take(torch.arange(len(part))) for part in (train, test))
        (self.x, self.y), (self.test_x, self.test_y) = ((w.inputs, w.targets) for w in whole)

    def accuracy(self, answer: Answer) -> float:
        """Of logits of all classes."""
        with torch.no_grad():
            best = answer(self.test_x)[:, self.classes].argmax(1)
        return float((self.classes[best] == self.test_y).float().mean())

    def suite(self) -> Pass:
        strategy = self.strategy
        assert self.experience.train is not None
        train = self.experience.train

        def answer(images: Tensor) -> Tensor:
            if isinstance(strategy, MOS):
                adapters: Any = strategy.model.get_submodule("adapters")
                logits: Tensor = strategy.model.get_submodule("head")(
                    strategy.features(images, adapters)
                )
                return logits
            return strategy.forward(images)

        def run() -> Callable[[], float]:
            with isolated_rng(0, "learn"):
                strategy.before(self.experience)
                strategy.fit(train)
            return lambda: self.accuracy(answer)

        return run

    def contenders(self) -> dict[str, Pass]:
        """The suite, and the loop from the weights that the suite has now."""
        loop = (MOSByHand if self.name == "mos" else L2PByHand)(self)

        def by_hand() -> Callable[[], float]:
            with isolated_rng(0, "learn"):
                return loop.run()

        return {"clbench": self.suite(), "by hand": by_hand}


class ByHand:
    """What the two loops share: a frozen transformer, a head, shuffled epochs.

    Args:
        task: Whose model's weights are copied.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        model: Any = copy.deepcopy(task.strategy.model)
        self.vit, self.head = model.features.model, model.head
        self.absent = torch.ones(self.head.out_features, dtype=torch.bool)
        self.absent[task.classes] = False
        self.shuffle = torch.Generator()
        self.shuffle.set_state(task.strategy.context.generator("shuffle").get_state())

    def logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features).masked_fill(self.absent, -torch.inf)
        return logits

    def tokens(self, images: Tensor) -> Tensor:
        """Class token and patches, with their positions."""
        patches = self.vit.patch_embed(images)
        first = self.vit.cls_token.expand(len(images), -1, -1)
        tokens: Tensor = torch.cat((first, patches), 1) + self.vit.pos_embed
        return tokens

    def batches(self) -> list[Tensor]:
        """Positions of every step."""
        count, scenario = len(self.task.x), self.task.scenario
        orders = [torch.randperm(count, generator=self.shuffle) for _ in range(scenario.epochs)]
        return [chosen for order in orders for chosen in order.split(scenario.batch_size)]


class MOSByHand(ByHand):
    """Adapters beside the MLPs, pulled towards the earlier ones after each step."""

    alpha, orthogonality, temperature, scale = 0.1, 0.1, 0.8, 0.1

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        mos = task.strategy
        assert isinstance(mos, MOS)
        first: Any = copy.deepcopy(mos.adapters.of(0))
        self.adapters = nn.ModuleList(
            nn.Sequential(a.down, nn.ReLU(), nn.Dropout(0.1), a.up) for a in first
        ).requires_grad_(True)
        self.earlier = [p.detach().clone() for p in self.adapters.parameters()]
        self.means = mos.statistics.means(mos.statistics.classes)

    def features(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for block, adapter in zip(self.vit.blocks, self.adapters, strict=True):
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x)) + self.scale * adapter(x)
        features: Tensor = self.vit.norm(x)[:, 0]
        return features

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.features(x)
        rows = torch.cat((self.means, features))
        apart = F.cross_entropy(rows @ rows.T / self.temperature, torch.arange(len(rows)))
        return F.cross_entropy(self.logits(features), y) + self.orthogonality * apart

    def run(self) -> Callable[[], float]:
        weights = list(self.adapters.parameters())
        groups = [{"params": weights}, {"params": self.head.parameters(), "lr": 0.003}]
        optimizer = torch.optim.SGD(groups, 0.03, momentum=0.9, weight_decay=5e-4)
        steps = self.batches()
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        )
        self.adapters.train()
        for chosen in steps:
            optimizer.zero_grad()
            self.loss(self.task.x[chosen], self.task.y[chosen]).backward()
            optimizer.step()
            cosine.step()
            with torch.no_grad():
                for weight, earlier in zip(weights, self.earlier, strict=True):
                    weight.lerp_(earlier, self.alpha)
        self.adapters.eval()
        return lambda: self.task.accuracy(lambda x: self.logits(self.features(x)))


class L2PByHand(ByHand):
    """Prompts from a pool, before the tokens of an image; queries known in advance."""

    top_k, pull = 5, 0.5

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        pool: Any = task.strategy.model.get_submodule("prompts")
        self.prompts, self.keys = (
            nn.Parameter(p.detach().clone()) for p in (pool.prompts, pool.keys)
        )

    @torch.no_grad()
    def queries(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for block in self.vit.blocks:
            x = block(x)
        features: Tensor = self.vit.norm(x)[:, 0]
        return features

    def prompted(self, images: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Features by the chosen prompts, and the cosines of their keys."""
        matches = F.normalize(queries, dim=1) @ F.normalize(self.keys, dim=1).T
        best, chosen = matches.topk(self.top_k, dim=1)
        prompts = self.prompts[chosen].flatten(1, 2)
        x = torch.cat((self.tokens(images), prompts), 1)
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x)[:, -prompts.shape[1] :].mean(1), best

    def run(self) -> Callable[[], float]:
        trained = [self.prompts, self.keys, *self.head.parameters()]
        optimizer = torch.optim.Adam(trained, 0.00375)
        size = self.task.scenario.batch_size
        queries = torch.cat([self.queries(x) for x in self.task.x.split(size)])
        for chosen in self.batches():
            features, matches = self.prompted(self.task.x[chosen], queries[chosen])
            loss = F.cross_entropy(self.logits(features), self.task.y[chosen])
            optimizer.zero_grad()
            (loss - self.pull * matches.sum(1).mean()).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        return lambda: self.task.accuracy(
            lambda x: self.logits(self.prompted(x, self.queries(x))[0])
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=20, help="of each class to learn from")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in METHODS:
        task = Task(name, asked.epochs, asked.images)
        seconds = compare(task.contenders(), asked.rounds)
        show(name, seconds, "by hand", asked.epochs * len(task.x))


if __name__ == "__main__":
    main()
