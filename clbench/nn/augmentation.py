"""AutoAugment and RandAugment for whole batches: every image has operations of its own.

Torchvision's apply one drawn operation to all images that they get at once. Here the operations
of all images are drawn first, on the CPU, and each operation then runs once, on all images that
drew it. The operations and their strengths are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

#: uint8 images [N, C, H, W] and a generator on the CPU to images of the same shape and type.
Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def autoaugment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Two operations of one of the 25 sub-policies for CIFAR-10, each with its probability.

    Cubuk et al. 2019, "AutoAugment: Learning Augmentation Policies from Data", arXiv 1805.09501.
    """
    operation, probability, level = _cifar10_policies()
    n = len(images)
    policy = torch.randint(len(operation), (n,), generator=generator)
    for i in range(2):
        skipped = torch.rand(n, generator=generator) > probability[policy, i]
        chosen = operation[policy, i].masked_fill(skipped, -1)
        images = _apply(images, chosen, level[policy, i] / 9, generator)
    return images


def randaugment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Two operations of 14, one of them none at all, each with level 9 of 30.

    Cubuk et al. 2020, "RandAugment: Practical Automated Data Augmentation with a Reduced Search
    Space", arXiv 1909.13719; the setting is torchvision's.
    """
    names = list(OPERATIONS)
    usable = torch.tensor([-1, *(names.index(n) for n in names if n != "Invert")])
    for _ in range(2):
        chosen = usable[torch.randint(len(usable), (len(images),), generator=generator)]
        images = _apply(images, chosen, torch.full((len(images),), 9 / 30), generator)
    return images


@cache
def _cifar10_policies() -> tuple[Tensor, Tensor, Tensor]:
    """Operation (its number), probability and level of 0 to 9, [25, 2] each."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    names = list(OPERATIONS)
    policies = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    rows = [[(names.index(op), p, level or 0) for op, p, level in pair] for pair in policies]
    operation, probability, level = torch.tensor(rows, dtype=torch.float64).unbind(2)
    return operation.long(), probability, level


def _apply(images: Tensor, chosen: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """One operation for each image.

    Args:
        images: uint8 [N, C, H, W].
        chosen: Number of the operation, [N] int64 on the CPU; -1: none.
        level: Strength, [N] in [0, 1] on the CPU.
        generator: Draws the directions.
    """
    sign = torch.randint(2, (len(images),), generator=generator) * 2 - 1
    images = images.clone()
    for number, (operation, value) in enumerate(OPERATIONS.values()):
        rows = (chosen == number).nonzero().flatten()
        if len(rows):
            values = value(level[rows], sign[rows], (images.shape[-2], images.shape[-1]))
            rows = rows.to(images.device, non_blocking=True)
            values = values.float().to(images.device, non_blocking=True).view(-1, 1, 1, 1)
            images[rows] = operation(images[rows], values)
    return images


# Operations: uint8 [N, C, H, W] and a value for each image, [N, 1, 1, 1], to the same.


def shear_x(images: Tensor, value: Tensor) -> Tensor:
    """Rows slide to the left in proportion to their distance from the top."""
    return _warp(images, lambda x, y, _, h: (x + value * (y + h / 2), y))


def shear_y(images: Tensor, value: Tensor) -> Tensor:
    """Columns slide upwards in proportion to their distance from the left."""
    return _warp(images, lambda x, y, w, _: (x, y + value * (x + w / 2)))


def translate_x(images: Tensor, value: Tensor) -> Tensor:
    """To the right, in pixels."""
    return _warp(images, lambda x, y, *_: (x - value, y))


def translate_y(images: Tensor, value: Tensor) -> Tensor:
    """Downwards, in pixels."""
    return _warp(images, lambda x, y, *_: (x, y - value))


def rotate(images: Tensor, value: Tensor) -> Tensor:
    """Counter-clockwise, in degrees."""
    cos, sin = value.deg2rad().cos(), value.deg2rad().sin()
    return _warp(images, lambda x, y, *_: (cos * x - sin * y, sin * x + cos * y))


def _warp(images: Tensor, source: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """Each pixel from the nearest one to where `source` says that it comes from; outside is 0."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device).view(1, 1, 1, -1) - (width - 1) / 2
    y = torch.arange(height, device=images.device).view(1, 1, -1, 1) - (height - 1) / 2
    x, y = source(x, y, width, height)
    shape = len(images), 1, height, width
    grid = torch.stack([(2 / width * x).expand(shape), (2 / height * y).expand(shape)], -1)[:, 0]
    moved = F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)
    return moved.to(images.dtype)


def _blend(images: Tensor, other: Tensor, value: Tensor) -> Tensor:
    """value parts of the image, 1 - value of the other."""
    return other.lerp(images.float(), value.float()).clamp(0, 255).to(images.dtype)


def _grey(images: Tensor) -> Tensor:
    """Luminance, [N, 1, H, W] float of whole numbers."""
    if images.shape[1] != 3:
        return images.float().mean(1, keepdim=True).floor()
    weights = images.new_tensor([0.2989, 0.587, 0.114], dtype=torch.float).view(3, 1, 1)
    return (images * weights).sum(1, keepdim=True).floor()


def brightness(images: Tensor, value: Tensor) -> Tensor:
    """0: black; 1: as it is."""
    return _blend(images, torch.zeros_like(images, dtype=torch.float), value)


def color(images: Tensor, value: Tensor) -> Tensor:
    """0: grey; 1: as it is."""
    return _blend(images, _grey(images).expand(images.shape), value)


def contrast(images: Tensor, value: Tensor) -> Tensor:
    """0: the mean grey; 1: as it is."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True).expand(images.shape), value)


def sharpness(images: Tensor, value: Tensor) -> Tensor:
    """0: blurred, except for the border; 1: as it is."""
    if min(images.shape[-2:]) <= 2:
        return images
    channels = images.shape[1]
    kernel = torch.ones(channels, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    blurred = images.float()
    inner = F.conv2d(blurred, kernel / 13, groups=channels).round()
    blurred[..., 1:-1, 1:-1] = inner
    return _blend(images, blurred, value)


def posterize(images: Tensor, value: Tensor) -> Tensor:
    """So many leading bits stay."""
    step = torch.exp2(8 - value).to(torch.int32)
    return (images - images % step).to(images.dtype)


def solarize(images: Tensor, value: Tensor) -> Tensor:
    """What is at least as bright is inverted."""
    return torch.where(images >= value, 255 - images, images)


def autocontrast(images: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
    """The darkest level of a channel becomes 0, the brightest 255."""
    low = images.amin((2, 3), keepdim=True).float()
    high = images.amax((2, 3), keepdim=True).float()
    flat = high == low
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return ((images - low.where(~flat, 0.0)) * scale).clamp(0, 255).to(images.dtype)


def equalize(images: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
    """The levels of a channel become equally frequent."""
    flat = images.flatten(2).flatten(0, 1).long()
    counts = torch.zeros(len(flat), 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    below = counts.cumsum(1)
    brightest = counts.gather(1, below.argmax(1, keepdim=True))
    step = (flat.shape[1] - brightest) // 255
    table = (below + step // 2) // step.clamp(min=1)
    table = F.pad(table[:, :-1], (1, 0)).clamp(0, 255)
    return torch.where(step == 0, flat, table.gather(1, flat)).to(images.dtype).view_as(images)


def invert(images: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
    """The negative."""
    return 255 - images


_Value = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def _signed(largest: float) -> _Value:
    return lambda level, sign, _: largest * level * sign


def _shift(side: int) -> _Value:
    return lambda level, sign, size: (150 / 331 * size[side] * level * sign).trunc()


def _factor(level: Tensor, sign: Tensor, _: tuple[int, int]) -> Tensor:
    return 1 + 0.9 * level * sign


#: By torchvision's names: the operation, and its value for a level in [0, 1], a sign and the
#: height and width of the image.
OPERATIONS: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], _Value]] = {
    "ShearX": (shear_x, _signed(0.3)),
    "ShearY": (shear_y, _signed(0.3)),
    "TranslateX": (translate_x, _shift(1)),
    "TranslateY": (translate_y, _shift(0)),
    "Rotate": (rotate, _signed(30.0)),
    "Brightness": (brightness, _factor),
    "Color": (color, _factor),
    "Contrast": (contrast, _factor),
    "Sharpness": (sharpness, _factor),
    "Posterize": (posterize, lambda level, *_: 8 - (4 * level).round()),
    "Solarize": (solarize, lambda level, *_: 255 * (1 - level)),
    "AutoContrast": (autocontrast, lambda level, *_: level),
    "Equalize": (equalize, lambda level, *_: level),
    "Invert": (invert, lambda level, *_: level),
}
