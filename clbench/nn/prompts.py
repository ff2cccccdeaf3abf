"""Prompts for a frozen vision transformer: a pool with keys, and tables that grow in slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosine of every query with every key, [B, n_features] and [N, n_features] to [B, N]."""
    return F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T


def uniform(shape: Sequence[int], scale: float, generator: torch.Generator) -> Tensor:
    """Numbers in [0, scale), on the generator's device."""
    return scale * torch.rand(*shape, generator=generator, device=generator.device)


def orthonormal_rows(earlier: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random unit rows, orthogonal to each other and to earlier ones: Gram-Schmidt.

    Where a space of n_features dimensions has no room left, the new rows are orthogonal to the
    latest n_features - count of the earlier ones.

    Args:
        earlier: Rows that stay, not necessarily orthogonal, [..., N, n_features].
        count: New rows, at most n_features.
        generator: On the CPU.

    Returns:
        [..., count, n_features], like `earlier` in type and device.

    Raises:
        ValueError: If there are fewer dimensions than new rows.
    """
    *groups, n_earlier, n_features = earlier.shape
    if count > n_features:
        raise ValueError(f"{count} rows of {n_features} numbers can't be orthogonal")
    kept = earlier[..., max(0, n_earlier + count - n_features) :, :].double().cpu()
    drawn = torch.randn(*groups, count, n_features, generator=generator, dtype=torch.float64)
    basis, steps = torch.linalg.qr(torch.cat((kept, drawn), dim=-2).mT)
    # Gram-Schmidt keeps the side on which a row was drawn; QR by reflections may not.
    basis = basis * steps.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    rows: Tensor = basis.mT[..., kept.shape[-2] :, :]
    return rows.to(earlier)


def gram_error(rows: Tensor, squared: bool = False) -> Tensor:
    """Frobenius norm of R R^T - I, [..., N, n_features] to [...]: 0 for orthonormal rows.

    Args:
        rows: R.
        squared: The mean square of the entries instead.
    """
    products = rows @ rows.mT
    errors = products - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    if squared:
        return errors.square().mean(dim=(-2, -1))
    norm: Tensor = torch.linalg.matrix_norm(errors)
    return norm


def attention_weights(queries: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """cos(q * a, k) for every query, attention vector a and its key k.

    Args:
        queries: [B, n_features].
        attention: a, [..., N, n_features].
        keys: k, in the same shape.

    Returns:
        [..., B, N].
    """
    # <q * a, k> = <q, a * k> and |q * a|² = <q², a²>: no tensor of size B x N x n_features.
    products = queries @ (attention * F.normalize(keys, dim=-1)).mT
    squares = queries.square() @ attention.square().mT
    return products * squares.clamp_min(1e-24).rsqrt()


class PromptPool(nn.Module):
    """Prompts and their keys, which queries choose from.

    Args:
        size: Prompts in the pool.
        length: Tokens of each.
        width: Of tokens and queries.
        scale: Prompts and keys start uniform in [0, scale).
        generator: Draws the start.

    Attributes:
        prompts: [size, length, width].
        keys: [size, width].
    """

    def __init__(
        self, size: int, length: int, width: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.prompts = nn.Parameter(uniform((size, length, width), scale, generator))
        self.keys = nn.Parameter(uniform((size, width), scale, generator))

    def choose(
        self, queries: Tensor, top_k: int, frequency: Tensor | None = None, vote: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The prompts whose keys point most in the direction of each query.

        Args:
            queries: [B, width].
            top_k: How many.
            frequency: Of each prompt so far, [size]: the distance 1 - cosine is multiplied with
                it, so that prompts in frequent use are chosen less.
            vote: All queries get the prompts that most of them chose; of equally popular ones
                the first in the pool.

        Returns:
            Their positions, [B, top_k] int64, best first, and the cosines of the queries with
            their keys, in the same shape.
        """
        matches = cosines(queries, self.keys)
        distances = 1 - matches.detach()
        if frequency is not None:
            distances = distances * frequency
        chosen = distances.topk(top_k, dim=1, largest=False).indices
        if vote:
            votes = F.one_hot(chosen, len(self.keys)).sum(dim=(0, 1))
            popular = votes.argsort(descending=True, stable=True)[:top_k]
            chosen = popular.expand(len(queries), -1)
        return chosen, matches.gather(1, chosen)

    def forward(self, chosen: Tensor) -> Tensor:
        """Tokens of the chosen prompts one after another, [B, top_k] to [B, top_k * length, D]."""
        return self.prompts[chosen].flatten(1, 2)


class GrowingTable(nn.Module):
    """Rows in slices, of which only the latest trains; the others never change.

    Args:
        shape: Of one row.

    Attributes:
        shape: The same.
        frozen: Rows of earlier slices, [n_frozen, *shape].
        latest: Rows of the latest slice, [n_latest, *shape]; a parameter.
    """

    frozen: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("frozen", torch.empty(0, *shape))
        self.latest = nn.Parameter(torch.empty(0, *shape))

    def __len__(self) -> int:
        return len(self.frozen) + len(self.latest)

    def grow(self, rows: Tensor) -> None:
        """Freezes what there is and adds a slice, [count, *shape]."""
        self.frozen = self.forward().detach()
        self.latest = nn.Parameter(rows.to(self.frozen))

    def forward(self) -> Tensor:
        """All rows, oldest first, [n_frozen + n_latest, *shape]."""
        return torch.cat((self.frozen, self.latest))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Takes as many rows as there are in the state."""
        for name, current in (("frozen", self.frozen), ("latest", self.latest.data)):
            saved = state_dict.get(prefix + name, current)
            if len(saved) == len(current):  # an optimizer may have the parameter
                continue
            resized = current.new_empty(len(saved), *current.shape[1:])
            setattr(self, name, resized if name == "frozen" else nn.Parameter(resized))
        super()._load_from_state_dict(state_dict, prefix, *rest)
