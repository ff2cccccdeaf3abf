"""NHL, reconstructed: a first layer that learns by Hebb's rule, modulated by entropy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.adaptation import GradientAdaptation
from clbench.errors import UserError
from clbench.nn.batch_statistics import normalise_by_batch, train_only
from clbench.nn.entropy import entropy
from clbench.samples import Batch
from clbench.types import require


@dataclass(kw_only=True)
class NHL(GradientAdaptation):
    """Neuro-modulated Hebbian learning, as far as it can be told from what is public.

    Tang et al. 2023, "Neuro-Modulated Hebbian Learning for Fully Test-Time Adaptation", CVPR,
    arXiv 2303.00914. For each batch, in this order: the first convolution learns from its own
    inputs by a soft Hebbian rule, without a gradient; a small modulation layer behind it is
    trained by the entropy of the network's answer; the network, fixed otherwise, answers anew,
    and that is scored.

    **This is a reconstruction.** No code was published, and no more than the above could be
    checked against the paper. Results belong under a name like "NHL-like". What is put in the
    place of the unknown:

    - The Hebbian rule is SoftHebb's (Moraitis et al. 2022, arXiv 2107.05747; Journé et al. 2023,
      arXiv 2209.11883). With patches x and filters w scaled to length 1, u_k = w_kᵀx and
      y = softmax(u / temperature) over the filters,

          Δw_k = hebbian_lr · mean over patches of y_k (x − u_k w_k),

      after which w_k is scaled back to the length that the filter has in the source model.
    - The modulation is a gain and a shift for each channel, 1 and 0 at first, behind the batch
      norm that follows the convolution: before it, they would be normalised away. Where no batch
      norm follows, they are behind the convolution itself.
    - Batch norms use the statistics of the batch, as the methods that the paper compares with.

    The first convolution is the first two-dimensional one in the order in which the model defines
    its modules, be it of a ResNet, of a ConvNet or the patches of a vision transformer. `predict`
    answers with the network as it is, with batch statistics too.

    **Differs from the paper:** unknown, see above: temperature, rates, optimizer and the shape of
    the modulation are ours.

    Attributes:
        hebbian_lr: Step of the Hebbian rule; 0: the filters stay.
        temperature: Of the competition between filters; small: the winner takes it all.
        lr: Learning rate of the modulation.
        optimizer: Of the modulation, as momentum and weight_decay.
    """

    hebbian_lr: float = 0.01
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "hebbian_lr", at_least=0)
        require(self, "temperature", above=0)

    def prepare(self) -> None:
        places = first_convolution(self.model)
        normalise_by_batch(self.model)
        self._places = places
        self._layer = HebbianConv(_module(self.model, places[0]), self.hebbian_lr, self.temperature)
        _put(self.model, places[0], self._layer)
        behind = self.model.get_submodule(places[1])
        modulation = Modulation(self._layer.conv.out_channels).to(self.context.device)
        _put(self.model, places[1], nn.Sequential(behind, modulation))
        self.descent = self.make_optimizer(train_only(self.model, [*modulation.parameters()]))

    def adapt(self, batch: Batch) -> Tensor:
        self._layer.learning = True
        logits = self.forward(batch.inputs)
        self._layer.learning = False
        self.descent.zero_grad()
        entropy(logits).mean().backward()
        self.descent.step()
        return self.predict(batch)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs)

    def facts(self) -> Mapping[str, Any]:
        return {
            "reconstruction": "no code was published; see the docstring",
            "hebbian_layer": self._places[0],
            "modulated_behind": self._places[1],
        }


class Modulation(nn.Module):
    """A gain and a shift for each channel; changes nothing at first.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return self.gain * x + self.shift


class HebbianConv(nn.Module):
    """A convolution that learns from what it is shown while `learning` is set; see `NHL`.

    Args:
        conv: Becomes a part of this one.
        lr: Step of the rule.
        temperature: Of the competition.
    """

    def __init__(self, conv: nn.Conv2d, lr: float, temperature: float) -> None:
        super().__init__()
        self.conv, self.lr, self.temperature = conv, lr, temperature
        self.learning = False
        self._lengths = conv.weight.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W'], by the filters after learning."""
        if self.learning:
            # In fp32 whatever the precision of the run: the steps are small.
            with torch.autocast(x.device.type, enabled=False):
                self._learn(x.detach().float())
        out: Tensor = self.conv(x)
        return out

    @torch.enable_grad()
    def _learn(self, x: Tensor) -> None:
        filters = F.normalize(self.conv.weight.detach().flatten(1)).view_as(self.conv.weight)
        filters.requires_grad_()
        lengths = self._convolve(x.square(), torch.ones_like(filters[:1])).clamp_min(1e-12).sqrt()
        u = self._convolve(x, filters) / lengths
        y = (u.detach() / self.temperature).softmax(1)
        # Of Σ y_k w_kᵀx with y fixed, the gradient is Σ y_k x: no patch is ever cut out.
        (attraction,) = torch.autograd.grad((y * u).sum(), filters)
        with torch.no_grad():
            decay = (y * u).sum((0, 2, 3)).view(-1, 1, 1, 1)
            step = (attraction - decay * filters) * (self.lr / u[:, 0].numel())
            moved = F.normalize((filters + step).flatten(1)).view_as(filters)
            self.conv.weight.copy_(moved * self._lengths.to(moved))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution with other filters and no bias."""
        changed = {"weight": weight}
        if self.conv.bias is not None:
            changed["bias"] = torch.zeros_like(weight[:, 0, 0, 0])
        out: Tensor = functional_call(self.conv, changed, (x,))
        return out


def first_convolution(model: nn.Module) -> tuple[str, str]:
    """Where the Hebbian layer and the modulation belong.

    Returns:
        Path of the first convolution, and path of what is modulated: the batch norm that follows
        it, or the convolution itself.

    Raises:
        UserError: If there is no convolution of images, or one that does not see all channels.
    """
    modules = list(model.named_modules())
    found = [i for i, (_, module) in enumerate(modules) if isinstance(module, nn.Conv2d)]
    if not found:
        raise UserError(
            "nhl adapts the first convolution of a network, and this model has none. Choose a "
            "convolutional backbone, or a vision transformer, or another strategy."
        )
    path, conv = modules[found[0]]
    assert isinstance(conv, nn.Conv2d)
    if conv.groups != 1 or not path:
        raise UserError(
            f"nhl lets all filters of the first convolution compete for one patch, but {path!r} "
            "is grouped or the whole model. Choose another backbone."
        )
    later = (pair for pair in modules[found[0] + 1 :] if _has_tensors(pair[1]))
    after, follower = next(later, (path, conv))
    batch_norm = isinstance(follower, _BatchNorm) and follower.num_features == conv.out_channels
    return path, after if batch_norm else path


def _has_tensors(module: nn.Module) -> bool:
    return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])


def _module(model: nn.Module, path: str) -> nn.Conv2d:
    conv = model.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    return conv


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces a part of the model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
