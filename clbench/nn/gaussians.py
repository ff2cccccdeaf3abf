"""What classes look like in feature space, kept as Gaussians, and samples like theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.errors import Diverged
from clbench.nn.ridge import cholesky

#: See `ClassGaussians`.
Kind = Literal["full", "diagonal", "centroids"]


class ClassGaussians:
    """Gaussians of the features of each class, estimated in double precision, kept in fp32.

    | kind | a class is | bytes of a class, d features |
    |---|---|---|
    | "full" | N(μ, Σ + jitter·I) | 4 (d² + d): 2.4 MB for d = 768 |
    | "diagonal" | N(μ, diag(Σ) + jitter·I) | 8 d: 6 kB |
    | "centroids" | Σ_k w_k N(μ_k, diag(Σ_k) + jitter·I) | 8 d each: 61 kB for 10 |

    "centroids" is a mixture of k-means clusters. Σ is the unbiased covariance, zero for a single
    sample, and of a cluster the mean square, as in the code of MOS (Sun et al. 2025, arXiv
    2412.09441). "full" keeps the Cholesky factor, which is what sampling needs. The jitter makes
    Σ positive definite where a class has fewer samples than features; where rounding still
    prevents that, it grows tenfold until it does.

    w_k is the cluster's share of the samples. **Differs from the paper:** MOS's code draws alike
    from every cluster, and nothing from clusters of one sample.

    Args:
        kind: "full", "diagonal" or "centroids".
        n_features: d.
        device: Where the Gaussians are kept and samples drawn.
        jitter: Added to variances, in squared units of the features; above 0.
        n_centroids: Clusters of a class; fewer where it has fewer different samples.
        seed: Of k-means.
    """

    def __init__(
        self,
        kind: Kind,
        n_features: int,
        device: torch.device | str = "cpu",
        *,
        jitter: float = 1e-4,
        n_centroids: int = 10,
        seed: int = 0,
    ) -> None:
        if not jitter > 0:
            raise ValueError(f"jitter={jitter}: without it a covariance may have no factor")
        self.kind, self.n_features, self.device = kind, n_features, torch.device(device)
        self.jitter, self.n_centroids, self.seed = jitter, n_centroids, seed
        self._means: dict[int, Tensor] = {}
        self._spreads: dict[int, Tensor] = {}
        self._shares: dict[int, Tensor] = {}

    @property
    def classes(self) -> tuple[int, ...]:
        """Those that have been fitted, in order of their first fit."""
        return tuple(self._means)

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept."""
        kept = (self._means, self._spreads, self._shares)
        return sum(tensor.nbytes for tensors in kept for tensor in tensors.values())

    def means(self, classes: Sequence[int]) -> Tensor:
        """μ of each class, or all its μ_k, one after another: [rows, n_features] in fp32."""
        return torch.cat([self._means[label] for label in classes])

    def mean(self, label: int) -> Tensor:
        """The mean of a class, whatever the kind, [n_features] in fp32."""
        return self._shares[label] @ self._means[label]

    def covariance(self, label: int) -> Tensor:
        """The covariance of what is sampled for a class, [n_features, n_features] in fp32."""
        if self.kind == "full":
            factor = self._spreads[label][0]
            return factor @ factor.T
        # Within the clusters and between them.
        shares, apart = self._shares[label], self._means[label] - self.mean(label)
        within = torch.diag(shares @ self._spreads[label].square())
        return within + apart.T @ (shares.unsqueeze(1) * apart)

    @torch.no_grad()
    def fit(self, label: int, features: Tensor) -> None:
        """Estimates a class anew.

        Args:
            label: The class.
            features: Of its samples, [N, n_features] with N at least 1.

        Raises:
            Diverged: If a feature is not finite.
        """
        features = features.to(self.device, torch.float64)
        if not features.isfinite().all():
            raise Diverged(f"features of class {label} are not finite; lower the learning rate")
        if self.kind == "centroids":
            clusters = self._cluster(features)
            means = torch.stack([c.mean(0) for c in clusters])
            variances = torch.stack([c.var(0, correction=0) for c in clusters])
            sizes = torch.tensor([len(c) for c in clusters], device=self.device)
            shares, spreads = sizes / len(features), (variances + self.jitter).sqrt()
        else:
            means, shares = features.mean(0, keepdim=True), features.new_ones(1)
            centred, freedom = features - means, max(len(features) - 1, 1)
            if self.kind == "full":
                spreads = cholesky(centred.T @ centred / freedom, self.jitter).unsqueeze(0)
            else:
                spreads = (centred.square().sum(0, keepdim=True) / freedom + self.jitter).sqrt()
        self._means[label], self._spreads[label] = means.float(), spreads.float()
        self._shares[label] = shares.float()

    @torch.no_grad()
    def sample(
        self,
        classes: Sequence[int],
        count: int,
        generator: torch.Generator,
        scales: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pseudo-features, as many of each class.

        Args:
            classes: Which; each has been fitted.
            count: Samples of each.
            generator: On this object's device.
            scales: Factors of the mean of each class (not of its spread); default: 1.

        Returns:
            [len(classes) count, n_features] in fp32, class by class, and their classes, [...]
            int64.
        """
        shape = len(classes), count, self.n_features
        features = torch.randn(shape, generator=generator, device=self.device)
        for i, label in enumerate(classes):
            mean, spread, noise = self._means[label], self._spreads[label], features[i]
            scale = 1.0 if scales is None else scales[i]
            if self.kind == "full":
                features[i] = torch.addmm(mean, noise, spread[0].T, beta=scale)
                continue
            if len(mean) > 1:
                shares = self._shares[label]
                drawn = torch.multinomial(shares, count, replacement=True, generator=generator)
                mean, spread = mean[drawn], spread[drawn]
            features[i] = scale * mean + spread * noise
        labels = torch.tensor(list(classes), device=self.device)
        return features.flatten(0, 1), labels.repeat_interleave(count)

    def state_dict(self) -> dict[str, Any]:
        """Everything that has been fitted."""
        return {"means": self._means, "spreads": self._spreads, "shares": self._shares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, kept in self.state_dict().items():
            kept.clear()
            kept.update({label: t.to(self.device) for label, t in state[name].items()})

    def _cluster(self, features: Tensor) -> list[Tensor]:
        """k-means: the members of each cluster."""
        from sklearn.cluster import KMeans

        count = min(self.n_centroids, len(features.unique(dim=0)))
        found = KMeans(count, n_init=1, random_state=self.seed % 2**32).fit(features.cpu().numpy())
        labels = torch.as_tensor(found.labels_, device=self.device)
        return [features[labels == k] for k in range(count)]
