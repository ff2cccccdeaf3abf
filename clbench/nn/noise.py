"""Gaussian noise for every weight in every step, at a price that a step can bear."""

from __future__ import annotations

import torch
from torch import Tensor

#: Places at which a window of the pool may begin.
PLACES = 1 << 20


class GaussianNoise:
    """Standard normal numbers, new ones for each `add`.

    On a GPU they are drawn one by one. On a CPU that would take longer than a training step of an
    MLP on a small batch; there a pool of normal numbers is drawn once, and each `add` takes a
    window of the pool at a random place, with a random sign (after Salimans et al. 2017, arXiv
    1703.03864). Given the pool and all windows before, it has mean 0 and, to about 1/√PLACES, the
    identity as its covariance: what the weak convergence of a discretised diffusion asks of its
    noise.

    Args:
        count: Numbers that an `add` needs at most.
        generator: Of the device to draw on.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.generator = generator
        self._pooled = generator.device.type == "cpu"
        room = count + (PLACES - 1 if self._pooled else 0)
        self._pool = torch.randn(room, generator=generator, device=generator.device)

    @torch.no_grad()
    def add(self, weights: list[Tensor], scales: list[Tensor]) -> None:
        """weights ← weights + scales∘ξ, ξ being new numbers.

        Args:
            weights: Any tensors, of at most `count` numbers together; changed in place.
            scales: Standard deviations, in the same shapes.
        """
        sizes: list[int] = [w.numel() for w in weights]
        place, sign = 0, 1
        if self._pooled:
            place, sign = divmod(int(torch.randint(2 * PLACES, (), generator=self.generator)), 2)
            sign = 2 * sign - 1
        else:
            self._pool.normal_(generator=self.generator)
        parts = self._pool.narrow(0, place, sum(sizes)).split(sizes)
        numbers: list[Tensor] = [part.view_as(w) for part, w in zip(parts, weights, strict=True)]
        torch._foreach_addcmul_(weights, scales, numbers, sign)
