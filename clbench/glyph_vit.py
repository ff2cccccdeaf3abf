"""A small vision transformer that the suite trains itself, on characters that are in no stream."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench import cache, glyph_datasets, machine
from clbench.classification import Images
from clbench.errors import UserError
from clbench.glyph_catalogue import Catalogue, Pool
from clbench.nn.backbones import Backbone, FeatureExtractor, ModelFeatures
from clbench.nn.transforms import ImageTransform
from clbench.nn.weights import HEADS, WRAPPERS, State, fit, read, split_head, unwrap
from clbench.progress import counting
from clbench.samples import Samples
from clbench.types import LOCATION, derive_seed, require

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

#: The images that it reads.
SHAPE = (3, 32, 32)

#: Changes whenever the code below gives other weights.
_VERSION = 1

Tell = Callable[[int, int], None]


@dataclass(kw_only=True)
class GlyphViT(Backbone):
    """timm's vision transformer for 32x32 images, pre-trained here on rendered characters.

    The characters are those of the glyphs' pre-training pool: neither tuning nor evaluation ever
    shows one of them. Cross-entropy over the characters; images moved, resized and recoloured at
    random; one cosine cycle after a linear warm-up. Matrices of the blocks follow Muon (Jordan et
    al. 2024, with the step size of Liu et al. 2025, 2502.16982: with AdamW alone, the loss stays
    where it began for most of so short a training), everything else AdamW. Most of the training
    shows a part of the patches only (Li et al. 2023, FLIP, 2212.00794), the rest of it all.
    Position embeddings start as sines and cosines and are trained.

    Few characters on purpose: the nearest mean by cosine among the 100 characters of
    `scenario=glyphs` is right in 73 to 76 % of the images (two seeds; 1 % before any training), a
    linear classifier of the same features in 89 to 91 %. On 100 characters for tuning, a run each,
    30 characters gave 82 % and 50 gave 87 %; trained two and four times as long, 100 gave 97 % and
    all 374 gave 99.8 %, which leaves a method nothing to improve.

    Made once, in two minutes of CPU time, and kept in the cache folder; `build` then only reads
    it. The same options give the same weights on the same machine with as many threads; elsewhere
    the last bits differ, so a result states the hash of what it used. The features are the class
    token.

    Attributes:
        mean: See `Backbone`; also that of the pre-training.
        std: Likewise.
        patch_size: In pixels; divides 32.
        embed_dim: Features; a multiple of `num_heads`, and of 4 for the position embeddings.
        depth: Blocks.
        num_heads: Of the attention.
        n_classes: Characters to pre-train on; 0: all there are.
        train_per_class: Images of each to train on.
        test_per_class: Further images of each, to measure the accuracy that results state.
        epochs: Passes over the images.
        batch_size: Images in a step.
        learning_rate: Highest, of AdamW.
        muon_learning_rate: Highest, of Muon; as large as AdamW's would be for these matrices.
        weight_decay: Decoupled; of matrices, not of norms, biases and tokens.
        warmup: Part of the steps, in [0, 1), in which the learning rates rise to the highest.
        hidden_patches: Part of the patches, in [0, 1), that a step leaves out.
        whole: Part of the steps, in [0, 1], at the end, that leave out none.
        shift: Largest displacement of an image in pixels.
        scale: Largest relative change of its size.
        contrast: Largest relative change of its contrast, and of the brightness of each channel
            as a part of the range.
        recolour: Swap the channels at random, and make every second image a negative.
        seed: Decides initialisation, order and augmentation.
        cache_dir: Where weights and images are kept; None: the user's cache folder.
        device: Where to pre-train: "auto", "cpu" or "cuda".

    Raises:
        UserError: If an option is out of range.
    """

    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    patch_size: int = 4
    embed_dim: int = 96
    depth: int = 4
    num_heads: int = 3
    n_classes: int = 20
    train_per_class: int = 100
    test_per_class: int = 20
    epochs: int = 36
    batch_size: int = 64
    learning_rate: float = 3e-3
    muon_learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    hidden_patches: float = 0.5
    whole: float = 0.2
    shift: float = 2.0
    scale: float = 0.1
    contrast: float = 0.1
    recolour: bool = True
    seed: int = 0
    cache_dir: Path | None = field(default=None, metadata=LOCATION)
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=LOCATION)

    def __post_init__(self) -> None:
        if self.load_head and self.weights is None:
            raise UserError(
                "backbone.load_head=true: the pre-trained outputs name characters that are in no "
                "stream. Set backbone.load_head=false."
            )
        super().__post_init__()
        if self.mean is None or len(self.mean) != SHAPE[0]:
            raise UserError(
                f"backbone.mean={self.mean}: vit_glyphs needs mean and std of {SHAPE[0]} channels."
            )
        sizes = "patch_size", "embed_dim", "depth", "num_heads", "train_per_class"
        require(self, *sizes, "test_per_class", "epochs", "batch_size", at_least=1)
        require(self, "learning_rate", "muon_learning_rate", above=0)
        require(self, "n_classes", "weight_decay", "shift", "seed", at_least=0)
        require(self, "warmup", "hidden_patches", "scale", "contrast", at_least=0, at_most=0.99)
        require(self, "whole", at_least=0, at_most=1)
        if self.embed_dim % 4:
            raise UserError(f"backbone.embed_dim={self.embed_dim}: give a multiple of 4.")
        for whole, part in (("32", "patch_size"), ("embed_dim", "num_heads")):
            of = getattr(self, whole, SHAPE[1])
            if of % getattr(self, part):
                raise UserError(
                    f"backbone.{part}={getattr(self, part)} does not divide {whole} ({of})."
                )

    @property
    def starts_trained(self) -> bool:
        return True

    @property
    def is_vision_transformer(self) -> bool:
        return True

    def published(self) -> dict[str, Any] | None:
        """Hash of the weights, what they reach on held-out images, where and how long it took."""
        if self.weights is not None:
            return None
        made = self._pretrained()
        return {
            "sha256": hashlib.sha256(made["parameters"].tobytes()).hexdigest(),
            "held_out_accuracy": float(made["held_out_accuracy"]),
            **json.loads(str(made["circumstances"])),
        }

    def build_with_head(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:
        if tuple(image_shape) != SHAPE:
            raise UserError(
                f"backbone=vit_glyphs reads 3x32x32 images, but this scenario's are "
                f"{'x'.join(map(str, image_shape))}. Use it with colour images of that size, such "
                "as scenario=glyphs, font_domains or split_cifar10, or choose another backbone."
            )
        return super().build_with_head(image_shape)

    def _assemble(self, image_shape: tuple[int, int, int]) -> tuple[FeatureExtractor, State]:  # noqa: ARG002
        model = self.transformer()
        extractor = ModelFeatures(model, self.embed_dim)
        if self.weights is not None:
            state = unwrap(read(self.weights), (*WRAPPERS, "features.model.", "model."))
            state, head = split_head(state, HEADS)
            fit(model, state, self.weights)
            return extractor, head
        named = dict(model.named_parameters())
        flat = torch.from_numpy(self._pretrained()["parameters"])
        parts = flat.split([parameter.numel() for parameter in named.values()])
        shaped = (part.view_as(p) for part, p in zip(parts, named.values(), strict=True))
        fit(model, dict(zip(named, shaped, strict=True)), self.title)
        return extractor, {}

    def transformer(self, hidden_patches: float = 0.0) -> VisionTransformer:
        """timm's module without a classifier, initialised from torch's global generator.

        Args:
            hidden_patches: Part of the patches that it leaves out while it is in training mode.
        """
        from timm.layers import build_sincos2d_pos_embed
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=SHAPE[1],
            patch_size=self.patch_size,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            num_classes=0,
            patch_drop_rate=hidden_patches,
        )
        grid = list(model.patch_embed.grid_size)
        with torch.no_grad():
            model.pos_embed[:, 1:] = 0.5 * build_sincos2d_pos_embed(grid, self.embed_dim)
        return model

    def _pretrained(self) -> dict[str, cache.Array]:
        """The cache's entry, made first where there is none."""
        folder = self.cache_dir or cache.default_folder()
        available = glyph_datasets.known(self.cache_dir)
        characters = glyph_datasets.chosen(available, Pool.PRETRAINING, self.n_classes)
        apart = ("weights", "load_head")
        options = [f.name for f in fields(self) if f.metadata.get("identity", True)]
        key = {
            "version": _VERSION,
            "options": {name: getattr(self, name) for name in options if name not in apart},
            "characters": characters,
            **glyph_datasets.fingerprint(),
        }
        # Read whole, so that a damaged file is noticed: other weights would be other results.
        return cache.arrays(
            folder, "vit_glyphs", key, lambda: self._pretrain(available, characters), mmap=False
        )

    def _pretrain(self, available: Catalogue, characters: str) -> Mapping[str, cache.Array]:
        images = glyph_datasets.made(
            characters,
            available.faces_of(characters),
            (self.train_per_class, self.test_per_class),
            SHAPE[1],
            self.cache_dir,
        )
        device = machine.choose_device(self.device)
        torch.zeros(1, device=device)  # a device that sleeps has no generator to isolate
        threads = machine.idle_cores()
        began = time.perf_counter()
        with (
            machine.isolated_rng(self.seed, "vit_glyphs"),
            machine.thread_count(threads),
            machine.deterministic(),
            counting("pre-training vit_glyphs, once", "images") as tell,
        ):
            model, accuracy = pretrain(self, images, device, tell)
        circumstances = {
            "characters": len(characters),
            "images": len(images.train),
            "seconds": round(time.perf_counter() - began, 1),
            "environment": dict(machine.environment(device, threads)),
        }
        flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return {
            "parameters": flat.cpu().numpy(),
            "held_out_accuracy": np.array(accuracy),
            "circumstances": np.array(json.dumps(circumstances)),
        }


def pretrain(
    recipe: GlyphViT, images: Images, device: torch.device, tell: Tell
) -> tuple[nn.Module, float]:
    """Trains a new transformer to name the classes of some images.

    Draws initial weights and hidden patches from torch's global generators.

    Args:
        recipe: The options.
        images: What to train on, and what to measure the accuracy on.
        device: Where to do so.
        tell: Called with the images seen and the images to see.

    Returns:
        The transformer without its classifier; accuracy on the test images, in [0, 1].
    """
    assert recipe.mean is not None
    assert recipe.std is not None
    varied = Varied(
        recipe.mean, recipe.std, recipe.shift, recipe.scale, recipe.contrast, recipe.recolour
    )
    train, test = (
        Samples(source, torch.arange(len(source)), varied).to(device)
        for source in (images.train, images.test)
    )
    body = recipe.transformer(recipe.hidden_patches)
    head = nn.Linear(recipe.embed_dim, len(images.class_names))
    nn.init.trunc_normal_(head.weight, std=0.02)
    model = nn.Sequential(body, head).to(device)
    optimizers = _optimizers(recipe, body, head)
    highest = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    n_steps = recipe.epochs * math.ceil(len(train) / recipe.batch_size)
    generator = torch.Generator(device).manual_seed(derive_seed(recipe.seed, "pre-training"))
    orders = (
        torch.randperm(len(train), generator=generator, device=device) for _ in range(recipe.epochs)
    )
    batches = (b for order in orders for b in train.batches(order, recipe.batch_size, generator))
    seen = 0
    for step, batch in enumerate(batches):
        if step == math.ceil((1 - recipe.whole) * n_steps):
            body.patch_drop = nn.Identity()
        factor = _schedule((step + 1) / n_steps, recipe.warmup)
        for optimizer, rates in zip(optimizers, highest, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * rate
        loss = F.cross_entropy(model(batch.inputs), batch.targets)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        seen += len(batch)
        tell(seen, recipe.epochs * len(train))
    return body, _accuracy(model, test)


def _optimizers(
    recipe: GlyphViT, body: VisionTransformer, head: nn.Module
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for block in body.blocks for p in block.parameters() if p.ndim == 2]
    inner = set(matrices)
    rest = [p for p in (*body.parameters(), *head.parameters()) if p not in inner]
    # Tokens and position embeddings have three dimensions, filters of the patches four.
    decayed = [p for p in rest if p.ndim in (2, 4)]
    others = [p for p in rest if p.ndim not in (2, 4)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    decay = recipe.weight_decay
    adamw = torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=decay, fused=True)
    muon = torch.optim.Muon(
        matrices, recipe.muon_learning_rate, decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def _schedule(done: float, warmup: float) -> float:
    """Part of the highest learning rate after a part `done` of the training."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@torch.no_grad()
def _accuracy(model: nn.Module, samples: Samples) -> float:
    """Part of the samples that the model names right."""
    model.eval()
    everything = torch.arange(len(samples), device=samples.index.device)
    hits = [
        (model(batch.inputs).argmax(1) == batch.targets).sum()
        for batch in samples.batches(everything, 256)
    ]
    return int(torch.stack(hits).sum()) / len(samples)


class Varied(ImageTransform):
    """Images moved, resized and recoloured at random in training.

    Args:
        mean: Per channel, in [0, 1].
        std: Per channel.
        shift: Largest displacement in pixels; what enters repeats the border.
        scale: Largest relative change of the size.
        contrast: Largest relative change of the contrast, and of the brightness of each channel
            as a part of the range.
        recolour: Swap the channels at random, and make every second image a negative.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shift: float,
        scale: float,
        contrast: float,
        recolour: bool,
    ) -> None:
        super().__init__(mean, std)
        self.shift, self.scale, self.contrast, self.recolour = shift, scale, contrast, recolour

    def augment(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """The random part alone: [B, C, H, W] to float [B, C, H, W] of the same range."""
        n, channels, _, width = raw.shape
        chance = torch.rand(n, 4 + channels, generator=generator, device=raw.device) * 2 - 1
        place = torch.zeros(n, 2, 3, device=raw.device)
        place[:, 0, 0] = place[:, 1, 1] = 1 + self.scale * chance[:, 0]
        place[:, :, 2] = 2 * self.shift / width * chance[:, 1:3]
        grid = F.affine_grid(place, list(raw.shape), align_corners=False)
        moved = F.grid_sample(raw.float(), grid, padding_mode="border", align_corners=False)
        contrast = (1 + self.contrast * chance[:, 3]).view(-1, 1, 1, 1)
        brightness = 127.5 * self.contrast * chance[:, 4:].view(n, channels, 1, 1)
        if self.recolour:
            chance = torch.rand(n, 1 + channels, generator=generator, device=raw.device)
            moved = moved.take_along_dim(chance[:, 1:].argsort(1)[:, :, None, None], 1)
            contrast = torch.where(chance[:, 0] < 0.5, -1, 1).view(-1, 1, 1, 1) * contrast
        return (moved - 127.5) * contrast + 127.5 + brightness
