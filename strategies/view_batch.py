"""View-batch learning: several views of a sample together, then none for as many epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.nn.augmentation import Augmentation, autoaugment, randaugment
from clbench.nn.transforms import Transform
from clbench.samples import Batch, Samples
from clbench.training import Wrapper
from clbench.types import Context, Experience, Scenario, require

_STRONG: Mapping[str, Augmentation | None] = {
    "autoaugment": autoaugment,
    "randaugment": randaugment,
    "none": None,
}
#: The official sampler's epochs are a multiple of this.
_ROUND = 256


@dataclass(kw_only=True)
class ViewBatch(Wrapper):
    """Shows `views` views of each sample side by side, once in as many epochs.

    Paper: Kang, Seifer, Lee and Ryu 2025, "Do Your Best and Get Enough Rest for Continual
    Learning", CVPR 2025, arXiv 2503.18371; code hankyul2/ViewBatchModel.

    Sampler: for V epochs one random order of the N samples, each V times in a row; each of these
    epochs takes the next N. So a sample returns after V epochs, and the number of steps is the
    base's. View 1 has the scenario's augmentation; views 2 to V have a stronger one before it.

    Equation: the base's loss + distillation · mean_j KL(sg[p¹] ‖ pʲ), the mean over all views but
    the first in the batch, p = softmax of the outputs of the classes met so far, sg: no gradient.

    Attributes:
        base: The method that learns from the views.
        views: V.
        augmentation: Of views 2 to V: "autoaugment" (CIFAR-10's policies), "randaugment" or
            "none".
        distillation: Weight of the second term.
        distill_from: First epoch of an experience, from 0, that has it.
        form: "paper", as above, or "code", as in the official code (next paragraph).

    **Differs from the paper:** its text was not at hand; "paper" is what its code says it
    implements. If V does not divide the number of epochs, the last cycle has fewer views, so
    that all samples are shown equally often. Where V does not divide the batch size, a sample
    may lie across two batches; views without their first one are not distilled. The official
    code augments strongly after the crop, not before it. "code" does as the official code: an
    epoch is rounded down to a multiple of 256 samples; what has the label of its neighbour
    counts as a view of the same sample, up to V of them after a first one; the divergence is
    divided by the number of classes too; the last cycle is as long as any. Of that code, the
    order that is the same for all seeds and experiences is not kept. A memory is offered every
    view.
    """

    views: int = 4
    augmentation: Literal["autoaugment", "randaugment", "none"] = "autoaugment"
    distillation: float = 1.0
    distill_from: int = 6
    form: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        require(self, "views", at_least=1)
        require(self, "distillation", "distill_from", at_least=0)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if scenario.online:
            raise UserError(
                "view_batch brings samples back after some epochs, but with scenario.online=true "
                "there is one. Set scenario.online=false and scenario.epochs to a multiple of "
                f"strategy.views={self.views}."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        self.known: list[int] = []

    def before(self, experience: Experience) -> None:
        self.known = sorted({*self.known, *experience.classes})
        self._known = torch.tensor(self.known, device=self.context.device)
        self.base.before(experience)

    def batches(self, samples: Samples, epochs: int, batch_size: int) -> Iterator[Batch]:
        context, length = self.context, len(samples)
        if self.form == "code":
            length = length // _ROUND * _ROUND
            if not length:
                raise UserError(
                    f"view_batch: an experience has {len(samples)} samples, and with form=code "
                    f"epochs are multiples of {_ROUND}. Set strategy.form=paper."
                )
        shuffle, augment = context.generator("shuffle"), context.generator("augment")
        for self._epoch in range(epochs):
            turn = self._epoch % self.views
            if turn == 0:
                rest = epochs - self._epoch
                views = self.views if self.form == "code" else min(self.views, rest)
                order = torch.randperm(len(samples), generator=shuffle, device=context.device)
                order = order.repeat_interleave(views)
            part = order[turn * length : (turn + 1) * length]
            view = torch.arange(turn * length, (turn + 1) * length) % views
            place = torch.arange(length) % batch_size
            back = torch.where(view <= place, view, -1)
            if self.form == "code":
                back = by_label(samples.targets[part].cpu(), place, views)
            strong = back > 0 if self.form == "code" else view > 0
            shown = Samples(samples.source, samples.index, self._transform(samples, strong))
            spans = shown.batches(part, batch_size, augment)
            for batch, self._back in zip(spans, back.split(batch_size), strict=True):
                yield batch
                context.on_step(len(batch))

    def loss(self, batch: Batch) -> Tensor:
        views = (self._back > 0).nonzero().flatten()
        if not (self.distillation and self._epoch >= self.distill_from and len(views)):
            return self.base.loss(batch)
        caught: list[Tensor] = []
        hook = self.model.register_forward_hook(lambda *call: caught.append(call[-1]))
        loss = self.base.loss(batch)
        hook.remove()
        # All methods pass the arriving batch first, by itself or before what they recall.
        log_p = caught[0][: len(batch)].float()[:, self._known].log_softmax(1)
        firsts = views - self._back[views]
        views, firsts = (rows.to(log_p.device, non_blocking=True) for rows in (views, firsts))
        first = log_p[firsts].detach()
        term = F.kl_div(log_p[views], first, reduction="batchmean", log_target=True)
        if self.form == "code":
            term = term / len(self.known)
        return loss + self.distillation * term

    def _transform(self, samples: Samples, strong: Tensor) -> Transform:
        augmentation = _STRONG[self.augmentation]
        if augmentation is None or not strong.any():
            return samples.transform
        generator = self.context.generator("view_batch", torch.device("cpu"))
        return _Stronger(samples.transform, augmentation, strong, generator)


class _Stronger(Transform):
    """A transform with an augmentation before it, for some of the samples of one epoch.

    Args:
        transform: For all.
        augmentation: For some.
        strong: Which, in the order in which `train` will get them, [N] bool on the CPU.
        generator: Of the augmentation, on the CPU.
    """

    def __init__(
        self,
        transform: Transform,
        augmentation: Augmentation,
        strong: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.transform, self.augmentation = transform, augmentation
        self.strong, self.generator = strong, generator
        self.done = 0

    def train(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        if raw.dtype != torch.uint8 or raw.ndim != 4:
            raise UserError(
                "view_batch: a strong augmentation needs images, and these samples are none. Set "
                "strategy.augmentation=none."
            )
        strong = self.strong[self.done : self.done + len(raw)]
        self.done += len(raw)
        rows = strong.nonzero().flatten().to(raw.device, non_blocking=True)
        augmented = self.augmentation(raw.index_select(0, rows), self.generator)
        return self.transform.train(raw.index_copy(0, rows, augmented), generator)

    def test(self, raw: Tensor) -> Tensor:
        return self.transform.test(raw)


def by_label(targets: Tensor, place: Tensor, views: int) -> Tensor:
    """The official code's reading of which sample is a view of which.

    In a run of one label, the first sample is a first view and up to `views` more are views of
    it; then comes a first view again.

    Args:
        targets: Labels in the order of an epoch, [N] int64 on the CPU.
        place: Of each sample in its batch, [N] int64.
        views: V.

    Returns:
        How many places before a sample its first view is, [N] int64; 0: it is one.
    """
    at = torch.arange(len(targets))
    begins = place == 0
    begins[1:] |= targets[1:] != targets[:-1]
    start = torch.where(begins, at, 0).cummax(0).values
    return (at - start) % (views + 1)
