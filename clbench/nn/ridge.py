"""Ridge regression from sums over samples that arrive in parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import Diverged


class RidgeRegression:
    """Weights W that minimise ‖H W − Y‖² + ridge ‖W‖², H the inputs, Y one-hot rows of classes.

    W = (G + ridge·I)⁻¹ Q with G = HᵀH and Q = HᵀY, which sums over samples make: their order and
    how they are divided make no difference, and no sample is kept.

    The sums are in double precision: as long as there are fewer samples than inputs G is
    singular, and in fp32 a ridge that is small beside its rounding (1e-7 times its largest
    eigenvalue) leaves nothing of the solution.

    Args:
        n_inputs: M. There are 8 M² bytes: 800 MB for 10,000.
        n_classes: Columns of Y.
        device: Where the sums are.

    Attributes:
        gram: G, [M, M].
        products: Q, [M, n_classes].
    """

    def __init__(self, n_inputs: int, n_classes: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=device)
        self.products = torch.zeros(n_inputs, n_classes, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Takes in samples: inputs [N, M], classes [N] int64. A thousand at once cost least."""
        inputs = inputs.double()
        self.gram.addmm_(inputs.T, inputs)
        self.products.addmm_(inputs.T, F.one_hot(targets, self.products.shape[1]).double())

    def solve(self, ridge: float) -> Tensor:
        """W, [M, n_classes] in double precision."""
        return torch.cholesky_solve(self.products, cholesky(self.gram, ridge))

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"gram": self.gram, "products": self.products}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gram.copy_(state["gram"])
        self.products.copy_(state["products"])


def cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """The lower factor of matrix + ridge·I.

    Where rounding leaves it without one, the ridge grows tenfold until there is.

    Args:
        matrix: Positive semi-definite, [M, M].
        ridge: Above 0.

    Raises:
        Diverged: If the matrix is not finite.
    """
    if not matrix.isfinite().all():
        raise Diverged("sums over features are not finite; lower the learning rate")
    raised = matrix.clone()
    diagonal = raised.diagonal()
    while True:
        diagonal.copy_(matrix.diagonal()).add_(ridge)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            return factor
        ridge *= 10


@torch.no_grad()
def held_out_errors(
    inputs: Tensor,
    targets: Tensor,
    held_out: Iterable[tuple[Tensor, Tensor]],
    n_classes: int,
    ridges: Sequence[float],
) -> Tensor:
    """Squared errors on samples that were held out, for many ridges at the cost of about one.

    One eigendecomposition serves every ridge: of G, or of HHᵀ where that is smaller.

    Args:
        inputs: H, [N, M].
        targets: Their classes, [N] int64.
        held_out: Inputs [B, M] and classes [B], batch by batch.
        n_classes: Columns of Y.
        ridges: What to try, above 0.

    Returns:
        The sum of squared errors over all samples and columns, [len(ridges)] in double precision.
    """
    inputs = inputs.double()
    answers = F.one_hot(targets, n_classes).double()
    dual = len(inputs) < inputs.shape[1]
    values, vectors = torch.linalg.eigh(inputs @ inputs.T if dual else inputs.T @ inputs)
    values.clamp_(min=0)
    right = vectors.T @ (answers if dual else inputs.T @ answers)
    errors = answers.new_zeros(len(ridges))
    for some, labels in held_out:
        left = some.double()
        left = (left @ inputs.T if dual else left) @ vectors
        wanted = F.one_hot(labels, n_classes).double()
        for i, ridge in enumerate(ridges):
            errors[i] += (left @ (right / (values + ridge).unsqueeze(1)) - wanted).square().sum()
    return errors
