"""MOS: model surgery."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nn.adapters import Adapters, AdapterSets
from clbench.nn.gaussians import ClassGaussians, Kind
from clbench.nn.prototypes import Prototypes, only
from clbench.nn.vit import vision_transformer
from clbench.pretrained import in_order, require_classifier, require_vision_transformer
from clbench.samples import Batch, Samples
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario, Setting, require

#: Divides the similarities of the orthogonality term, as in the code.
_TEMPERATURE = 0.8


@dataclass(kw_only=True)
class MOS(GradientStrategy):
    """Adapters for each experience, pulled towards the earlier ones, and found again by guessing.

    Paper: Sun, Zhou, Zhao, Gan, Zhan and Ye 2025, "MOS: Model Surgery for Pre-Trained Model-Based
    Class-Incremental Learning", arXiv 2412.09441; code: sun-hailong/LAMDA-PILOT.

    Training on experience b: adapters A_b, which start as A_{b-1} ended, beside the MLPs of a
    frozen vision transformer, and one linear head H for all; minimise the cross-entropy over the
    classes of b + orthogonality · L. L is the cross-entropy of the similarities M Mᵀ / 0.8, each
    row of M belonging to itself; M: the means of old classes, then the features of the batch.
    Progressive merging, after every step, in every tensor:
    A_b ← (1 - alpha) A_b + alpha · mean of A_1 ... A_{b-1}.

    Then (b > 1) classifier alignment: H alone learns to tell samples of N(μ_c, Σ_c) of all
    classes apart, μ_c and Σ_c being those of the features of class c with the adapters of its
    experience. Prototypes p_c are the class means with A_1.

    Output: z⁰ = cos(f_1(x), p_c) says which experience, k, the nearest class came with. Then
    self-refined retrieval: z = H(f_k(x)) says which one the best class came with; until that is
    k itself, z is computed anew with its adapters, retrieval_steps times at most. Two-stage
    ensemble: log of the mean of softmax(z) and softmax(b z⁰).

    Attributes:
        bottleneck: Rows of W_d in an adapter A(x) = s (W_u ReLU(W_d x + b_d) + b_u).
        adapter_scale: s.
        dropout: On the hidden units of the adapters, in training.
        alpha: Pull towards the mean of earlier adapters in a step, in [0, 1].
        merge_mode: "paper", or "code": see below.
        orthogonality: Weight of L.
        head_ratio: Learning rate of the head, as a part of lr.
        gaussians: "full" covariances, "diagonal" ones, or 10 "centroids" for each class.
        alignment_epochs: Passes of the alignment; 0: none.
        alignment_lr: Its learning rate, on a cosine over its passes; momentum and weight_decay
            are those of the training.
        alignment_samples: Drawn of each class in each pass, in units of the batch size; one step
            takes as many.
        retrieval_steps: Most adapters tried for an image after A_1.
        ensemble: False: z is the output.

    **Differs from the paper:** L is in the code alone; so are the choices of optimizer, which
    are its. The learning rate follows its cosine after every step, where the code follows it
    after every epoch; the passes are the scenario's. Only adapters that an image visits are run
    on it: of the b + 1 passes of the code it takes 1 to retrieval_steps + 1; `facts` tells how
    many on average. During an experience the answers are those of the experience before.
    Centroids: see `clbench.nn.gaussians`.

    The released code merges not only after each step but in every forward pass, once for each
    block, statistics and evaluation included. `strategy=mos_code` (merge_mode "code") does what
    that comes to: block l (of L) trains after l more merges and steps after L of them; adapters
    drift on while statistics are gathered, in batches of 3 batch sizes of one class, and the next
    experience starts from there; at test A_b is the mean of A_1 ... A_{b-1}, which every batch of
    the code's evaluation nears by (1 - alpha)^L, 0.28 for 12 blocks, until nothing is left of
    what b learned. Here it is so from the first image on.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.CLASS_INCREMENTAL})

    bottleneck: int = 16
    adapter_scale: float = 0.1
    dropout: float = 0.1
    alpha: float = 0.1
    merge_mode: Literal["paper", "code"] = "paper"
    orthogonality: float = 0.1
    head_ratio: float = 0.1
    gaussians: Kind = "full"
    alignment_epochs: int = 30
    alignment_lr: float = 0.005
    alignment_samples: int = 5
    retrieval_steps: int = 4
    ensemble: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "bottleneck", "alignment_samples", "retrieval_steps", at_least=1)
        require(self, "adapter_scale", "head_ratio", "alignment_lr", above=0)
        require(self, "dropout", "alpha", at_least=0, at_most=1)
        require(self, "orthogonality", "alignment_epochs", at_least=0)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        require_vision_transformer("mos", scenario)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        classifier = require_classifier("mos", model)
        self._features, self._head = classifier.features, classifier.head
        self._features.requires_grad_(False)
        self._vit = vision_transformer(model)
        generator = context.generator("adapters", torch.device("cpu"))
        scale, dropout = self.adapter_scale, self.dropout
        adapters = Adapters(self._vit, self.bottleneck, scale, dropout, generator)
        self._current = adapters.to(context.device).eval()
        model.add_module("adapters", self._current)
        self.adapters = AdapterSets(self._current)
        self.total = [torch.zeros_like(p) for p in self._current.parameters()]
        self.owners = torch.full((context.n_outputs,), -1, device=context.device)
        width = self._features.n_features
        self.prototypes = Prototypes(context.n_outputs, width).to(context.device)
        self.statistics = ClassGaussians(self.gaussians, width, context.device, seed=context.seed)
        self._images = self._passes = 0

    # Training.

    def before(self, experience: Experience) -> None:
        """What the earlier experiences have to say: mean adapters, and the classes' means."""
        self._mean = [total / len(self.adapters) for total in self.total] if self.adapters else []
        absent = torch.ones(self.context.n_outputs, dtype=torch.bool)
        absent[list(experience.classes)] = False
        self._absent = absent.to(self.context.device)
        old = self.statistics.classes
        self._means = self.statistics.means(old) if old else self.prototypes.means()[:0]

    def begin(self, steps: int) -> None:
        super().begin(steps)
        self._features.eval()

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The head in a group of its own, where it learns more slowly."""
        head = set(self._head.parameters())
        optimizer = super().make_optimizer([p for p in parameters if p not in head])
        rate = self.lr * self.head_ratio
        optimizer.add_param_group({"params": [p for p in parameters if p in head], "lr": rate})
        return optimizer

    def loss(self, batch: Batch) -> Tensor:
        if self.merge_mode == "code":
            self._merge(range(1, len(self._current) + 1))
        features = self.features(batch.inputs, self._current)
        outputs = self._classify(features).masked_fill(self._absent, -torch.inf)
        loss = self.context.objective.loss(outputs, batch.targets)
        if not self.orthogonality:
            return loss
        return loss + self.orthogonality * apartness(torch.cat((self._means, features)))

    def update(self, loss: Tensor) -> None:
        super().update(loss)
        self._merge([1] * len(self._current))

    def descend(self) -> None:
        if self.merge_mode == "code":
            self._merge(range(len(self._current) - 1, -1, -1))
        super().descend()

    def _merge(self, times: Sequence[int]) -> None:
        """Pulls each block's adapter towards the mean of the earlier ones."""
        if self._mean:
            merge(self._current, self._mean, self.alpha, times)

    # After training.

    def after(self, experience: Experience) -> None:
        assert experience.train is not None
        self.adapters.add(self._current)
        ended = self._current.parameters()
        self.total = [total + p.detach() for total, p in zip(self.total, ended, strict=True)]
        if self.merge_mode == "code" and self.alpha and self._mean:
            merge(self.adapters.of(-1), self._mean, 1.0, [1] * len(self._current))
        self.owners[list(experience.classes)] = len(self.adapters) - 1
        self._gather(experience.train)
        if len(self.adapters) > 1 and self.alignment_epochs:
            self._align()
        self._images = self._passes = 0

    @torch.no_grad()
    def _gather(self, samples: Samples) -> None:
        """Statistics of each class with its adapters, and its mean with the first ones."""
        size = 3 * self.context.scenario.batch_size
        for label in samples.targets.unique().tolist():
            mine = samples.subset((samples.targets == label).nonzero().flatten())
            found = []
            for batch in in_order(mine, size):
                found.append(self._drifting_features(batch.inputs))
                first = found[-1]
                if len(self.adapters) > 1:
                    first = self.features(batch.inputs, self.adapters.of(0))
                self.prototypes.add(first, batch.targets)
            self.statistics.fit(label, torch.cat(found))

    def _drifting_features(self, inputs: Tensor) -> Tensor:
        """Features with the current adapters, which the code's form merges on in every pass."""
        if self.merge_mode == "paper":
            return self.features(inputs, self._current)
        self._merge(range(1, len(self._current) + 1))
        features = self.features(inputs, self._current)
        self._merge(range(len(self._current) - 1, -1, -1))
        return features

    def _align(self) -> None:
        """The head learns all classes from samples of their Gaussians."""
        classes, generator = self.statistics.classes, self.context.generator("alignment")
        size = self.alignment_samples * self.context.scenario.batch_size
        parameters = list(self._head.parameters())
        optimizer = torch.optim.SGD(
            parameters, self.alignment_lr, self.momentum, weight_decay=self.weight_decay
        )
        for epoch in range(self.alignment_epochs):
            progress = epoch / self.alignment_epochs
            rate = self.alignment_lr * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = rate
            features, targets = self.statistics.sample(classes, size, generator)
            order = torch.randperm(len(targets), generator=generator, device=targets.device)
            for some in order.split(size):
                outputs = self._classify(features[some]).masked_fill(self.owners < 0, -torch.inf)
                optimizer.zero_grad()
                self.context.objective.loss(outputs, targets[some]).backward()
                optimizer.step()

    # Prediction.

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        known = self.owners >= 0
        if not self.adapters:
            return only(known, torch.zeros(len(batch), len(known), device=known.device))
        first = self.features(batch.inputs, self.adapters.of(0))
        self._images += len(batch)
        self._passes += len(batch)
        distant = self.prototypes.cosines(first)
        refined = self.retrieve(batch.inputs, first, self.owners[distant.argmax(1)])
        if not self.ensemble:
            return refined
        # softmax(b z⁰) can't be zero, as cosines lie in [-1, 1], but b is not bounded.
        both = refined.softmax(1) + (len(self.adapters) * distant).softmax(1)
        return only(known, (both / 2).clamp_min(torch.finfo(both.dtype).tiny).log())

    def retrieve(self, inputs: Tensor, first: Tensor, guess: Tensor) -> Tensor:
        """z of the adapters that name themselves, or of those tried last.

        Each step runs, for each set of adapters, the samples that come to it for the first time;
        one that has settled comes to the same set again.

        Args:
            inputs: [B, ...].
            first: Features with A_1, [B, n_features].
            guess: Where to start: the position of a set of adapters for each sample, [B].

        Returns:
            [B, n_outputs], the least finite number for classes that have not come.
        """
        known = self.owners >= 0
        outputs = only(known, self._classify(first))
        tried = [(torch.zeros_like(guess), outputs)]
        for _ in range(self.retrieval_steps):
            outputs = torch.empty_like(outputs)
            new = torch.ones_like(guess, dtype=torch.bool)
            for place, old in tried:
                again = new & (place == guess)
                outputs[again] = old[again]
                new &= ~again
            for k in guess[new].unique().tolist():
                mine = (new & (guess == k)).nonzero().flatten()
                features = self.features(inputs[mine], self.adapters.of(k))
                outputs[mine] = only(known, self._classify(features))
                self._passes += len(mine)
            tried.append((guess, outputs))
            guess = self.owners[outputs.argmax(1)]
        return outputs

    def features(self, inputs: Tensor, adapters: Adapters) -> Tensor:
        """Features with a set of adapters, [B, n_features] in fp32."""
        with adapters.put_into(self._vit), self.context.autocast():
            features: Tensor = self._features(inputs)
        return features.float()

    def _classify(self, features: Tensor) -> Tensor:
        with self.context.autocast():
            outputs: Tensor = self._head(features)
        return outputs.float()

    def facts(self) -> Mapping[str, Any]:
        """Passes through the model for each image, since the end of the last experience."""
        if not self._images:
            return {}
        return {"mean_passes_per_prediction": self._passes / self._images}


def apartness(rows: Tensor) -> Tensor:
    """Cross-entropy of each row's similarities to all rows, [N, D], with itself the answer."""
    similarities = rows @ rows.T / _TEMPERATURE
    return F.cross_entropy(similarities, torch.arange(len(rows), device=rows.device))


@torch.no_grad()
def merge(adapters: Adapters, means: Sequence[Tensor], alpha: float, times: Sequence[int]) -> None:
    """A ← (1 - alpha) A + alpha · mean, some times over.

    Args:
        adapters: To change.
        means: One for each parameter of all blocks, in order.
        alpha: In [0, 1].
        times: How often, for each block.
    """
    start = 0
    for adapter, count in zip(adapters, times, strict=True):
        tensors: list[Tensor] = list(adapter.parameters())
        mine = list(means[start : start + len(tensors)])
        torch._foreach_lerp_(tensors, mine, 1 - (1 - alpha) ** count)
        start += len(tensors)
