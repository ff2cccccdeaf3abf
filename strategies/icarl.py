"""iCaRL: incremental classifier and representation learning."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.heads import Classifier
from clbench.nn.joined import join
from clbench.samples import Batch, Samples, TensorSource
from clbench.training import GradientStrategy
from clbench.types import Context, Experience, Scenario, Setting

#: Samples whose features are computed at once; decides speed and nothing else.
_AT_ONCE = 256


@dataclass(kw_only=True)
class ICaRL(GradientStrategy):
    """Distils the old outputs, and names the class whose exemplars lie nearest.

    Paper: Rebuffi, Kolesnikov, Sperl and Lampert 2017, "iCaRL: Incremental Classifier and
    Representation Learning", arXiv 1611.07725, algorithms 1 to 5.

    Training on the new samples and all exemplars: minimise the binary cross-entropy of every
    class met so far, σ(h_y(x)) against [y = label] for new classes and against the output σ(h_y)
    of the model before this experience for old ones; summed over classes, mean over samples.

    Exemplars: memory_size / classes of each class, the first of a list in which the k-th is
    argmin_x |μ - (φ(x) + Σ_{j<k} φ(p_j)) / k|, φ(x) = f(x)/|f(x)|, μ their class mean; when
    classes come, lists are cut from the end.

    Output: -|φ(x) - μ̂_y|² with μ̂_y the mean of φ over the exemplars, brought to length 1.

    **Differs from the paper:** the old outputs are those for the augmented sample, as in the
    official code; that code averages over all classes of the stream, those to come included (its
    lr 2 for 100 classes is lr 0.02 here), picks memory_size / classes rounded up, and adds
    mirrored exemplars to the means. A sample is an exemplar once at most. Between the start of an
    experience and its end, the means are those of the experience before.
    """

    settings: ClassVar[frozenset[Setting]] = frozenset({Setting.CLASS_INCREMENTAL})

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if not scenario.memory_size:
            raise UserError(
                "icarl classifies by its stored exemplars, but scenario.memory_size=0. Set it to "
                "at least the number of classes."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        if not isinstance(model, Classifier):
            raise UserError(
                f"icarl needs a model with features and a head (clbench.nn.heads.Classifier), but "
                f"this scenario makes a {type(model).__name__}."
            )
        if context.scenario.memory_size < context.n_outputs:
            raise UserError(
                f"icarl keeps an exemplar of every class: scenario.memory_size="
                f"{context.scenario.memory_size} is too small for {context.n_outputs} classes."
            )
        self._features = model.features
        self.exemplars: dict[int, Tensor] = {}
        shape = context.n_outputs, model.features.n_features
        self.means = torch.zeros(shape, device=context.device)

    def material(self, experience: Experience) -> Samples:
        """New samples and all exemplars."""
        new = super().material(experience)
        return join([new, self.stored()]) if self.exemplars else new

    def before(self, experience: Experience) -> None:
        """The model as it is gives the targets of the classes met so far."""
        self._old_model = copy.deepcopy(self.model).requires_grad_(False)
        new = [c for c in experience.classes if c not in self.exemplars]
        self._n_old = len(self.exemplars)
        self._columns = torch.tensor([*self.exemplars, *new], device=self.context.device)

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)[:, self._columns]
        targets = (batch.targets.unsqueeze(1) == self._columns).float()
        if self._n_old:
            with torch.no_grad(), self.context.autocast():
                old = self._old_model(batch.inputs).float()[:, self._columns[: self._n_old]]
            targets[:, : self._n_old] = old.sigmoid()
        loss = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
        return loss / len(batch)

    def after(self, experience: Experience) -> None:
        assert experience.train is not None
        self.select(experience.train)
        stored = self.stored()
        members = F.one_hot(stored.targets, self.context.n_outputs).float().T
        self.means = F.normalize(members @ self.embed(stored))

    def select(self, samples: Samples) -> None:
        """The exemplar sets: fewer of each old class, herded ones of each new class."""
        new = [c for c in samples.targets.unique().tolist() if c not in self.exemplars]
        share = self.context.scenario.memory_size // (len(self.exemplars) + len(new))
        self.exemplars = {c: raw[:share].clone() for c, raw in self.exemplars.items()}
        for label in new:
            mine = samples.subset((samples.targets == label).nonzero().flatten())
            self.exemplars[label] = mine.take(herd(self.embed(mine), share)).raw

    def stored(self) -> Samples:
        """All exemplars, class by class."""
        device = self.context.device
        counts = torch.tensor([len(raw) for raw in self.exemplars.values()])
        targets = torch.tensor(list(self.exemplars)).repeat_interleave(counts).to(device)
        source = TensorSource(torch.cat(list(self.exemplars.values())), targets)
        everything = torch.arange(len(targets), device=device)
        return Samples(source, everything, self.context.transform)

    def predict(self, batch: Batch) -> Tensor:
        training = self.model.training
        self.model.eval()
        # |a - b|² = 2 - 2ab for vectors of length 1.
        scores = 2 * self.unit_features(batch.inputs) @ self.means.T - 2
        self.model.train(training)
        # Finite: outputs of classes that have not come yet must not be infinite.
        return scores.masked_fill(~self.means.any(1), torch.finfo(scores.dtype).min)

    def unit_features(self, inputs: Tensor) -> Tensor:
        """φ(x): features of length 1, [B, n_features] in fp32."""
        with self.context.autocast():
            features: Tensor = self._features(inputs)
        return F.normalize(features.float())

    @torch.no_grad()
    def embed(self, samples: Samples) -> Tensor:
        """φ of samples without augmentation, [N, n_features]."""
        everything = torch.arange(len(samples), device=samples.index.device)
        batches = samples.batches(everything, _AT_ONCE)
        return torch.cat([self.unit_features(batch.inputs) for batch in batches])

    @property
    def memory_samples(self) -> int:
        return sum(map(len, self.exemplars.values()))


def herd(features: Tensor, count: int) -> Tensor:
    """Samples whose running mean stays nearest to the mean of all, the best first.

    Args:
        features: φ(x) of one class, [N, n_features].
        count: How many; all if there are fewer.

    Returns:
        Their positions, [min(count, N)] int64, all different.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    squares = features.square().sum(1)
    chosen = []
    for k in range(1, min(count, len(features)) + 1):
        # k² |μ - (φ + total)/k|² without the part that is the same for all samples.
        best = (squares - 2 * features @ (k * mean - total)).argmin().view(1)
        total = total + features.index_select(0, best).squeeze(0)
        squares = squares.index_fill(0, best, torch.inf)
        chosen.append(best)
    return torch.cat(chosen)
