"""Backbones: from images to feature vectors, started at random or from a weight file."""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench import checksums, hub
from clbench.errors import UserError
from clbench.nn.weights import (
    HEADS,
    SUFFIXES,
    WRAPPERS,
    State,
    brief,
    fit,
    read,
    sha256,
    split_head,
    unwrap,
)
from clbench.types import CONTENT

_RESIZE = (
    "Choose a scenario with images of another size or another backbone.name, or set "
    "backbone.patch_size."
)
# By name: timm has norm layers of its own, without a common base class.
_NORM_LAYER = re.compile(r"Norm(Act)?(\dd?)?$")


class FeatureExtractor(nn.Module, ABC):
    """Images to one feature vector each.

    Attributes:
        n_features: Length of the vector.
        size: Height and width that images are resized to first; None: they come as they are.
    """

    n_features: int
    size: tuple[int, int] | None = None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Features of normalised images, [B, C, H, W] float to [B, n_features]."""


@dataclass(kw_only=True)
class Backbone(ABC):
    """What a scenario's model reads images with; the fields are the options of its YAML.

    Attributes:
        weights: Local file to start from: .safetensors, or .pt/.pth (read without unpickling
            code). None: random initialisation.
        load_head: Keep the final layer of the weights too, if it has as many outputs as there
            are classes (see `clbench.nn.heads.classifier`).
        mean: Per channel, in [0, 1]: the input normalisation that the weights expect. None: the
            scenario's own statistics.
        std: Per channel, positive; given together with `mean`.

    Raises:
        UserError: If options contradict each other.
    """

    weights: str | None = field(default=None, metadata=CONTENT)
    load_head: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and Path(self.weights).suffix not in SUFFIXES:
            raise UserError(
                f"backbone.weights={self.weights}: give a file that ends in {', '.join(SUFFIXES)}."
            )
        if self.load_head and not self.starts_trained:
            raise UserError("backbone.load_head=true needs trained weights: set backbone.weights.")
        mean, std = self.mean or (), self.std or ()
        if len(mean) != len(std) or min(std, default=1.0) <= 0:
            raise UserError(
                f"backbone.mean={self.mean} and backbone.std={self.std}: give both or neither, "
                "one value per channel, every std above zero."
            )

    @property
    def starts_trained(self) -> bool:
        """Whether `build` loads weights."""
        return self.weights is not None

    @property
    def is_vision_transformer(self) -> bool:
        """Whether it makes one of timm's, as methods need that put things between its blocks."""
        return False

    @property
    def title(self) -> str:
        """Name for result files."""
        return type(self).__name__

    def published(self) -> dict[str, Any] | None:
        """Origin of weights that no file of the user holds: plain data. None: there are none."""
        return None

    def build(self, image_shape: tuple[int, int, int]) -> FeatureExtractor:
        """The extractor, initialised from torch's global generator, then loaded if asked.

        The caller seeds that generator and puts it back.

        Args:
            image_shape: (channels, height, width).

        Raises:
            UserError: If the weights can't be read or don't fit, or the images don't.
        """
        return self.build_with_head(image_shape)[0]

    def build_with_head(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        """As `build`, with the tensors of the final layer that came with the weights, or {}."""
        if self.mean is not None and len(self.mean) != image_shape[0]:
            raise UserError(
                f"The images have {image_shape[0]} channels, the normalisation of backbone "
                f"{self.title} has {len(self.mean)} values: set backbone.mean and backbone.std."
            )
        return self._assemble(image_shape)

    @abstractmethod
    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        """The extractor and its weights' final layer."""


@dataclass(kw_only=True)
class MLP(Backbone):
    """Fully connected ReLU layers on the flattened image, initialised as PyTorch does.

    Attributes:
        hidden: Width of each layer; the last is the number of features.
    """

    hidden: tuple[int, ...] = (400, 400)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("hidden", self.hidden)

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        extractor = _MLPFeatures(math.prod(image_shape), self.hidden)
        return extractor, _load_file(extractor, self.weights)


@dataclass(kw_only=True)
class ConvNet(Backbone):
    """Blocks of 3x3 convolution, batch norm, ReLU and 2x2 max-pooling, then the global average.

    Trains in seconds on one core; initialised as PyTorch does.

    Attributes:
        widths: Filters of each block; the last is the number of features.
    """

    widths: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("widths", self.widths)

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        if min(image_shape[1:]) < 2 ** len(self.widths):
            raise UserError(
                f"backbone.widths={[*self.widths]} halves images {len(self.widths)} times, too "
                f"often for {image_shape[1]}x{image_shape[2]} pixels. Give fewer widths."
            )
        extractor = _ConvFeatures(image_shape[0], self.widths)
        return extractor, _load_file(extractor, self.weights)


@dataclass(kw_only=True)
class SlimResNet18(Backbone):
    """The reduced ResNet-18 of the replay literature (Lopez-Paz & Ranzato 2017, 1706.08840).

    3x3 stem of stride 1, no max-pooling, four stages of two blocks, a third of the filters.

    **Differs from the paper:** global average pooling where its code pools 4x4 windows: equal
    for 28x28 and 32x32 images, but 8 x width features for larger ones too (its descendants have
    4 times as many at 84x84). Kaiming-normal convolutions (fan-out, ReLU gain; batch norm 1 and
    0) where its code leaves PyTorch's default.

    Attributes:
        width: Filters of the first stage; there are 8 x width features.
    """

    width: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("width", (self.width,))

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        widths = [self.width * factor for factor in (1, 2, 4, 8)]
        extractor = ResNet(image_shape[0], widths, 2, "cifar", "projection")
        return extractor, _load_file(extractor, self.weights)


@dataclass(kw_only=True)
class ResNet18(Backbone):
    """ResNet-18 (He et al. 2016, 1512.03385) with 64 filters and 512 features.

    State-dict keys are torchvision's and timm's, so their ImageNet files load into the
    "imagenet" stem. Kaiming-normal convolutions (fan-out, ReLU gain), batch norm 1 and 0.

    Attributes:
        stem: "cifar": 3x3 of stride 1, no max-pooling, for images up to 64x64. "imagenet": 7x7
            of stride 2 and max-pooling, as in the paper.
    """

    stem: Literal["cifar", "imagenet"] = "cifar"

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        extractor = ResNet(image_shape[0], (64, 128, 256, 512), 2, self.stem, "projection")
        return extractor, _load_file(extractor, self.weights)


@dataclass(kw_only=True)
class CifarResNet(Backbone):
    """ResNet-20/32/56 for 32x32 images (He et al. 2016, 1512.03385, section 4.2).

    16-32-64 filters, shortcuts without parameters (option A), 64 features. Kaiming-normal
    convolutions (fan-out, ReLU gain), batch norm 1 and 0.

    **Differs from the paper:** nothing in the architecture; it leaves open where the zero
    channels go: here half before and half after, as in the common public weights.

    Attributes:
        depth: Layers with weights, the classifier's included: 6 x blocks per stage + 2.
    """

    depth: Literal[20, 32, 56] = 20

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        blocks = (self.depth - 2) // 6
        extractor = ResNet(image_shape[0], (16, 32, 64), blocks, "cifar", "zero_pad")
        return extractor, _load_file(extractor, self.weights)


@dataclass(kw_only=True)
class Timm(Backbone):
    """Any model of timm by name, without its classifier; `extractor.model` is timm's module.

    Models of fixed input size (ViT, Swin, Mixer...) are built for the scenario's image size, not
    fed with enlarged images: a ViT of patch 16 sees a 32x32 image as 2x2 patches. timm resamples
    pre-trained position embeddings (and patch embeddings, with `patch_size`) to fit, which is
    far from how they were trained: published numbers need a scenario that resizes its images.
    With trained weights and no `mean`, `mean` and `std` become those that timm records for the
    name. A weight file goes through timm's own loader, as strict about keys as timm is for that
    model.

    Attributes:
        name: Architecture or architecture.tag, as in `timm.list_models(include_tags=True)`.
        pretrained: Download the tag's weights from the hub, or take them from its cache.
        patch_size: In pixels, for models with a patch embedding. None: the model's own.
        drop_rate: Dropout before the classifier, in [0, 1). None: the model's own.
        drop_path_rate: Stochastic depth, in [0, 1). None: the model's own.
        input_size: "images": the model is built for the size that they come in; "weights": they
            are resized (bicubic, antialiased, on the device) to the size that timm records for
            the name, as most published numbers of small images have it.
    """

    name: str
    pretrained: bool = False
    patch_size: int | None = None
    drop_rate: float | None = None
    drop_path_rate: float | None = None
    input_size: Literal["images", "weights"] = "images"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrained and self.weights is not None:
            raise UserError("backbone.pretrained=true and backbone.weights: give one of them.")
        for option, rate in (
            ("drop_rate", self.drop_rate),
            ("drop_path_rate", self.drop_path_rate),
        ):
            if rate is not None and not 0 <= rate < 1:
                raise UserError(f"backbone.{option}={rate}: give a number in [0, 1).")
        if self.starts_trained:
            # Also without need for the mean: a wrong name is to stop here, before any data load.
            config = _timm_config(self.name)
            if self.mean is None:
                self.mean, self.std = tuple(config.mean), tuple(config.std)

    @property
    def starts_trained(self) -> bool:
        return self.pretrained or self.weights is not None

    @property
    def is_vision_transformer(self) -> bool:
        from timm.models import is_model_in_modules

        known = "vision_transformer", "deit"
        return bool(is_model_in_modules(self.name.partition(".")[0], known))

    @property
    def title(self) -> str:
        return f"timm/{self.name}"

    def published(self) -> dict[str, Any] | None:
        if not self.pretrained:
            return None
        config = _timm_config(self.name)
        return {"tag": config.tag, "hub": config.hf_hub_id, "url": config.url}

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        config = _timm_config(self.name)
        size = tuple(config.input_size[1:]) if self.input_size == "weights" else None
        image_shape = (image_shape[0], *(size or image_shape[1:]))
        head: State = {}
        overlay: dict[str, Any] | None = None
        if self.weights is not None:
            known = (
                (config.classifier,) if isinstance(config.classifier, str) else config.classifier
            )
            state = unwrap(read(self.weights), (*WRAPPERS, "features.model.", "model."))
            state, head = split_head(state, {*HEADS, *(known or ())})
            if not state:
                raise UserError(f"{self.weights} holds a final layer only.")
            # Without the classifier's name timm has nothing to drop, and so stays strict.
            overlay = {"state_dict": state, "classifier": None}
        model = self._create(image_shape, config.fixed_input_size, overlay)
        # timm keeps the overlay, a second copy of all weights.
        model.pretrained_cfg.pop("state_dict", None)
        if self.pretrained and self.load_head:
            head = dict(model.get_classifier().state_dict())
            model.reset_classifier(0)
        n_features = _timm_features(model, image_shape, self.name)
        _require_whole_patches(model, image_shape, self.name)
        return ModelFeatures(model, n_features, size), head

    def _create(
        self,
        image_shape: tuple[int, int, int],
        fixed_input_size: bool,
        overlay: dict[str, Any] | None,
    ) -> Any:
        """timm's module, with its classifier only where `load_head` asks the hub for it."""
        import timm

        try:
            with hub.quiet(), _verified(self.name) if self.pretrained else nullcontext():
                return timm.create_model(
                    self.name,
                    pretrained=self.starts_trained,
                    pretrained_cfg_overlay=overlay,
                    num_classes=None if self.pretrained and self.load_head else 0,
                    in_chans=image_shape[0],
                    # Models that read any size refuse the option; None leaves it out.
                    img_size=image_shape[1:] if fixed_input_size else None,
                    patch_size=self.patch_size,
                    drop_rate=self.drop_rate,
                    drop_path_rate=self.drop_path_rate,
                )
        except UserError:
            raise
        # timm, the hub's client and its transport share no base class for what goes wrong here.
        except Exception as error:
            if self.weights is not None:
                start = f"{self.weights} doesn't fit timm's {self.name}"
                advice = "Choose the name and options that the file was saved with."
            elif self.pretrained:
                start = f"timm couldn't get the weights of {self.name} from the hub"
                advice = (
                    "Where there is no network, download the file elsewhere and set "
                    "backbone.weights=<file> and backbone.pretrained=false."
                )
            else:
                start = f"timm couldn't build {self.name} for images of shape {image_shape}"
                advice = "Change backbone.name or its options."
            raise UserError(f"{start}: {brief(error)}. {advice}") from error


def _verified(name: str) -> AbstractContextManager[None]:
    """What timm fetches of trained weights in the block, and what it takes from a cache."""
    published = _timm_config(name).hf_hub_id
    if published:
        return hub.verified(published, "model")
    return checksums.watched(Path(torch.hub.get_dir()) / "checkpoints")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm round a shortcut (He et al. 2016, figure 2).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution and the shortcut.
        shortcut: Where shapes differ: "zero_pad" (option A) or "projection" (option B).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: Literal["zero_pad", "projection"],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.downsample = nn.Identity()
        elif shortcut == "zero_pad":
            self.downsample = ZeroPadShortcut(out_channels - in_channels, stride)
        else:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        # Not in place: methods that hook batch norm read its output later.
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ZeroPadShortcut(nn.Module):
    """Option A: every stride-th pixel, and zero channels on both sides. No parameters.

    Args:
        extra: Channels to add; the odd one goes last.
        stride: Between the pixels kept.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = extra // 2, extra - extra // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C + extra, ceil(H / stride), ceil(W / stride)]."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, self.before, self.after))


class ResNet(FeatureExtractor):
    """Basic blocks in three or four stages, then the global average.

    Args:
        in_channels: Channels of the images.
        widths: Filters of each stage; every stage after the first halves the resolution.
        blocks: Per stage.
        stem: "cifar" or "imagenet", see `ResNet18`.
        shortcut: See `BasicBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        blocks: int,
        stem: Literal["cifar", "imagenet"],
        shortcut: Literal["zero_pad", "projection"],
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        channels = widths[0]
        for stage, width in enumerate(widths, start=1):
            first = BasicBlock(channels, width, 1 if stage == 1 else 2, shortcut)
            rest = (BasicBlock(width, width, 1, shortcut) for _ in range(blocks - 1))
            # Named as in the public weight files.
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            channels = width
        self.n_features, self._stages = channels, len(widths)
        # Batch norm starts at 1 and 0 anyway.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, n_features]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self._stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean((2, 3))


class _ConvFeatures(FeatureExtractor):
    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for width in widths:
            convolution = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            norm = nn.BatchNorm2d(width)
            blocks.append(nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool2d(2)))
            in_channels = width
        self.blocks, self.n_features = nn.Sequential(*blocks), in_channels

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(x)
        return features.mean((2, 3))


class _MLPFeatures(FeatureExtractor):
    def __init__(self, n_inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(n_inputs, width), nn.ReLU()]
            n_inputs = width
        self.layers, self.n_features = nn.Sequential(*layers), n_inputs

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features


class ModelFeatures(FeatureExtractor):
    """Features of a whole model of another library.

    Args:
        model: It, without a classifier.
        n_features: Length of its output.
        size: Height and width that images are resized to before it; None: they come as they are.
    """

    def __init__(
        self, model: nn.Module, n_features: int, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.model, self.n_features, self.size = model, n_features, size

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, n_features]."""
        features: Tensor = self.model(resized(x, self.size))
        return features


def resized(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Normalised images, [B, C, H, W], in another size: bicubic, antialiased; None: as they are."""
    if size is None or x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bicubic", antialias=True)


def describe(backbone: Backbone, extractor: FeatureExtractor) -> dict[str, Any]:
    """Plain data for the result file: what the features were made with.

    Args:
        backbone: The options.
        extractor: What its `build` returned, trained or not.

    Returns:
        name, parameters (count), n_features, weights ({"file", "sha256"}, or {"tag", "hub",
        "url"} from timm's hub, or what a pre-training of the suite's own tells, or None), mean,
        std, resized_to ([height, width] or None), norm_layers (class names).
    """
    weights = backbone.published()
    if backbone.weights is not None:
        path = Path(backbone.weights).expanduser()
        weights = {"file": path.name, "sha256": sha256(path)}
    kinds = {type(module).__name__ for module in extractor.modules()}
    return {
        "name": backbone.title,
        "parameters": sum(parameter.numel() for parameter in extractor.parameters()),
        "n_features": extractor.n_features,
        "weights": weights,
        "mean": None if backbone.mean is None else list(backbone.mean),
        "std": None if backbone.std is None else list(backbone.std),
        "resized_to": None if extractor.size is None else list(extractor.size),
        "norm_layers": sorted(kind for kind in kinds if _NORM_LAYER.search(kind)),
    }


def _load_file(extractor: FeatureExtractor, weights: str | None) -> State:
    """Loads a file, if any, into the extractor; returns the final layer that it holds, or {}."""
    if weights is None:
        return {}
    state, head = split_head(unwrap(read(weights), (*WRAPPERS, "features.")), HEADS)
    fit(extractor, state, weights)
    return head


def _timm_config(name: str) -> Any:
    """timm's record of a model's input and weights.

    Raises:
        UserError: If timm knows no such architecture, or no such weights of it.
    """
    import timm
    from timm.models import PretrainedCfg, get_deprecated_models

    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        renamed = get_deprecated_models().get(architecture)
        near = [renamed] if renamed else difflib.get_close_matches(architecture, known, n=5)
        guess = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"backbone.name={name}: timm {timm.__version__} has no such model. {guess}"
            f"timm.list_models() lists all {len(known)}."
        )
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tagged:
        raise UserError(f"backbone.name={name}: timm knows {', '.join(tagged) or architecture}.")
    return timm.get_pretrained_cfg(name) or PretrainedCfg()


def _timm_features(model: nn.Module, image_shape: tuple[int, int, int], name: str) -> int:
    """Features per image, from one black image: timm's attributes differ between models."""
    model.eval()
    try:
        with torch.no_grad():
            features = model(torch.zeros(1, *image_shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"timm's {name} can't read images of shape {image_shape}: {brief(error)}. {_RESIZE}"
        ) from error
    model.train()
    if features.ndim != 2:
        raise UserError(f"timm's {name} gives {[*features.shape]}, not one vector per image.")
    return int(features.shape[1])


def _require_whole_patches(model: nn.Module, image_shape: tuple[int, int, int], name: str) -> None:
    """Refuses images that don't divide into patches: timm leaves the remainder out silently."""
    from timm.layers import PatchEmbed

    for module in model.modules():
        if isinstance(module, PatchEmbed) and not module.dynamic_img_pad:
            sides = module.img_size or image_shape[1:]
            if any(side % patch for side, patch in zip(sides, module.patch_size, strict=True)):
                raise UserError(
                    f"timm's {name} cuts images of shape {image_shape} into patches of "
                    f"{module.patch_size} and would ignore what is left over. {_RESIZE}"
                )


def _at_least_one(option: str, values: Sequence[int]) -> None:
    if not values or min(values) < 1:
        raise UserError(f"backbone.{option}={[*values]}: give whole numbers of at least 1.")
