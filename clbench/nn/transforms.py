"""Augmentation and normalisation of whole batches, on the device that holds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Transform(ABC):
    """Turns stored samples into model inputs."""

    @property
    def augments(self) -> bool:
        """Whether `train` may give other inputs than `test`."""
        return True

    @abstractmethod
    def train(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs for a training step: augmented, then as `test`. [B, ...] to [B, ...]."""

    @abstractmethod
    def test(self, raw: Tensor) -> Tensor:
        """Inputs for an evaluation. [B, ...] to [B, ...]."""


class Identity(Transform):
    """Samples are already what the model reads."""

    @property
    def augments(self) -> bool:
        return False

    def train(self, raw: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        return raw

    def test(self, raw: Tensor) -> Tensor:
        return raw


class ImageTransform(Transform):
    """uint8 images to normalised floats, with random crops and mirror images in training.

    Args:
        mean: Per channel, in [0, 1].
        std: Per channel, in (0, 1].
        crop_padding: Zero pixels put round the image before a crop of its own size; 0: no crop.
        flip: Mirror half of the images left to right.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        self.crop_padding, self.flip = crop_padding, flip
        # One multiplication and one addition: (x/255 - mean) / std = x * scale + shift.
        self._scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)

    @property
    def augments(self) -> bool:
        return bool(self.crop_padding or self.flip)

    def train(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        return self.test(self.augment(raw, generator))

    def test(self, raw: Tensor) -> Tensor:
        if self._scale.device != raw.device:
            self._scale, self._shift = self._scale.to(raw.device), self._shift.to(raw.device)
        return raw.float().mul_(self._scale).add_(self._shift)

    def augment(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """The random part alone: [B, C, H, W] to [B, C, H, W], same type."""
        if not self.augments:
            return raw
        n, _, height, width = raw.shape
        device = raw.device
        batch = torch.arange(n, device=device)
        if self.flip:
            mirrored = torch.rand(n, generator=generator, device=device) < 0.5
            raw = torch.cat((raw, raw.flip(3))).index_select(0, batch + n * mirrored)
        if pad := self.crop_padding:
            shift = torch.randint(2 * pad + 1, (2, n), generator=generator, device=device)
            padded = torch.nn.functional.pad(raw, (pad, pad, pad, pad))
            # A view of all crops, [B, C, 2 pad + 1, 2 pad + 1, H, W]: only the chosen are copied.
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            raw = windows[batch, :, shift[0], shift[1]]
        return raw


class AsStored(ImageTransform):
    """Floats that are model inputs already, with random crops and mirror images in training.

    Args:
        crop_padding: Zeros put round the image before a crop of its own size; 0: no crop.
        flip: Mirror half of the images left to right.
    """

    def __init__(self, crop_padding: int = 0, flip: bool = False) -> None:
        super().__init__((0.0,), (1.0,), crop_padding, flip)

    def test(self, raw: Tensor) -> Tensor:
        return raw
