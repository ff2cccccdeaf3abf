"""Several models of one structure called as one, and autograd back through all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, vmap

from clbench.population.reading import Reading


def call(bare: nn.Module, readings: Sequence[Reading]) -> list[Tensor]:
    """The outputs of several models for a batch each, with one pass through their structure.

    Gradients go back to the models' own parameters; those of several models are found together
    where they are asked for together. Buffers that the pass changes change in the models.

    Args:
        bare: The structure, without weights.
        readings: Of calls with one key.

    Raises:
        RuntimeError: If the structure can't be called as one, such as where it draws at random.
    """
    one = _Pass(bare, readings)
    if not torch.is_grad_enabled():
        return list(_apart(one.outputs))
    weights = [r.parameters[name] for r in readings for name in one.names]
    outputs: tuple[Tensor, ...] = _Together.apply(one, *weights)
    return list(outputs)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[K, ...] of K tensors, each laid out as it was."""
    first = tensors[0]
    shape, strides = (len(tensors), *first.shape), (first.numel(), *first.stride())
    whole = first.new_empty_strided(shape, strides) if _dense(first) else first.new_empty(shape)
    torch._foreach_copy_(list(whole.unbind(0)), [t.detach() for t in tensors])
    return whole


def _apart(whole: Tensor) -> tuple[Tensor, ...]:
    """Copies: what a run does to its outputs in place is its own business."""
    parts: tuple[Tensor, ...] = torch.unbind_copy(whole)  # type: ignore[func-returns-value, assignment]
    return parts


def _dense(tensor: Tensor) -> bool:
    """Whether it fills its memory, in whichever order of its dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda p: p[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class _Pass:
    """One forward pass of K models, as deep as gradients will have to go back.

    Attributes:
        names: Of the parameters.
        outputs: [K, ...].
    """

    def __init__(self, bare: nn.Module, readings: Sequence[Reading]) -> None:
        first = readings[0]
        self.names = list(first.parameters)
        weights = {n: _stacked([r.parameters[n] for r in readings]) for n in self.names}
        buffers = {n: _stacked([r.buffers[n] for r in readings]) for n in first.buffers}
        grad = torch.is_grad_enabled()
        self._wanted = [
            {n for n, p in r.parameters.items() if grad and p.requires_grad} for r in readings
        ]
        self._left = {k for k, names in enumerate(self._wanted) if names}
        anybody = set().union(*self._wanted)
        self._leaves = {n: w.requires_grad_() for n, w in weights.items() if n in anybody}
        versions = {n: b._version for n, b in buffers.items()}

        def forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
            outputs: Tensor = functional_call(bare, state, (x,))
            return outputs

        inputs = _stacked([r.inputs for r in readings])
        with _quiet():
            self.outputs = vmap(forward)({**weights, **buffers}, inputs)
        if not isinstance(self.outputs, Tensor):
            raise TypeError("its outputs are no tensor")
        # Batch norms move theirs in training, which no version tells.
        training = any(module.training for module in bare.modules())
        for name, moved in buffers.items():
            if training or moved._version != versions[name]:
                torch._foreach_copy_([r.buffers[name] for r in readings], list(moved.unbind(0)))

    def gradients(self, arrived: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of every weight of every model, from what arrived at the outputs of some.

        Models at whose outputs nothing arrived get nothing, and may ask later.
        """
        there = {k for k, g in enumerate(arrived) if g is not None}
        if not there <= self._left:
            raise RuntimeError("the gradients of a call shared with other runs are wanted twice")
        self._left -= there
        zero = torch.zeros_like(self.outputs[0])
        with _quiet():
            found = torch.autograd.grad(
                self.outputs,
                list(self._leaves.values()),
                torch.stack([zero if g is None else g for g in arrived]),
                retain_graph=bool(self._left),
                allow_unused=True,
            )
        if not self._left:
            self.outputs = self.outputs.detach()
        columns = {
            name: whole.unbind(0)
            for name, whole in zip(self._leaves, found, strict=True)
            if whole is not None
        }
        return [
            columns[name][k] if k in there and name in wanted and name in columns else None
            for k, wanted in enumerate(self._wanted)
            for name in self.names
        ]


class _Together(torch.autograd.Function):
    """A pass as one step of autograd, from the weights of all models to the outputs of each."""

    @staticmethod
    def forward(ctx: Any, one: _Pass, *weights: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        ctx.set_materialize_grads(False)  # None tells who is not there
        ctx.one = one
        return _apart(one.outputs.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.one.gradients(arrived))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the word that an operation is done one by one under vmap: it is seldom many."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield
