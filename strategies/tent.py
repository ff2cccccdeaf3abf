"""TENT: each batch is made a little surer, through scales and shifts alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clbench.adaptation import GradientAdaptation
from clbench.nn.batch_statistics import affine_parameters, normalise_by_batch, train_only
from clbench.nn.entropy import entropy
from clbench.samples import Batch


@dataclass(kw_only=True)
class Tent(GradientAdaptation):
    """Test-time entropy minimisation.

    Wang et al. 2021, "Tent: Fully Test-time Adaptation by Entropy Minimization", ICLR, arXiv
    2006.10726, and its code. Batch norms divide by the statistics of the batch; the scales and
    shifts of normalisation layers take one step on

        L = mean_x H(p(x)),   H(p) = −Σ p ln p.

    Scored are the outputs before the step. `predict` answers with the statistics of the batch
    that it is asked about and the present scales and shifts. With lr 0 this is
    `strategy=bn_adapt`. On long or mixed streams it may collapse onto a few classes.

    The constants are the paper's for CIFAR: Adam, lr 1e-3, batches of 200. For ImageNet: SGD with
    momentum 0.9, lr 2.5e-4, batches of 64.

    **Differs from the paper:** layer, group and instance norms adapt too, where the code has batch
    norms only; other layers stay in evaluation mode, so that dropout is off. In networks of
    convolutions and batch norms it is the code's.
    """

    def prepare(self) -> None:
        normalise_by_batch(self.model)
        scales = train_only(self.model, affine_parameters(self.model).values())
        self.descent = self.make_optimizer(scales)

    def adapt(self, batch: Batch) -> Tensor:
        outputs = self.forward(batch.inputs)
        entropy(outputs).mean().backward()
        self.descent.step()
        self.descent.zero_grad()
        return outputs.detach()

    def predict(self, batch: Batch) -> Tensor:
        return self.forward(batch.inputs)
