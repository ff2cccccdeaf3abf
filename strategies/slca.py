"""SLCA: slow learner with classifier alignment."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.nn.gaussians import ClassGaussians, Kind
from clbench.nn.prototypes import only
from clbench.pretrained import in_order, positions, require_classifier
from clbench.samples import Batch, Samples
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Setting, require


@dataclass(kw_only=True)
class SLCA(GradientStrategy):
    """Tunes a pre-trained model slowly, its head fast, and balances the head afterwards.

    Paper: Zhang, Wang, Kang, Chen and Wei 2023, "SLCA: Slow Learner with Classifier Alignment for
    Continual Learning on a Pre-trained Model", arXiv 2303.05118; code: GengDavid/SLCA.

    Training on experience t: minimise the cross-entropy over its own classes, the features at
    backbone_lr, the head at lr; rows of the head that belong to other classes stay as they are.
    Then μ_c and Σ_c are taken of the features of each of its classes.

    Classifier alignment (t > 1): a copy of the head learns to tell apart alignment_samples draws
    of N(s_c μ_c, Σ_c) for each class c met so far, s_c = mean_scale + (1 - mean_scale) t_c / t, c
    being of experience t_c = 1, 2, ...; minimise CE(z / (n temperature), c), z its logits and n
    the mean over experiences of the norm of those of their classes. The copy answers; training
    goes on from the head before alignment.

    Attributes:
        lr: Of the head.
        backbone_lr: Of everything else.
        milestone: Part of the steps of an experience after which both rates are a tenth; 1: never.
        gaussians: "full" covariances, "diagonal" ones, or 10 "centroids" for each class.
        mean_scale: s_c of the oldest class, in the limit of many experiences; 1: no scaling.
        alignment_epochs: Passes of the alignment; 0: none.
        alignment_samples: Drawn of each class in each pass; one step takes as many.
        alignment_lr: Its learning rate, on a cosine over its passes; momentum 0.9, weight_decay
            that of the training.
        temperature: Divides the normalised logits; 0: logits as they are.

    **Differs from the paper:** nothing in the equations. Rows of the head start as the scenario
    makes them, where the code draws them from N(0, 0.02²) without biases. The passes are the
    scenario's; the code's are 20 with the milestone at 18 for CIFAR-100, else 50 and 40. During
    an experience the head before alignment answers, as in the code.

    Memory: a covariance takes 4 (d² + d) bytes, 2.4 MB for 768 features, 236 MB for 100 classes;
    "diagonal" 6 kB, 0.6 MB. `facts` tells how many there were.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.CLASS_INCREMENTAL})

    backbone_lr: float = 1e-4
    milestone: float = 0.9
    gaussians: Kind = "full"
    mean_scale: float = 0.9
    alignment_epochs: int = 5
    alignment_samples: int = 256
    alignment_lr: float = 0.01
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "backbone_lr", "alignment_lr", above=0)
        require(self, "milestone", "mean_scale", at_least=0, at_most=1)
        require(self, "alignment_epochs", "temperature", at_least=0)
        require(self, "alignment_samples", at_least=1)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        classifier = require_classifier("slca", model)
        self._features, self._head = classifier.features, classifier.head
        self.aligned = copy.deepcopy(self._head)
        self.met = torch.zeros(context.n_outputs, dtype=torch.bool, device=context.device)
        self.arrivals: dict[int, int] = {}
        width = self._features.n_features
        self.statistics = ClassGaussians(self.gaussians, width, context.device, seed=context.seed)
        self._learning = False

    # Training.

    def before(self, experience: Experience) -> None:
        """Notes the rows of the head that must not change."""
        self._learning = True
        self._columns = torch.tensor(experience.classes, device=self.context.device)
        self._positions = positions(experience.classes, self.context)
        self.met[self._columns] = True
        others = (self._positions < 0).nonzero().flatten()
        rows = (p for p in self._head.parameters() if p.ndim and len(p) == self.context.n_outputs)
        self._held = [(p, others, p.detach()[others]) for p in rows]

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The features in a group of their own."""
        head = set(self._head.parameters())
        optimizer = super().make_optimizer([p for p in parameters if p in head])
        slow = [p for p in parameters if p not in head]
        optimizer.add_param_group({"params": slow, "lr": self.backbone_lr})
        return optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        if self._learning:
            return super().forward(inputs)
        with self.context.autocast():
            outputs: Tensor = self.aligned(self._features(inputs))
        return outputs.float()

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)[:, self._columns]
        return self.context.objective.loss(outputs, self._positions[batch.targets])

    def descend(self) -> None:
        if self._step == round(self.milestone * self._steps):
            for group in self._optimizer.param_groups:
                # A cosine starts at the initial rate.
                tenth = 0.1 * group.get("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] = tenth
        super().descend()
        with torch.no_grad():
            # Weight decay would shrink them.
            for parameter, others, rows in self._held:
                parameter.index_copy_(0, others, rows)

    # After training.

    def after(self, experience: Experience) -> None:
        assert experience.train is not None
        number = max(self.arrivals.values(), default=0) + 1
        features = self._embed(experience.train)
        for label in experience.train.targets.unique().tolist():
            self.statistics.fit(label, features[experience.train.targets == label])
            self.arrivals[label] = number
        self.aligned.load_state_dict(self._head.state_dict())
        self._learning = False
        if number > 1:
            self._align(number)

    @torch.no_grad()
    def _embed(self, samples: Samples) -> Tensor:
        """Features without augmentation, [N, n_features] in fp32."""
        found = []
        with self.context.autocast():
            for batch in in_order(samples, self.context.scenario.batch_size):
                found.append(self._features(batch.inputs).float())
        return torch.cat(found)

    def _align(self, latest: int) -> None:
        """The copy of the head learns all classes from samples of their Gaussians."""
        generator = self.context.generator("alignment")
        classes = sorted(self.arrivals, key=self.arrivals.__getitem__)
        numbers = [self.arrivals[label] for label in classes]
        sizes = list(Counter(numbers).values())
        scales = [self.mean_scale + (1 - self.mean_scale) * n / latest for n in numbers]
        columns = torch.tensor(classes, device=self.context.device)
        where = positions(tuple(classes), self.context)
        optimizer = torch.optim.SGD(
            self.aligned.parameters(), self.alignment_lr, 0.9, weight_decay=self.weight_decay
        )
        for epoch in range(self.alignment_epochs):
            progress = epoch / self.alignment_epochs
            rate = self.alignment_lr * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = rate
            count = self.alignment_samples
            features, targets = self.statistics.sample(classes, count, generator, scales)
            order = torch.randperm(len(targets), generator=generator, device=targets.device)
            for some in order.split(count):
                with self.context.autocast():
                    outputs = self.aligned(features[some])
                logits = normalised(outputs.float()[:, columns], sizes, self.temperature)
                optimizer.zero_grad()
                self.context.objective.loss(logits, where[targets[some]]).backward()
                optimizer.step()

    def predict(self, batch: Batch) -> Tensor:
        return only(self.met, super().predict(batch))

    def facts(self) -> Mapping[str, Any]:
        """Bytes of means and covariances, of all classes and of one."""
        kept, classes = self.statistics.nbytes, self.statistics.classes
        return {"gaussians_bytes": kept, "gaussians_bytes_per_class": kept / max(len(classes), 1)}


def normalised(logits: Tensor, sizes: Sequence[int], temperature: float) -> Tensor:
    """Logits divided by their mean norm and a temperature.

    Args:
        logits: [B, C], the classes of one experience after those of another.
        sizes: How many classes each experience has, C together.
        temperature: 0: nothing is divided.
    """
    if not temperature:
        return logits
    norms = torch.stack([part.norm(dim=1, keepdim=True) for part in logits.split(sizes, 1)])
    return logits / (norms.mean(0) + 1e-7) / temperature
