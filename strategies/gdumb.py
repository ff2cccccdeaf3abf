"""GDumb: greedy sampler and dumb learner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.memory import Memory
from clbench.samples import Batch, Samples
from clbench.types import CLASSIFICATION, Context, Experience, Scenario, Setting, Strategy, require


@dataclass(kw_only=True)
class GDumb(Strategy):
    """Collects a balanced memory and, when asked, trains a new model on nothing else.

    Paper: Prabhu, Torr and Dokania 2020, "GDumb: A Simple Approach that Questions Our Progress
    in Continual Learning", ECCV 2020; code drimpossible/GDumb.

    Algorithm: one pass over the stream; a sample is kept if its class has fewer than
    memory_size / classes, in the place of one of the largest class once the memory is full. To
    answer, minimise CE on the memory from the initial weights, with CutMix (Yun et al. 2019).

    Learning rate of epoch e: lr / 10 for e = 0, lr for e = 1, then cosines from lr to lr_min
    over 2, 4, 8, ... epochs (Loshchilov and Hutter 2017, SGDR).

    Attributes:
        lr: Highest learning rate.
        lr_min: Lowest, at the end of a cosine.
        momentum: Of SGD.
        weight_decay: L2 coefficient.
        clip: Largest gradient norm; 0: no clipping.
        memory_epochs: Passes over the memory; a cosine is complete after a power of two.
        batch_size: Samples in a step.
        cutmix_probability: Share of batches that are mixed.
        cutmix_alpha: The part that stays of an image is drawn from Beta(alpha, alpha).

    **Differs from the paper:** 64 passes rather than 256, so that it runs on a CPU
    (memory_epochs=256 is the paper's); the memory is asked after each experience; a new start is
    the scenario's initial model, the same each time; fp32 or bf16 rather than fp16; the last
    weights are scored, where the official code reports the best accuracy on the test set. It
    takes its own number of steps, whatever `epochs` and `passes` of the scenario say. Where new
    domains of old classes arrive, the sampler as published keeps the first ones.
    """

    settings: ClassVar[frozenset[Setting]] = CLASSIFICATION

    lr: float = 0.05
    lr_min: float = 0.0005
    momentum: float = 0.9
    weight_decay: float = 1e-6
    clip: float = 10.0
    memory_epochs: int = 64
    batch_size: int = 16
    cutmix_probability: float = 0.5
    cutmix_alpha: float = 1.0

    def __post_init__(self) -> None:
        require(self, "lr", above=0)
        require(self, "cutmix_alpha", at_least=0.1)
        require(self, "lr_min", at_least=0, at_most=self.lr)
        require(self, "momentum", "cutmix_probability", at_least=0, at_most=1)
        require(self, "weight_decay", "clip", at_least=0)
        require(self, "memory_epochs", "batch_size", at_least=1)

    def check(self, scenario: Scenario) -> None:
        super().check(scenario)
        if not scenario.memory_size:
            raise UserError(
                "gdumb learns from its memory alone, but scenario.memory_size=0. Set it to at "
                "least the number of classes."
            )

    def setup(self, model: nn.Module, context: Context) -> None:
        self.model, self.context = model.eval(), context
        self.memory = Memory(context.scenario.memory_size, context, "greedy")
        # Scratch: a resumed run is set up with the same model again.
        self._initial = {name: value.clone() for name, value in model.state_dict().items()}
        self._dice = context.generator("cutmix", torch.device("cpu"))

    def learn(self, experience: Experience) -> None:
        if experience.train is None:
            return
        self.collect(experience.train)
        self.model.load_state_dict(self._initial)
        self.fit(self.memory.samples())

    def predict(self, batch: Batch) -> Tensor:
        training = self.model.training
        self.model.eval()
        outputs = self.forward(batch.inputs)
        self.model.train(training)
        return outputs

    def collect(self, samples: Samples) -> None:
        """The greedy sampler: each sample is offered to the memory once, in random order."""
        device = samples.index.device
        shuffle = self.context.generator("shuffle")
        order = torch.randperm(len(samples), generator=shuffle, device=device)
        for batch in samples.batches(order, Samples.CHUNK):
            self.memory.add(batch)

    def fit(self, samples: Samples) -> None:
        """The dumb learner."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, self.lr, self.momentum, weight_decay=self.weight_decay, fused=True
        )
        self.model.train()
        for epoch in range(self.memory_epochs):
            for group in optimizer.param_groups:
                group["lr"] = self.rate(epoch)
            for batch in self.context.batches(samples, epochs=1, batch_size=self.batch_size):
                optimizer.zero_grad()
                self.loss(batch).backward()
                if self.clip:
                    nn.utils.clip_grad_norm_(parameters, self.clip)
                optimizer.step()
        self.model.eval()

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, from 0."""
        if epoch == 0:
            return self.lr / 10
        length = 1 << (epoch.bit_length() - 1)
        progress = (epoch - length) / length
        return self.lr_min + (self.lr - self.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy, on a mixed batch that of both labels by their shares of the image."""
        objective = self.context.objective
        if torch.rand((), generator=self._dice) >= self.cutmix_probability:
            return objective.loss(self.forward(batch.inputs), batch.targets)
        inputs, partner, share = cutmix(batch.inputs, self.cutmix_alpha, self._dice)
        outputs = self.forward(inputs)
        mine = objective.loss(outputs, batch.targets)
        other = objective.loss(outputs, batch.targets[partner])
        return share * mine + (1 - share) * other

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the model, in fp32 whatever the precision of the run."""
        with self.context.autocast():
            outputs: Tensor = self.model(inputs)
        return outputs.float()

    @property
    def memory_samples(self) -> int:
        return len(self.memory)


def cutmix(
    inputs: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Puts one box, the same for all, from another image of the batch into each image.

    Args:
        inputs: Images, [B, C, H, W].
        alpha: The box covers 1 - s of the image before it is cut at the border, with s drawn
            from Beta(alpha, alpha).
        generator: On the CPU.

    Returns:
        The mixed images; where each box comes from, [B] int64; the share, in [0, 1], that stays.
    """
    height, width = inputs.shape[-2:]
    partner = torch.randperm(len(inputs), generator=generator)
    gamma = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator)
    side = math.sqrt(1 - float(gamma[0] / gamma.sum()))
    x, y = (torch.rand(2, generator=generator) * torch.tensor([width, height])).int().tolist()
    half_width, half_height = int(width * side) // 2, int(height * side) // 2
    columns = slice(max(x - half_width, 0), min(x + half_width, width))
    rows = slice(max(y - half_height, 0), min(y + half_height, height))
    partner = partner.to(inputs.device, non_blocking=True)
    mixed = inputs.clone()
    mixed[..., rows, columns] = inputs[partner][..., rows, columns]
    covered = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, partner, 1 - covered / (height * width)
