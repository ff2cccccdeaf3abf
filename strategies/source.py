"""The source model as it came: the floor of test-time adaptation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clbench.adaptation import Adaptation
from clbench.samples import Batch


@dataclass(kw_only=True)
class Source(Adaptation):
    """Answers with the source model in evaluation mode and never adapts.

    **Differs from the paper:** nothing; every paper of the field has it.
    """

    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs)

    @torch.no_grad()
    def adapt(self, batch: Batch) -> Tensor:
        return self.predict(batch)
