"""LAME: the answers of a batch pulled towards those of its neighbours; the model stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.adaptation import Adaptation
from clbench.pretrained import require_classifier
from clbench.samples import Batch
from clbench.types import require

#: Iterations between two looks at whether they may end: a GPU need not wait for each of them.
_LOOK_EVERY = 10

Affinity = Literal["rbf", "knn", "linear"]


@dataclass(kw_only=True)
class LAME(Adaptation):
    """Laplacian adjusted maximum-likelihood estimation.

    Boudiaf et al. 2022, "Parameter-free Online Test-time Adaptation", CVPR, arXiv 2201.05718,
    and its code. The source model in evaluation mode gives probabilities p and features of length
    1, these an affinity W between the samples of the batch. Assignments Z, a distribution over
    the classes for each sample, minimise Σ_i KL(z_i ‖ p_i) − Σ_ij W_ij z_iᵀ z_j by

        Z⁰ = p,   Z ← softmax(log(p + 1e-10) + W Z)

    until Σ Z·(log Z − log p − W Z_before) changes by less than `tolerance`. Nothing is trained
    and nothing remembered. It helps where neighbours in a batch tend to have one class, and does
    harm where they do not.

    Scored are the logits of Z. `predict` corrects a batch in the same way: the answer of the
    method to samples that come together, although it learns nothing from them.

    **Differs from the paper:** nothing in the numbers, of its code as of the paper's algorithm,
    but for two cases that the code leaves open. Where more than one feature vector is the same,
    "knn" never takes a sample for its own neighbour; and where the k-th neighbour of every sample
    lies in the same place (a batch of one, for instance), the width of "rbf" is 1e-6, not 0.

    Attributes:
        affinity: "rbf": exp(−d²/2σ²) for distances d, σ the mean distance to the k-th neighbour
            (the sample itself is its first); "knn": 1 for the k nearest others, else 0; "linear":
            the cosine.
        neighbours: k.
        symmetric: Use (W + Wᵀ)/2; changes "knn" only.
        max_iterations: At most; at least three are done.
        tolerance: Relative change of the energy at which the iteration ends.
    """

    affinity: Affinity = "rbf"
    neighbours: int = 5
    symmetric: bool = False
    max_iterations: int = 100
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        require(self, "neighbours", "max_iterations", at_least=1)
        require(self, "tolerance", at_least=0)

    def prepare(self) -> None:
        model = require_classifier("lame", self.model)
        self._features, self._head = model.features, model.head

    def adapt(self, batch: Batch) -> Tensor:
        return self.predict(batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        with self.context.autocast():
            features: Tensor = self._features(batch.inputs)
            logits: Tensor = self._head(features)
        kernel = affinities(F.normalize(features.float()), self.affinity, self.neighbours)
        if self.symmetric:
            kernel = (kernel + kernel.T) / 2
        log_prior = (logits.float().softmax(1) + 1e-10).log()
        return assignments(log_prior, kernel, self.max_iterations, self.tolerance)


def affinities(features: Tensor, kind: Affinity, neighbours: int) -> Tensor:
    """W, [B, B].

    Args:
        features: Of length 1, [B, D].
        kind: See `LAME.affinity`.
        neighbours: k; all there are in a smaller batch.
    """
    if kind == "linear":
        return features @ features.T
    # Squared differences, not |a|² − 2ab + |b|²: of equal features the distance is 0.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    n = len(features)
    if kind == "knn":
        others = distances.fill_diagonal_(torch.inf)
        nearest = others.topk(min(neighbours, n - 1), largest=False).indices
        return torch.zeros_like(distances).scatter_(1, nearest, 1)
    to_kth = distances.topk(min(neighbours, n), largest=False).values[:, -1]
    width = to_kth.mean().clamp_min(1e-6)
    return (-(distances.square()) / (2 * width.square())).exp()


def assignments(log_prior: Tensor, kernel: Tensor, max_iterations: int, tolerance: float) -> Tensor:
    """Logits of Z, [B, K].

    Args:
        log_prior: Logarithms of p, [B, K].
        kernel: W, [B, B].
        max_iterations: See `LAME`.
        tolerance: See `LAME`.
    """
    logits, z = log_prior, log_prior.softmax(1)
    energy = log_prior.new_full((), torch.inf)
    running = torch.ones((), dtype=torch.bool, device=log_prior.device)
    for done in range(1, max_iterations + 1):
        pulled = log_prior + kernel @ z
        logits = torch.where(running, pulled, logits)
        z = logits.softmax(1)
        before, energy = energy, (z * (z.clamp_min(1e-20).log() - pulled)).sum()
        if done > 2:
            running = running & ((energy - before).abs() > tolerance * before.abs())
        if done % _LOOK_EVERY == 0 and not running:
            break
    return logits
