"""ITTA: a learned consistency loss moves element-wise maps between the stages of a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.adaptation import GradientAdaptation
from clbench.errors import UserError
from clbench.nn.batch_statistics import train_only
from clbench.pretrained import require_classifier
from clbench.samples import Batch, Samples
from clbench.types import require

#: The stages of residual networks, ours, torchvision's and timm's, and the blocks of ConvNet.
_STAGE = re.compile(r"(.*\.)?(layer\d+|blocks\.\d+)")


@dataclass(kw_only=True)
class ITTA(GradientAdaptation):
    """Improved test-time adaptation.

    Chen et al. 2023, "Improved Test-Time Adaptation for Domain Generalization", CVPR, arXiv
    2304.04494, and its code. z are the features of a batch; z' those where the style (mean and
    deviation of each channel) was mixed between samples after the first or the second stage
    (MixStyle, Zhou et al. 2021, arXiv 2104.02008). The consistency loss is
    mean (f_w(z' − z))², where f_w is `weight_depth` times a scale and a shift of each feature,
    ReLU between.

    On the source, before the stream, two steps for each of `source_steps` batches: the network
    minimises cross-entropy of z + cross-entropy of z' + consistency; then f_w alone minimises
    `alignment` · mean (ĝ − ĝ_ce)², with the gradients to the features' weights of consistency and
    of cross-entropy, each less its mean and over its deviation, these and ĝ_ce taken as constants.

    At test time an element-wise map lies behind each stage, a full tensor of scales and one of
    shifts, `map_depth` times, ReLU between, the identity at first. A batch takes one step on
    `consistency_weight` · consistency, which moves the maps alone, and is answered anew by its
    clean branch; that is scored. `predict` answers in the same way. Batch norms keep the
    statistics of the source, in training too.

    It needs images of one size, a network whose stages end in a ReLU (else no map is the identity
    at first), and labelled source samples.

    **Differs from the paper:** its code trains an ImageNet network for 5,001 steps on several
    source domains at once, with 32 images of each in a batch; here the source model of the
    scenario is trained further, for fewer steps, on the one source that it has. The other
    defaults are the code's for DomainNet; for the other datasets it has consistency_weight =
    1e-6, where gradients vanish beside the 1e-8 in Adam's denominator and the maps stand still.

    Attributes:
        source_steps: Batches of the training on the source; 0: the source model stays, and f_w
            is the ReLU.
        source_batch_size: Samples of each.
        source_lr: Learning rate of the network in it (Adam).
        weight_lr: Learning rate of f_w in it (Adam).
        weight_depth: Layers of f_w.
        alignment: Factor of the loss of f_w; to Adam a factor means little.
        mix_alpha: Both parameters of the Beta distribution of the share that stays in a mixture.
        map_depth: Layers of a map.
        consistency_weight: Factor of the loss at test time.
        lr: Learning rate of the maps.
    """

    source_steps: int = 500
    source_batch_size: int = 32
    source_lr: float = 5e-5
    weight_lr: float = 5e-6
    weight_depth: int = 10
    alignment: float = 0.1
    mix_alpha: float = 0.1
    map_depth: int = 5
    consistency_weight: float = 0.1
    lr: float = 5e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "source_steps", "source_lr", "weight_lr", "alignment", at_least=0)
        require(self, "source_batch_size", "weight_depth", "map_depth", at_least=1)
        require(self, "consistency_weight", at_least=0)
        require(self, "mix_alpha", above=0)

    def prepare(self) -> None:
        source = self.context.source
        if source is None:
            raise UserError(
                "itta learns its loss on labelled source samples, and this scenario has none. "
                "Choose a scenario that knows what its model was trained on, or another strategy."
            )
        device = self.context.device
        self._classifier = require_classifier("itta", self.model)
        shapes = stage_shapes(self._classifier.features, source)
        features = self._classifier.features
        self._stages = [Stage(features.get_submodule(path)) for path in shapes]
        for path, stage in zip(shapes, self._stages, strict=True):
            _put(features, path, stage)
        self.weighting = Cascade((features.n_features,), self.weight_depth).to(device)
        self._learn_from(source)
        for stage, shape in zip(self._stages, shapes.values(), strict=True):
            stage.map = Cascade(shape, self.map_depth).to(device)
        maps = [p for stage in self._stages for p in stage.map.parameters()]
        self.weighting.requires_grad_(False)
        self.descent = self.make_optimizer(train_only(self.model, maps))

    def adapt(self, batch: Batch) -> Tensor:
        clean, mixed = self._features(batch.inputs, "styles")
        self.descent.zero_grad()
        (self.consistency_weight * self._consistency(clean, mixed)).backward()
        self.descent.step()
        return self.predict(batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs)

    def _features(self, inputs: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        """z and z', [B, n_features] each in fp32, from one pass; what both share is done once."""
        n, draws = len(inputs), self.context.generator(purpose, torch.device("cpu"))
        stage = self._stages[int(torch.randint(len(self._stages[:2]), (), generator=draws))]
        concentration = torch.full((2, n), self.mix_alpha, dtype=torch.float64)
        gamma = torch._standard_gamma(concentration, draws)
        share = (gamma[0] / gamma.sum(0).clamp_min(1e-300)).float().to(inputs.device)
        order = torch.randperm(n, generator=draws).to(inputs.device)
        stage.mix = lambda x: mix_styles(x, share, order)
        with self.context.autocast():
            both: Tensor = self._classifier.features(inputs)
        stage.mix = None
        clean, mixed = both.float().chunk(2)
        return clean, mixed

    def _consistency(self, clean: Tensor, mixed: Tensor) -> Tensor:
        weighted: Tensor = self.weighting(mixed - clean)
        return weighted.square().mean()

    def _learn_from(self, source: Samples) -> None:
        """The training on the source: the network and f_w in turns."""
        network = torch.optim.Adam(self.model.parameters(), self.source_lr, fused=True)
        weights = torch.optim.Adam(self.weighting.parameters(), self.weight_lr, fused=True)
        features = [*self._classifier.features.parameters()]
        for batch in self._source_batches(source):
            consistency, cross_entropy = self._source_losses(batch)
            network.zero_grad()
            (consistency + cross_entropy).backward()
            network.step()
            weights.zero_grad()
            loss = self.alignment * misalignment(*self._source_losses(batch), features)
            loss.backward(inputs=[*self.weighting.parameters()])
            weights.step()

    def _source_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Consistency, and the cross-entropies of both branches together."""
        # Random numbers of its own: a reset begins those of the stream anew.
        clean, mixed = self._features(batch.inputs, "source styles")
        with self.context.autocast():
            answers = self._classifier.head(clean), self._classifier.head(mixed)
        first, second = (F.cross_entropy(logits.float(), batch.targets) for logits in answers)
        return self._consistency(clean, mixed), first + second

    def _source_batches(self, source: Samples) -> Iterator[Batch]:
        """`source_steps` shuffled and augmented batches, over as many passes as that takes."""
        shuffle, augment = map(self.context.generator, ("source order", "source augmentation"))
        left, size = self.source_steps, self.source_batch_size
        while left > 0:
            order = torch.randperm(len(source), generator=shuffle, device=self.context.device)
            order = order[: left * size]
            yield from source.batches(order, size, augment)
            left -= -(-len(order) // size)


class Cascade(nn.Module):
    """A scale and a shift of each number, several times, ReLU between; all 1 and 0 at first.

    So at first it is the ReLU of its input, or with one layer its input.

    Args:
        shape: Of one sample.
        depth: Layers.
    """

    def __init__(self, shape: Sequence[int], depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(depth, *shape))
        self.shift = nn.Parameter(torch.zeros(depth, *shape))

    def forward(self, x: Tensor) -> Tensor:
        """[B, *shape] to the same."""
        *inner, last = zip(self.scale, self.shift, strict=True)
        for scale, shift in inner:
            x = torch.addcmul(shift, scale, x).relu()
        return torch.addcmul(last[1], last[0], x)


class Stage(nn.Module):
    """A stage with a map behind it, and the place where styles may be mixed.

    Args:
        stage: Becomes a part of this one.

    Attributes:
        map: Behind it.
        mix: Where it is set, its outputs join the batch, [B, ...] becomes [2 B, ...].
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.map: nn.Module = nn.Identity()
        self.mix: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As the stage, then the map."""
        x = self.stage(x)
        if self.mix is not None:
            x = torch.cat((x, self.mix(x)))
        out: Tensor = self.map(x)
        return out


def mix_styles(x: Tensor, share: Tensor, order: Tensor) -> Tensor:
    """MixStyle: each sample in a style between its own and another one's.

    Args:
        x: [B, C, H, W].
        share: Of the own style, [B].
        order: Whose style is mixed in, [B] int64.

    Returns:
        [B, C, H, W]; the gradient takes the styles as constants.
    """
    # A single pixel has no deviation.
    correction = int(x[0, 0].numel() > 1)
    variance, mean = torch.var_mean(x.detach(), (2, 3), correction=correction, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    own = share.view(-1, 1, 1, 1).to(x.dtype)
    mixed_mean = own * mean + (1 - own) * mean[order]
    mixed_deviation = own * deviation + (1 - own) * deviation[order]
    return (x - mean) / deviation * mixed_deviation + mixed_mean


def misalignment(
    consistency: Tensor, cross_entropy: Tensor, parameters: Sequence[nn.Parameter]
) -> Tensor:
    """mean (ĝ − ĝ_ce)² of the gradients to the parameters; itself differentiable through ĝ."""

    def standardised(loss: Tensor, create_graph: bool) -> Tensor:
        gradients = torch.autograd.grad(
            loss, parameters, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        deviation, mean = torch.std_mean(flat.detach())
        return (flat - mean) / deviation.clamp_min(torch.finfo(flat.dtype).tiny)

    other = standardised(cross_entropy, create_graph=False)
    return (standardised(consistency, create_graph=True) - other).square().mean()


@torch.no_grad()
def stage_shapes(features: nn.Module, source: Samples) -> dict[str, tuple[int, ...]]:
    """Path of each stage of a network, with the shape of its output for one sample.

    Raises:
        UserError: If there is no stage, or what leaves one is no image of numbers from 0 on.
    """
    named = [(p, module) for p, module in features.named_modules() if _STAGE.fullmatch(p)]
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, out: outputs.update({path: out})

    hooks = [module.register_forward_hook(keep(path)) for path, module in named]
    features(source.take(torch.arange(min(len(source), 8), device=source.index.device)).inputs)
    for hook in hooks:
        hook.remove()
    fit = [isinstance(x, Tensor) and x.ndim == 4 and bool(x.min() >= 0) for x in outputs.values()]
    if not fit or not all(fit):
        raise UserError(
            "itta puts maps behind the stages of a network that end in a ReLU (layer1, layer2, "
            "... of a residual network, the blocks of ConvNet); this model has no such stages. "
            "Choose backbone=convnet, a residual network without pre-activation, or another "
            "strategy."
        )
    return {path: tuple(x.shape[1:]) for path, x in outputs.items()}


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces a part of the model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
