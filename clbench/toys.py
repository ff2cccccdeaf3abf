"""Scenarios so small that a whole run takes a fraction of a second."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.classification import ClassIncrementalImages, Images, ImageScenario
from clbench.corrupted import CorruptedImages
from clbench.corruptions import corrupt
from clbench.nn.backbones import MLP, Backbone, ConvNet, FeatureExtractor, ModelFeatures
from clbench.nn.batch_statistics import batch_norms
from clbench.nn.heads import Classifier
from clbench.samples import TensorSource
from clbench.types import Split, Stream, derive_seed


@dataclass(kw_only=True)
class ToyScenario(ClassIncrementalImages):
    """Six noisy 6x6 patterns in three experiences of two: a run takes a fraction of a second.

    Attributes:
        per_class: Training samples of each class; half as many for testing.
        noise: Standard deviation of the noise, in grey levels.
    """

    backbone: Backbone = field(default_factory=lambda: MLP(hidden=(32,)))
    n_experiences: int = 3
    epochs: int = 5
    batch_size: int = 10
    memory_size: int = 30
    per_class: int = 40
    noise: float = 40.0

    def images(self, split: Split) -> Images:
        generator = torch.Generator().manual_seed(derive_seed(0, f"toy {split.value}"))
        patterns = 255 * torch.rand(6, 1, 6, 6, generator=generator)

        def part(count: int) -> TensorSource:
            targets = torch.arange(6).repeat(count)
            noise = self.noise * torch.randn(6 * count, 1, 6, 6, generator=generator)
            pixels = (patterns[targets] + noise).clamp(0, 255).to(torch.uint8)
            return TensorSource(pixels, targets)

        train, test = part(self.per_class), part(self.per_class // 2)
        return Images(train, test, [f"pattern {i}" for i in range(6)], (0.5,), (0.3,))


@dataclass(kw_only=True)
class ToyViT(Backbone):
    """timm's vision transformer in miniature, for `ToyScenario`: 16 features, two blocks.

    Started at random, with tokens and activations of the size that trained ones have, so that its
    features tell the toy's patterns apart.

    Attributes:
        patch_size: In pixels.
    """

    patch_size: int = 3

    @property
    def is_vision_transformer(self) -> bool:
        return True

    def _assemble(
        self, image_shape: tuple[int, int, int]
    ) -> tuple[FeatureExtractor, dict[str, Tensor]]:
        from timm.models.vision_transformer import VisionTransformer

        channels, *size = image_shape
        model = VisionTransformer(
            img_size=tuple(size),
            patch_size=self.patch_size,
            in_chans=channels,
            num_classes=0,
            embed_dim=16,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        return ModelFeatures(model, model.num_features), {}


@dataclass(kw_only=True)
class ToyDrift(CorruptedImages):
    """Six colour patterns of 8x8 pixels, corrupted in three ways: nothing is kept on disk.

    The model before adaptation has random convolutions, the statistics of the source in its batch
    norms, and a head that is solved for: no training.

    Attributes:
        per_class: Images of each class to learn the source from, and as many to corrupt.
        noise: Standard deviation of the noise of the clean images, in grey levels.
    """

    backbone: Backbone = field(default_factory=lambda: ConvNet(widths=(8, 16)))
    corruptions: tuple[str, ...] = ("brightness", "contrast", "gaussian_noise")
    batch_size: int = 10
    per_class: int = 10
    noise: float = 20.0

    def clean(self) -> Images:
        generator = torch.Generator().manual_seed(derive_seed(0, "toy drift"))
        blocks = 255 * torch.rand(6, 3, 2, 2, generator=generator)
        patterns = F.interpolate(blocks, (8, 8), mode="bilinear")

        def part() -> TensorSource:
            targets = torch.arange(6).repeat(self.per_class)
            noise = self.noise * torch.randn(len(targets), 3, 8, 8, generator=generator)
            pixels = (patterns[targets] + noise).clamp(0, 255).to(torch.uint8)
            return TensorSource(pixels, targets)

        names = [f"pattern {i}" for i in range(6)]
        return Images(part(), part(), names, (0.5,) * 3, (0.3,) * 3)

    def corrupted(
        self, images: Images, positions: Tensor, name: str, severity: int
    ) -> NDArray[np.uint8]:
        return corrupt(images.test.gather(positions).numpy(), name, severity, 0)

    def model(self, seed: int, stream: Stream) -> nn.Module:
        model = ImageScenario.model(self, seed, stream)
        assert isinstance(model, Classifier)
        assert stream.source is not None
        batch = stream.source.take(torch.arange(len(stream.source)))
        with torch.no_grad():
            _solve(model, batch.inputs, batch.targets)
        return model.eval()


def _solve(model: Classifier, inputs: Tensor, targets: Tensor) -> None:
    """Statistics of these samples, and the head of least squares for answers as sure as trained."""
    head, norms = model.head, batch_norms(model)
    assert isinstance(head, nn.Linear)
    for norm in norms:
        norm.momentum = 1.0
    model.train()(inputs)
    for norm in norms:
        norm.momentum = 0.1
    features = model.eval().features(inputs).double()
    features = torch.cat((features, torch.ones(len(features), 1)), 1)
    classes = F.one_hot(targets, head.out_features).double()
    gram = features.T @ features + 1e-3 * torch.eye(features.shape[1])
    weight = 10 * torch.linalg.solve(gram, features.T @ classes).T
    head.weight.copy_(weight[:, :-1])
    head.bias.copy_(weight[:, -1])
