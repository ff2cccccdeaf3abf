"""APER: a model tuned once, beside itself as it was, and the nearest mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.nn.prototypes import Prototypes
from clbench.pretrained import TunedOnce
from clbench.samples import Batch
from clbench.types import Context, Experience


@dataclass(kw_only=True)
class APER(TunedOnce):
    """Nearest mean of frozen features and of features tuned in the first experience, together.

    Paper: Zhou, Cai, Ye, Zhan and Liu 2023, "Revisiting Class-Incremental Learning with
    Pre-Trained Models: Generalizability and Adaptivity are All You Need", arXiv 2303.07338
    (formerly ADAM); code: sun-hailong/LAMDA-PILOT.

    Equation: f(x) = [φ(x); φ*(x)], φ the model as it came and φ* tuned on the first experience
    alone, by adapters, scales and shifts, prompts or in full; m_c is the mean of f over class c,
    from then on nothing is trained; output cos(f(x), m_c).

    With `tuning=none` f = φ: SimpleCIL, the nearest mean of frozen features.

    Attributes:
        tuning: As in the paper's names: "adapter", "ssf", "vpt_shallow", "vpt_deep", "full"
            ("Finetune"), or "none" (SimpleCIL).

    **Differs from the paper:** "BN", the tuning of batch statistics of a ConvNet, is left out.
    As in the code the means are of training samples without augmentation, and tuned parts start
    as it starts them (`clbench.nn.adapters`). The learning rate follows its cosine after every
    step, where the code follows it after every epoch; the passes are the scenario's. "full" had
    weight decay 0.05 and batches of 128 in the code. Two forward passes for each image.
    """

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        width = self._n_features * (1 if self.tuning == "none" else 2)
        self.prototypes = Prototypes(context.n_outputs, width).to(context.device)

    def after(self, experience: Experience) -> None:
        """The mean of every class."""
        assert experience.train is not None
        for batch in self.look(experience.train):
            self.prototypes.add(self.embed(batch.inputs), batch.targets)

    def predict(self, batch: Batch) -> Tensor:
        return self.prototypes.cosines(self.embed(batch.inputs))

    @torch.no_grad()
    def embed(self, inputs: Tensor) -> Tensor:
        """f(x), [B, 2 n_features]; [B, n_features] without tuning."""
        frozen = self.frozen_features(inputs)
        if self.tuning == "none":
            return frozen
        return torch.cat((frozen, self.tuned_features(inputs)), 1)
