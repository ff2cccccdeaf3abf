"""What methods with a teacher or with random views cost beside plain inference. Not a test.

    python tests/speed/teachers.py [--rounds 3] [--batch-size 200]

Methods: one batch of ResNet-20 on random 32x32 images through the suite's whole loop, beside the
source's; CoTTA also beside a loop by hand, which does what its published code does. Views: 32 of
CoTTA's for one batch, made by the suite for several views at once, and by torchvision as the
published code composes them, one view of the batch at a time; 32 AugMix copies of 20 images, by
the suite all at once, by Pillow as MEMO's code does, one copy at a time.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from adaptation import LAST, MEAN, STD, by_batch, normalised, random_images, resnet, suite
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T
from turns import Pass, compare, show

from clbench.adaptation import Adaptation
from clbench.nn.test_time_augmentation import AugMixViews, CoTTAViews
from clbench.nn.transforms import ImageTransform
from clbench.toys import ToyDrift
from clbench.types import Context
from strategies.cotta import CoTTA
from strategies.memo import MEMO
from strategies.psmt import PSMT
from strategies.rotta import RoTTA
from strategies.source import Source

#: Of CoTTA's confidence, below which it makes views.
THRESHOLDS = {"cotta, sure: no views": 0.0, "cotta, unsure: 32 views": 1.1}
METHODS: dict[str, Adaptation] = {
    "source": Source(),
    **{name: CoTTA(confidence_threshold=least) for name, least in THRESHOLDS.items()},
    "rotta": RoTTA(),
    "psmt, sure: no views": PSMT(confidence_threshold=0.0),
    "psmt, unsure: 32 views": PSMT(confidence_threshold=1.1),
    "memo": MEMO(),
}
GREY = (128, 128, 128)


def published_view(pixels: Tensor, draw: random.Random) -> Tensor:
    """One view of a batch, as CoTTA's code composes it of torchvision's functions."""
    x = pixels.clamp(0, 1)
    jitters: list[Callable[[Tensor], Tensor]] = [
        lambda x: T.adjust_brightness(x, draw.uniform(0.6, 1.4)),
        lambda x: T.adjust_contrast(x, draw.uniform(0.7, 1.3)),
        lambda x: T.adjust_saturation(x, draw.uniform(0.5, 1.5)),
        lambda x: T.adjust_hue(x, draw.uniform(-0.06, 0.06)),
        lambda x: T.adjust_gamma(x.clamp(1e-8, 1.0), draw.uniform(0.7, 1.3)),
    ]
    for jitter in draw.sample(jitters, 5):
        x = jitter(x)
    x = T.pad(x, 16, padding_mode="edge")
    angle, scale = draw.uniform(-15, 15), draw.uniform(0.9, 1.1)
    shift = [draw.randint(-4, 4), draw.randint(-4, 4)]
    x = T.affine(x, angle, shift, scale, [0.0], InterpolationMode.BILINEAR)
    x = T.center_crop(T.gaussian_blur(x, 5, draw.uniform(0.001, 0.5)), 32)
    mirrored: Tensor = T.hflip(x)
    x = mirrored if draw.random() < 0.5 else x
    noisy: Tensor = x + 0.005 * torch.randn_like(x)
    return noisy.clamp(0, 1)


def published_copy(image: Image.Image, draw: np.random.Generator) -> Tensor:
    """One copy of an image, as MEMO's code makes it with Pillow."""

    def affine(x: Image.Image, *matrix: float) -> Image.Image:
        transform = Image.Transform.AFFINE
        return x.transform(x.size, transform, matrix, Image.Resampling.BILINEAR, 1, GREY)

    def level(largest: float) -> float:
        return float(draw.choice((-1, 1)) * draw.uniform(0.1, 1) * largest)

    operations: list[Callable[[Image.Image], Image.Image]] = [
        ImageOps.autocontrast,
        ImageOps.equalize,
        lambda x: x.rotate(int(level(3)), Image.Resampling.BILINEAR, fillcolor=GREY),
        lambda x: ImageOps.solarize(x, 256 - int(abs(level(25.6)))),
        lambda x: affine(x, 1, level(0.03), 0, 0, 1, 0),
        lambda x: affine(x, 1, 0, 0, level(0.03), 1, 0),
        lambda x: affine(x, 1, 0, int(level(1.07)), 0, 1, 0),
        lambda x: affine(x, 1, 0, 0, 0, 1, int(level(1.07))),
        lambda x: ImageOps.posterize(x, 4),
    ]
    left, top = draw.integers(9, size=2)
    first = ImageOps.expand(image, 4).crop((left, top, left + 32, top + 32))
    first = ImageOps.mirror(first) if draw.random() < 0.5 else first
    mixed = torch.zeros(3, 32, 32)
    for weight in draw.dirichlet([1.0, 1.0, 1.0]):
        chain = first
        for _ in range(draw.integers(1, 4)):
            chain = operations[draw.integers(9)](chain)
        mixed += float(weight) * T.normalize(T.to_tensor(chain), MEAN, STD)
    share = float(draw.random())
    plain: Tensor = T.normalize(T.to_tensor(first), MEAN, STD)
    return share * plain + (1 - share) * mixed


def cotta_steps(threshold: float, images: Tensor, labels: Tensor, size: int) -> Pass:
    """CoTTA by hand, as its published code has it: a view at a time, a tensor at a time."""
    student = by_batch(resnet().to(memory_format=LAST))
    teacher, anchor = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    source = [p.detach().clone() for p in student.parameters()]
    optimizer, draw = torch.optim.Adam(student.parameters(), 1e-3), random.Random(0)

    @torch.no_grad()
    def pseudo_labels(x: Tensor) -> Tensor:
        if anchor(normalised(x)).softmax(1).amax(1).mean() >= threshold:
            sure: Tensor = teacher(normalised(x))
            return sure
        views = (published_view(x.float() / 255, draw) for _ in range(32))
        return torch.stack([teacher(normalised(255 * view)) for view in views]).mean(0)

    @torch.no_grad()
    def follow() -> None:
        pairs = zip(teacher.parameters(), student.parameters(), source, strict=True)
        for slow, fast, first in pairs:
            slow.copy_(0.999 * slow + 0.001 * fast)
            mask = torch.rand_like(fast) < 0.01
            fast.copy_(torch.where(mask, first, fast))

    def run() -> float:
        right = 0
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            outputs, targets = student(normalised(x)), pseudo_labels(x)
            loss = -(targets.softmax(1) * outputs.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            follow()
            right += int((targets.argmax(1) == y).sum())
        return right / len(images)

    return run


def views(images: Tensor) -> tuple[dict[str, Pass], dict[str, Pass]]:
    """Makers of CoTTA's views and of AugMix copies, the suite's first."""
    transform, scenario = ImageTransform(MEAN, STD), ToyDrift()
    context = Context(
        device=torch.device("cpu"),
        seed=0,
        scenario=scenario,
        objective=scenario.objective(),
        transform=transform,
        n_outputs=10,
    )
    ours, copies = CoTTAViews(context), AugMixViews(context)
    inputs, pixels, some = transform.test(images), images.float() / 255, images[:20]
    drawn, numbers = random.Random(0), np.random.default_rng(0)

    def suite_views() -> None:
        for _ in ours(inputs, 32):
            pass

    def suite_copies() -> None:
        copies(some, 32)

    def by_torchvision() -> None:
        for _ in range(32):
            published_view(pixels, drawn)

    def by_pillow() -> None:
        for row in some:
            image = Image.fromarray(row.permute(1, 2, 0).numpy())
            torch.stack([published_copy(image, numbers) for _ in range(32)])

    return (
        {"clbench": suite_views, "torchvision, view by view": by_torchvision},
        {"clbench": suite_copies, "Pillow, copy by copy": by_pillow},
    )


def table(title: str, contenders: dict[str, Pass], rounds: int, per: int) -> None:
    """Prints processor times and their ratios to the first contender's of the same round."""
    seconds = compare(contenders, rounds)
    first = next(iter(seconds.values()))
    print(f"\n| {title} | ms an image | x |\n|---|---|---|")
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, first, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {statistics.median(times) / per * 1000:.3f} | {spread} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=200)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = asked.batch_size
    images, labels = random_images(size)
    methods = {
        name: suite(copy.deepcopy(method), images, labels, size) for name, method in METHODS.items()
    }
    table("method", methods, asked.rounds, size)
    for title, threshold in THRESHOLDS.items():
        pair = {"clbench": methods[title], "by hand": cotta_steps(threshold, images, labels, size)}
        show(title, compare(pair, asked.rounds), "by hand", size, "image")
    for title, contenders, count in zip(
        ("32 views of CoTTA's", "32 copies of AugMix"), views(images), (size, 20), strict=True
    ):
        table(title, contenders, asked.rounds, count)


if __name__ == "__main__":
    main()
