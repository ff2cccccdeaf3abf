"""Mean features of classes, and nearness to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Module):
    """The mean feature of every class, a running one: the order of the samples does not matter.

    Args:
        n_classes: Classes.
        n_features: Length of the features.

    Attributes:
        sums: [n_classes, n_features] in double precision, for sums over millions of samples.
        counts: [n_classes], likewise.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, n_classes: int, n_features: int) -> None:
        super().__init__()
        zeros = torch.zeros(n_classes, n_features, dtype=torch.float64)
        self.register_buffer("sums", zeros)
        self.register_buffer("counts", zeros[:, 0].clone())

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Takes in features, [B, n_features], of classes [B] int64."""
        members = F.one_hot(targets, len(self.counts)).double().T
        self.sums += members @ features.double()
        self.counts += members.sum(1)

    @property
    def known(self) -> Tensor:
        """Which classes have a mean, [n_classes] bool."""
        return self.counts > 0

    def means(self) -> Tensor:
        """[n_classes, n_features] in fp32; 0 where there is none yet."""
        return (self.sums / self.counts.clamp_min(1).unsqueeze(1)).float()

    def cosines(self, features: Tensor) -> Tensor:
        """cos(feature, mean), [B, n_features] to [B, n_classes]; see `only` for the rest."""
        return only(self.known, F.normalize(features) @ F.normalize(self.means()).T)


def only(known: Tensor, scores: Tensor) -> Tensor:
    """Scores, [B, C], with the least finite number for classes that are not `known`, [C] bool."""
    return scores.masked_fill(~known, torch.finfo(scores.dtype).min)
