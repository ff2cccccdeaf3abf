"""Random views of images without labels, as test-time adaptation averages over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.augmentation import autocontrast, equalize, posterize, solarize
from clbench.nn.transforms import ImageTransform, Transform
from clbench.types import Context

#: Numbers that are augmented together: on a CPU few enough to stay in its cache.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**27
_BLUR_TAPS = 5

Crop = Literal["padded", "resized"]


class CoTTAViews:
    """The augmentation of CoTTA and the methods after it, one draw for each view of a batch.

    In this order, on pixels in [0, 1]: brightness (a factor of 0.6 to 1.4), contrast (0.7 to
    1.3), saturation (0.5 to 1.5), hue (turned by at most 0.06 of a circle) and gamma (0.7 to
    1.3), these five in a random order; the border repeated; a rotation by at most 15 degrees, a
    shift by at most 1/8 of the side in whole pixels, a scale of 0.9 to 1.1, bilinear; a Gaussian
    blur of 0.001 to 0.5 pixels over 5 taps; a mirror image half of the time; noise of 0.005; all
    clipped to [0, 1]. Grey images have no saturation and no hue.

    Wang et al. 2022, "Continual Test-Time Domain Adaptation", arXiv 2203.13591, whose code takes
    it from Ginzburg and Freedman 2021, "KATANA", arXiv 2109.08191. As there, all images of a
    batch share the draw, the noise apart: a network that normalises with the statistics of the
    batch would else mix many distributions.

    Args:
        context: Lends transform and random numbers.

    Raises:
        UserError: If the inputs of the scenario are not images with known normalisation.
    """

    def __init__(self, context: Context) -> None:
        self._transform = _image_transform(context.transform)
        self._draws = context.generator("views", torch.device("cpu"))
        self._noise = context.generator("noise of views")
        self._chunk = _CPU_CHUNK if context.device.type == "cpu" else _GPU_CHUNK

    def __call__(self, inputs: Tensor, count: int) -> Iterator[Tensor]:
        """Views of a batch, made as they are asked for, several at once.

        Args:
            inputs: Normalised images, [B, C, H, W] float.
            count: Views.

        Yields:
            Normalised images, [B, C, H, W] each.
        """
        mean, std = _statistics(self._transform, inputs)
        pixels = (inputs * std + mean).clamp_(0, 1)
        draw = Draw.random(count, (pixels.shape[2], pixels.shape[3]), self._draws)
        together = max(1, self._chunk // max(1, pixels.numel()))
        for rows in torch.arange(count).split(together):
            views = draw.rows(rows).apply(pixels)
            noise = torch.randn(views.shape, generator=self._noise, device=views.device)
            views = views.add_(noise, alpha=0.005).clamp_(0, 1)
            yield from views.sub_(mean).div_(std)

    @torch.no_grad()
    def average(self, model: Callable[[Tensor], Tensor], inputs: Tensor, count: int) -> Tensor:
        """Mean of a model's answers to views of a batch.

        The model sees one view at a time, so that batch statistics are those of a view.

        Args:
            model: [B, C, H, W] to [B, K].
            inputs: Normalised images, [B, C, H, W].
            count: Views.

        Returns:
            [B, K].
        """
        views = self(inputs, count)
        total = model(next(views)).clone()
        for view in views:
            total += model(view)
        return total / count


@dataclass(frozen=True)
class Draw:
    """What the views of a batch were drawn to be, on the CPU; V views.

    Attributes:
        order: Positions in `JITTERS`, in the order of their use, [V, 5] int64.
        factors: One for each of `JITTERS`, [V, 5].
        angle: Of the rotation, clockwise, in degrees, [V].
        shift: To the right and downwards, in pixels, [V, 2].
        scale: [V]; above 1 the images get larger.
        sigma: Of the blur, in pixels, [V].
        mirrored: [V] bool.
    """

    order: Tensor
    factors: Tensor
    angle: Tensor
    shift: Tensor
    scale: Tensor
    sigma: Tensor
    mirrored: Tensor

    @classmethod
    def random(cls, count: int, size: tuple[int, int], generator: torch.Generator) -> Draw:
        """As the published code draws.

        Args:
            count: V.
            size: Height and width of the images.
            generator: On the CPU.
        """
        numbers = torch.rand(count, 16, dtype=torch.float64, generator=generator)

        def between(column: int, low: float, high: float) -> Tensor:
            return low + (high - low) * numbers[:, column]

        factors = [between(i, *limits) for i, (_, limits) in enumerate(JITTERS.values())]
        # The published code shifts by up to 1/16 of images that are padded to twice their side.
        shift = [between(5 + i, -side / 8, side / 8).round() for i, side in enumerate(size[::-1])]
        return cls(
            order=numbers[:, 11:].argsort(1),
            factors=torch.stack(factors, 1),
            angle=between(7, -15, 15),
            shift=torch.stack(shift, 1),
            scale=between(8, 0.9, 1.1),
            sigma=between(9, 0.001, 0.5),
            mirrored=numbers[:, 10] < 0.5,
        )

    def rows(self, index: Tensor) -> Draw:
        """Some of the views, [W] int64."""
        return Draw(**{name: value[index] for name, value in vars(self).items()})

    def apply(self, pixels: Tensor) -> Tensor:
        """The views without their noise, [B, C, H, W] in [0, 1] to [V, B, C, H, W]."""
        views = pixels.expand(len(self.angle), *pixels.shape).clone()
        return self._blur(self._move(self._jitter(views)))

    def _jitter(self, views: Tensor) -> Tensor:
        factors = self.factors.float().to(views.device, non_blocking=True)
        factors = factors.view(len(views), len(JITTERS), 1, 1, 1, 1)
        for step in self.order.unbind(1):
            for number, (operation, _) in enumerate(JITTERS.values()):
                rows = (step == number).nonzero().flatten()
                if len(rows) == len(views):
                    views = operation(views, factors[:, number])
                elif len(rows):
                    rows = rows.to(views.device, non_blocking=True)
                    views[rows] = operation(views[rows], factors[rows, number])
        return views

    def _move(self, views: Tensor) -> Tensor:
        """[V, B, C, H, W] to [V, B, C, H + 4, W + 4]: the margin is what the blur needs."""
        height, width = views.shape[-2:]
        margin = _BLUR_TAPS // 2

        def centred(side: int) -> Tensor:
            return torch.arange(-margin, side + margin, dtype=torch.float64) - (side - 1) / 2

        def each(values: Tensor) -> Tensor:
            return values.view(-1, 1, 1)

        x = torch.where(each(self.mirrored), -centred(width), centred(width))
        x = x - each(self.shift[:, 0])
        y = centred(height).view(-1, 1) - each(self.shift[:, 1])
        cos, sin = each(self.angle.deg2rad().cos()), each(self.angle.deg2rad().sin())
        from_x, from_y = cos * x + sin * y, cos * y - sin * x
        places = torch.stack((from_x * (2 / width), from_y * (2 / height)), -1)
        grid = (places / self.scale.view(-1, 1, 1, 1)).float().to(views.device, non_blocking=True)
        # All images of a view move alike, so that they may pass for channels of one image.
        moved = F.grid_sample(
            views.flatten(1, 2), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        whole: Tensor = moved.view(*views.shape[:3], *moved.shape[-2:])
        return whole

    def _blur(self, views: Tensor) -> Tensor:
        """[V, B, C, H + 4, W + 4] to [V, B, C, H, W]."""
        distance = torch.arange(_BLUR_TAPS // 2 + 1, dtype=torch.float64)
        near = torch.exp(-0.5 * (distance / self.sigma[:, None]) ** 2)
        near = near / (2 * near.sum(1, keepdim=True) - near[:, :1])
        weights = near.float().to(views.device, non_blocking=True).unbind(1)
        middle, one, two = (w.view(-1, 1, 1, 1, 1) for w in weights)
        for axis in (-1, -2):
            taps = views.unfold(axis, _BLUR_TAPS, 1).unbind(-1)
            views = (taps[2] * middle).addcmul_(taps[1] + taps[3], one)
            views.addcmul_(taps[0] + taps[4], two)
        return views


# Colours: pixels [..., C, H, W] in [0, 1] and factors that fit them, to the same.


def _grey(pixels: Tensor) -> Tensor:
    """Luminance, [..., 1, H, W]."""
    if pixels.shape[-3] != 3:
        return pixels.mean(-3, keepdim=True)
    red, green, blue = (pixels.narrow(-3, i, 1) for i in range(3))
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """0: black; 1: as it is."""
    return (pixels * factor).clamp_(0, 1)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """0: the mean grey of each image; 1: as it is."""
    mean = _grey(pixels).mean((-3, -2, -1), keepdim=True)
    return (pixels * factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """0: grey; 1: as it is."""
    if pixels.shape[-3] != 3:
        return pixels
    return (pixels * factor).add_((1 - factor) * _grey(pixels)).clamp_(0, 1)


def hue(pixels: Tensor, factor: Tensor) -> Tensor:
    """Turned by so many circles; 0: as it is."""
    if pixels.shape[-3] != 3:
        return pixels
    red, green, blue = pixels.unbind(-3)
    top, low = pixels.amax(-3), pixels.amin(-3)
    chroma = top - low
    step = torch.where(chroma == 0, 1, chroma)
    otherwise = torch.where(top == green, (blue - red) / step + 2, (red - green) / step + 4)
    angle = torch.where(top == red, (green - blue) / step, otherwise) + 6 * factor.squeeze(-3)
    channels = []
    for offset in (5, 3, 1):
        place = (angle + offset).remainder_(6)
        share = torch.minimum(place, 4 - place).clamp_(0, 1)
        channels.append(top - chroma * share)
    return torch.stack(channels, -3)


def gamma(pixels: Tensor, factor: Tensor) -> Tensor:
    """Raised to so high a power; 1: as it is."""
    return pixels.clamp(1e-8, 1).pow(factor).clamp_(0, 1)


#: The operation and the limits between which its factor is drawn.
JITTERS: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float]]] = {
    "brightness": (brightness, (0.6, 1.4)),
    "contrast": (contrast, (0.7, 1.3)),
    "saturation": (saturation, (0.5, 1.5)),
    "hue": (hue, (-0.06, 0.06)),
    "gamma": (gamma, (0.7, 1.3)),
}


class AugMixViews:
    """The augmentation of MEMO: each copy of each image has operations of its own.

    A random crop and mirror image x; three chains of one to three operations each (autocontrast,
    equalise, rotation, solarisation, two shears, two translations, posterisation), each operation
    of a strength of its own; m x + (1 - m) Σ_i w_i chain_i(x) with w ~ Dirichlet(1, 1, 1) and
    m ~ Beta(1, 1).

    Hendrycks et al. 2020, "AugMix", arXiv 1912.02781, as the code of Zhang et al. 2022, "MEMO",
    arXiv 2110.09506, has it: level 1 of 10, so rotations by at most 2 degrees, shears by at most
    0.03, translations by at most 1/30 of the side. Where that code fills with the colour 128,
    which Pillow takes for a dark red, a geometric operation here fills with grey.

    Args:
        context: Lends transform and random numbers.
        crop: "padded": of the image's own size, out of one with a border of 1/8 of the side (4
            pixels of 32), black; "resized": 8 to 100 % of the area, sides of 3:4 to 4:3, enlarged
            to the image's size. MEMO takes the former for CIFAR, the latter for ImageNet.

    Raises:
        UserError: If the inputs of the scenario are not images with known normalisation.
    """

    def __init__(self, context: Context, crop: Crop = "padded") -> None:
        self._transform = _image_transform(context.transform)
        self._draws = context.generator("copies", torch.device("cpu"))
        self._crops = context.generator("crops of copies")
        self._crop = crop

    def __call__(self, raw: Tensor, count: int) -> Tensor:
        """Copies of images, normalised.

        Args:
            raw: uint8 images [N, C, H, W].
            count: Copies of each.

        Returns:
            [N, count, C, H, W] float.
        """
        first = self._cropped(raw.repeat_interleave(count, 0))
        n = len(first)
        chains = first.repeat(3, 1, 1, 1)
        length = torch.randint(1, 4, (3 * n,), generator=self._draws)
        for step in range(3):
            chosen = torch.randint(len(AUGMIX), (3 * n,), generator=self._draws)
            apply_operations(chains, chosen.masked_fill_(step >= length, -1), self._draws)
        numbers = torch.rand(4, n, dtype=torch.float64, generator=self._draws)
        # Exponential variables over their sum are uniform on the simplex.
        shares = -numbers[:3].clamp_min(1e-300).log()
        weights = (1 - numbers[3]) * shares / shares.sum(0)
        weights = weights.float().to(raw.device, non_blocking=True).view(3, n, 1, 1, 1)
        kept = numbers[3].float().to(raw.device, non_blocking=True).view(n, 1, 1, 1)
        mixed = first * kept
        for chain, weight in zip(chains.view(3, *first.shape), weights, strict=True):
            mixed.addcmul_(chain, weight)
        return self._normalised(mixed).view(len(raw), count, *raw.shape[1:])

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Of [0, 255], in place."""
        mean, std = _statistics(self._transform, pixels)
        return pixels.div_(255 * std).sub_(mean / std)

    def _cropped(self, images: Tensor) -> Tensor:
        if self._crop == "resized":
            return resized_crop(images, self._draws, self._crops)
        padding = round(images.shape[-1] / 8)
        return ImageTransform((0.0,), (1.0,), padding, flip=True).augment(images, self._crops)


def resized_crop(images: Tensor, draws: torch.Generator, flips: torch.Generator) -> Tensor:
    """torchvision's random resized crop of each image, half of them mirrored; uint8 to the same.

    Args:
        images: [N, C, H, W].
        draws: On the CPU.
        flips: On the device of the images; draws nothing but the sides to look from.
    """
    n, _, height, width = images.shape
    numbers = torch.rand(4, n, 10, dtype=torch.float64, generator=draws)
    area = height * width * (0.08 + 0.92 * numbers[0])
    ratio = ((2 * numbers[1] - 1) * torch.tensor(4 / 3).log()).exp()
    wide, high = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide <= width) & (high <= height) & (wide > 0) & (high > 0)
    first = fits.int().argmax(1, keepdim=True)  # the first of ten attempts that fits
    some = fits.any(1, keepdim=True)

    def chosen(values: Tensor, otherwise: float) -> Tensor:
        return torch.where(some, values.gather(1, first), otherwise)

    wide, high = chosen(wide, width), chosen(high, height)
    left = (chosen(numbers[2], 0.5) * (width - wide + 1)).floor()
    top = (chosen(numbers[3], 0.5) * (height - high + 1)).floor()
    mirrored = torch.rand(n, generator=flips, device=images.device) < 0.5
    x = (torch.arange(width) + 0.5) * (wide / width) + left
    y = (torch.arange(height) + 0.5) * (high / height) + top
    grid_x, grid_y = (
        (2 * places / side - 1).float().to(images.device, non_blocking=True)
        for places, side in ((x, width), (y, height))
    )
    grid_x = torch.where(mirrored[:, None], grid_x.flip(1), grid_x)
    shape = n, height, width
    grid = torch.stack((grid_x[:, None].expand(shape), grid_y[:, :, None].expand(shape)), -1)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round_().to(images.dtype)


def apply_operations(images: Tensor, chosen: Tensor, generator: torch.Generator) -> None:
    """One of AugMix's operations for each image, in place, each operation once.

    Args:
        images: uint8 [N, C, H, W].
        chosen: Positions in `AUGMIX`, [N] int64 on the CPU; -1: none.
        generator: On the CPU; draws strengths and directions.
    """
    n, size = len(images), (images.shape[-2], images.shape[-1])
    level = 0.1 + 0.9 * torch.rand(n, dtype=torch.float64, generator=generator)
    sign = torch.randint(2, (n,), generator=generator) * 2 - 1
    for number, (operation, value) in enumerate(AUGMIX.values()):
        rows = (chosen == number).nonzero().flatten()
        if len(rows):
            values = value(level[rows], sign[rows], size).float()
            rows = rows.to(images.device, non_blocking=True)
            values = values.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
            images[rows] = operation(images[rows], values)


# Geometry: uint8 [N, C, H, W] and a value for each image, [N, 1, 1, 1], to the same. Bilinear, as
# Pillow does it; what comes from outside is grey.


def rotate(images: Tensor, value: Tensor) -> Tensor:
    """Counter-clockwise, in degrees."""
    cos, sin = value.deg2rad().cos(), value.deg2rad().sin()
    middle_y, middle_x = (side / 2 for side in images.shape[-2:])

    def source(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = x - middle_x, y - middle_y
        return cos * x - sin * y + middle_x, sin * x + cos * y + middle_y

    return _warp(images, source)


def shear_x(images: Tensor, value: Tensor) -> Tensor:
    """Rows slide to the left in proportion to their distance from the top."""
    return _warp(images, lambda x, y: (x + value * y, y))


def shear_y(images: Tensor, value: Tensor) -> Tensor:
    """Columns slide upwards in proportion to their distance from the left."""
    return _warp(images, lambda x, y: (x, y + value * x))


def translate_x(images: Tensor, value: Tensor) -> Tensor:
    """To the left, in pixels."""
    return _warp(images, lambda x, y: (x + value, y))


def translate_y(images: Tensor, value: Tensor) -> Tensor:
    """Upwards, in pixels."""
    return _warp(images, lambda x, y: (x, y + value))


def _warp(images: Tensor, source: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Each pixel from where `source` says that it comes from, in pixels from the top left."""
    height, width = images.shape[-2:]
    x = (torch.arange(width, device=images.device) + 0.5).view(1, 1, 1, -1)
    y = (torch.arange(height, device=images.device) + 0.5).view(1, 1, -1, 1)
    x, y = (places.expand(len(images), 1, height, width) for places in source(x, y))
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    grid = torch.stack((x * (2 / width) - 1, y * (2 / height) - 1), -1)[:, 0]
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    # What Pillow truncates it has computed in double precision.
    return torch.where(inside, moved.add_(1e-4), 128).to(images.dtype)


_Value = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def _pixels(side: int) -> _Value:
    return lambda level, sign, size: (level * size[side] / 30).trunc() * sign


#: The operation, and its value for a level in [0.1, 1], a sign and the height and width.
AUGMIX: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], _Value]] = {
    "autocontrast": (autocontrast, lambda level, *_: level),
    "equalize": (equalize, lambda level, *_: level),
    "rotate": (rotate, lambda level, sign, _: (level * 3).trunc() * sign),
    "solarize": (solarize, lambda level, *_: 256 - (level * 25.6).trunc()),
    "shear_x": (shear_x, lambda level, sign, _: level * 0.03 * sign),
    "shear_y": (shear_y, lambda level, sign, _: level * 0.03 * sign),
    "translate_x": (translate_x, _pixels(1)),
    "translate_y": (translate_y, _pixels(0)),
    "posterize": (posterize, lambda level, *_: 4 - (level * 0.4).trunc()),
}


def _image_transform(transform: Transform) -> ImageTransform:
    if isinstance(transform, ImageTransform):
        return transform
    raise UserError(
        "Random views are made of images whose normalisation is known; this scenario's inputs are "
        "something else. Choose a scenario of images, or a strategy that does not augment."
    )


def _statistics(transform: ImageTransform, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, [C, 1, 1] each, where the images are."""
    mean, std = (
        torch.tensor(v, device=images.device).view(-1, 1, 1)
        for v in (transform.mean, transform.std)
    )
    return mean, std
