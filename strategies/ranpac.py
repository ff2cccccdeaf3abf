"""RanPAC: random projections, and a classifier in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nn.prototypes import only
from clbench.nn.ridge import RidgeRegression, held_out_errors
from clbench.pretrained import TunedOnce
from clbench.samples import Batch
from clbench.types import Context, Experience, require

#: What is tried where the ridge is not given, as in the code.
RIDGES = tuple(10.0**exponent for exponent in range(-8, 9))
#: Inputs of the projection for which the code has 10,000 outputs.
_PAPER = 10_000 / 768
#: Samples projected at once; decides speed and memory.
_AT_ONCE = 1024


@dataclass(kw_only=True)
class RanPAC(TunedOnce):
    """Linear regression on random features of a model tuned in the first experience alone.

    Paper: McDonnell, Gong, Parvaneh, Abbasnejad and van den Hengel 2023, "RanPAC: Random
    Projections and Pre-trained Models for Continual Learning", arXiv 2307.02251; code:
    RanPAC/RanPAC.

    Equation: h(x) = ReLU(f(x) W), f the tuned model, W ~ N(0, 1) of n_features x M, drawn once;
    G = Σ h hᵀ and Q = Σ h yᵀ over all samples so far, y their one-hot classes; output
    h(x)ᵀ (G + ridge·I)⁻¹ Q. After the first experience nothing is trained, so the order of the
    others makes no difference if the ridge is given.

    Otherwise it is chosen anew in each experience from 1e-8, 1e-7, ... 1e8: regression on 80 % of
    its samples, shuffled, and the least squared error on the rest.

    Attributes:
        tuning: As in APER: "adapter", "ssf", "vpt_shallow", "vpt_deep", "full", or "none" (no
            phase 1). Any model with features will do for "none" and "full".
        projection: M. None: 10,000 for each 768 features; 0: no projection, h = f.
        ridge: None: it is chosen.

    **Differs from the paper:** nothing in the equations. M = 10,000 whatever the features there:
    the default is as much for a ViT-B and in proportion for others. Sums and solutions are in
    double precision, where the code has fp32. Of all candidates one eigendecomposition takes the
    place of 17 solutions. The learning rate of the tuning follows its cosine after every step;
    the code tunes for 20 epochs, here it is the scenario's.

    Memory: G takes 8 M² bytes, 800 MB for M = 10,000, 50 MB for M = 2,500; three times as much
    while the regression is solved. `facts` tells M, the ridge and the bytes.
    """

    projection: int | None = None
    ridge: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection is not None:
            require(self, "projection", at_least=0)
        if self.ridge is not None:
            require(self, "ridge", above=0)

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        width, device = self._n_features, context.device
        size = round(_PAPER * width) if self.projection is None else self.projection
        # Drawn again whenever a run starts or goes on, always the same: nothing to keep.
        generator = context.generator("projection", torch.device("cpu"))
        projection = torch.randn(width, size, generator=generator).to(device)
        self._projection = projection if size else None
        self.sums = RidgeRegression(size or width, context.n_outputs, device)
        self.weights = torch.zeros(size or width, context.n_outputs, device=device)
        self.met = torch.zeros(context.n_outputs, dtype=torch.bool, device=device)
        self.chosen = self.ridge or 1.0

    @torch.no_grad()
    def after(self, experience: Experience) -> None:
        """Adds to G and Q, and solves for the classifier."""
        assert experience.train is not None
        batches = self.look(experience.train)
        found = [(self.tuned_features(batch.inputs), batch.targets) for batch in batches]
        features, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
        for some, labels in self.expanded(features, targets):
            self.sums.add(some, labels)
        self.met[targets] = True
        if self.ridge is None:
            self.chosen = self.choose(features, targets)
        self.weights = self.sums.solve(self.chosen).float()

    def choose(self, features: Tensor, targets: Tensor) -> float:
        """The ridge for samples like these; the last one if there are too few.

        Args:
            features: f, [N, n_features].
            targets: Their classes, [N].
        """
        count = int(0.8 * len(features))
        if not count:
            return self.chosen
        generator = self.context.generator("ridge")
        order = torch.randperm(len(features), generator=generator, device=features.device)
        used, held_out = order[:count], order[count:]
        errors = held_out_errors(
            torch.cat([h for h, _ in self.expanded(features[used], targets[used])]),
            targets[used],
            self.expanded(features[held_out], targets[held_out]),
            self.context.n_outputs,
            RIDGES,
        )
        return RIDGES[int(errors.argmin())]

    def expanded(self, features: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """h and the classes, in batches, [B, M] and [B]."""
        for some, labels in zip(features.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
            yield self.expand(some), labels

    def expand(self, features: Tensor) -> Tensor:
        """f to h, [B, n_features] to [B, M]."""
        return features if self._projection is None else F.relu(features @ self._projection)

    def predict(self, batch: Batch) -> Tensor:
        return only(self.met, self.expand(self.tuned_features(batch.inputs)) @ self.weights)

    def facts(self) -> Mapping[str, Any]:
        """What was chosen, and its cost."""
        size = len(self.weights)
        return {"ridge": self.chosen, "inputs": size, "gram_bytes": self.sums.gram.nbytes}
