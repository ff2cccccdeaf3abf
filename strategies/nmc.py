"""NMC: the nearest mean of frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.heads import Classifier
from clbench.samples import Batch
from clbench.types import CLASSIFICATION, Context, Experience, Setting, Strategy


@dataclass(kw_only=True)
class NMC(Strategy):
    """Names the class whose mean feature is nearest; nothing is trained, nothing is forgotten.

    Paper: Mensink, Verbeek, Perronnin and Csurka 2013, "Distance-Based Image Classification:
    Generalizing to New Classes at Near-Zero Cost"; on frozen pre-trained features Janson et al.
    2022, "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning",
    arXiv 2210.04428 (euclidean), and Zhou et al. 2023, "Revisiting Class-Incremental Learning
    with Pre-Trained Models", arXiv 2303.07338 (SimpleCIL: cosine).

    `strategy=simple_cil` is the cosine form by the name that it has there; on the same weights
    its authors' code (LAMDA-PILOT, models/simplecil.py) gives the same answers: the scale of its
    cosine layer changes no order, and it would replace the mean of a class that comes again,
    which none of its streams has, where here the mean is over all samples.

    Equation: m_c is the mean of f(x) over all samples of class c, a running one, so the order of
    the samples does not matter; output -|f(x) - m_c|² or cos(f(x), m_c).

    Attributes:
        metric: "euclidean" or "cosine".

    **Differs from the paper:** no metric is learned (Mensink et al.); features are as good as
    the scenario's backbone, which starts at random where it has no weights. One pass over each
    experience without augmentation, whatever `epochs` and `passes` of the scenario say.
    """

    settings: ClassVar[frozenset[Setting]] = CLASSIFICATION

    metric: Literal["euclidean", "cosine"] = "cosine"

    def setup(self, model: nn.Module, context: Context) -> None:
        if not isinstance(model, Classifier):
            raise UserError(
                f"nmc needs a model with features and a head (clbench.nn.heads.Classifier), but "
                f"this scenario makes a {type(model).__name__}."
            )
        self.model, self.context = model.eval().requires_grad_(False), context
        shape = context.n_outputs, model.features.n_features
        # Double precision: sums over millions of samples stay exact enough.
        self.sums = torch.zeros(shape, dtype=torch.float64, device=context.device)
        self.counts = torch.zeros(shape[0], dtype=torch.float64, device=context.device)

    def learn(self, experience: Experience) -> None:
        samples = experience.train
        if samples is None:
            return
        everything = torch.arange(len(samples), device=samples.index.device)
        for batch in samples.batches(everything, self.context.scenario.batch_size):
            members = F.one_hot(batch.targets, self.context.n_outputs).double().T
            self.sums += members @ self.features(batch).double()
            self.counts += members.sum(1)
            self.context.on_step(len(batch))

    def predict(self, batch: Batch) -> Tensor:
        features, means = self.features(batch), self.means()
        if self.metric == "cosine":
            scores = F.normalize(features) @ F.normalize(means).T
        else:
            # Differences one by one: |a|² - 2ab + |b|² would lose the digits that decide.
            scores = -torch.cdist(
                features, means, compute_mode="donot_use_mm_for_euclid_dist"
            ).square()
        # Finite: outputs of classes that have not come yet must not be infinite.
        return scores.masked_fill(self.counts == 0, torch.finfo(scores.dtype).min)

    @property
    def keeps_features(self) -> bool:
        return True

    def means(self) -> Tensor:
        """The mean feature of every class, [n_outputs, n_features]; 0 where there is none yet."""
        return (self.sums / self.counts.clamp_min(1).unsqueeze(1)).float()

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """Frozen features, [B, n_features] in fp32."""
        with self.context.autocast():
            features: Tensor = self.model.features(batch.inputs)
        return features.float()
