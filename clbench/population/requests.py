"""What a run waits for, and how several runs are answered together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clbench.population import stack
from clbench.population.reading import Reading, skeleton


@dataclass(frozen=True)
class Request(ABC):
    """What a run waits for.

    Attributes:
        key: Equal for those that can be answered together.
        threads: Of PyTorch, in the thread that asks.
    """

    key: Hashable
    threads: int = field(default_factory=torch.get_num_threads, kw_only=True)

    @abstractmethod
    def together(self, requests: Sequence[Any], skeletons: Skeletons) -> Sequence[Any]:
        """An answer to each of several requests with this key, this one among them.

        Raises:
            Exception: If there is none.
        """


class Skeletons:
    """The structures of models that were met, without weights."""

    def __init__(self) -> None:
        self._known: dict[Hashable, nn.Module] = {}

    def of(self, model: nn.Module, structure: Hashable) -> nn.Module:
        """The structure of a model that was read."""
        if structure not in self._known:
            self._known[structure] = skeleton(model)
        return self._known[structure]


@dataclass(frozen=True)
class Call(Request):
    """Outputs of a model; its key is that of its reading."""

    model: nn.Module
    reading: Reading
    grad: bool = field(default_factory=torch.is_grad_enabled)

    def together(self, requests: Sequence[Call], skeletons: Skeletons) -> Sequence[Tensor]:
        bare = skeletons.of(self.model, self.reading.structure)
        with torch.set_grad_enabled(self.grad), self._autocast():
            return stack.call(bare, [request.reading for request in requests])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.reading.autocast is None:
            return nullcontext()
        return torch.autocast(self.reading.inputs.device.type, self.reading.autocast)


@dataclass(frozen=True)
class Backward(Request):
    """Gradients of a loss, in the weights' own `grad`."""

    loss: Tensor

    def together(self, requests: Sequence[Backward], skeletons: Skeletons) -> Sequence[None]:  # noqa: ARG002
        torch.autograd.backward([request.loss for request in requests])
        return [None] * len(requests)


@dataclass(frozen=True)
class Gradients(Request):
    """Gradients of a loss, handed over; zeros for weights that it does not depend on."""

    loss: Tensor
    weights: Sequence[Tensor]

    def together(
        self,
        requests: Sequence[Gradients],
        skeletons: Skeletons,  # noqa: ARG002
    ) -> Sequence[tuple[Tensor, ...]]:
        weights = [weight for request in requests for weight in request.weights]
        losses = [request.loss for request in requests]
        found = iter(torch.autograd.grad(losses, weights, materialize_grads=True))
        return [tuple(next(found) for _ in request.weights) for request in requests]
