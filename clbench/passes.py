"""What goes through a model and back: the cost of a method, whatever the machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: The counters, as they are called among the costs of a run.
FORWARD, BACKWARD = "forward_samples", "backward_samples"


class Passes:
    """Counts samples through a model, forward and backward, while it is asked to.

    A call of the model counts its samples forward; each gradient that comes back to the outputs
    of that call counts them backward, be it of `backward()` or of `torch.autograd.grad`. So a
    sample that is replayed, looked at by a teacher or differentiated twice counts each time.
    Copies of the model that are made later count here too, and so does a call of the part that
    holds most of the parameters (a classifier's features) by itself.

    A backward pass is one for each sample, however far back it has to go and whether it forms
    the gradients of all weights or of a few. Not seen are calls of smaller parts (of a head, of
    a single block), and of what `torch.func.vmap` does to many samples at once, all but one.

    Args:
        costs: Where the counts are, under `FORWARD` and `BACKWARD`.
    """

    def __init__(self, costs: MutableMapping[str, Any]) -> None:
        self.costs = costs
        self._counting, self._depth = False, 0

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Looks at every call of the model within the block."""
        hooks = []
        for module in _entries(model):
            hooks.append(module.register_forward_pre_hook(_Enter(self)))
            # Also where the call fails: the depth must be right again.
            hooks.append(module.register_forward_hook(_Leave(self), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def counting(self, on: bool) -> Iterator[None]:
        """Counts within the block, or does not."""
        before, self._counting = self._counting, on
        try:
            yield
        finally:
            self._counting = before

    def enter(self) -> None:
        """A module that is watched is called."""
        self._depth += 1

    def leave(self, outputs: Any) -> None:
        """It has answered. Only the outermost call counts."""
        self._depth -= 1
        tensor = _first(outputs)
        if self._depth or not self._counting or tensor is None:
            return
        count = len(tensor)
        self.costs[FORWARD] += count
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._returned(gradient, count))

    def _returned(self, gradient: Tensor | None, count: int) -> None:
        # None: of a call shared with other runs, a gradient of theirs alone.
        if self._counting and gradient is not None:
            self.costs[BACKWARD] += count


class Hook:
    """Counts, and changes nothing; stays with its counter when its model is copied."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def __deepcopy__(self, memo: Any) -> Hook:
        return self


class _Enter(Hook):
    def __call__(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002
        self.passes.enter()


class _Leave(Hook):
    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG002
        self.passes.leave(outputs)


def _entries(model: nn.Module) -> list[nn.Module]:
    """The model, and the part of it that methods call by itself."""

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    largest = max(model.children(), key=size, default=None)
    return [model] if largest is None else [model, largest]


def _first(outputs: Any) -> Tensor | None:
    """The first tensor with a row for each sample."""
    if isinstance(outputs, Tensor):
        return outputs if outputs.ndim else None
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    if not isinstance(outputs, (Mapping, tuple, list)):
        return None
    return next((t for t in map(_first, parts) if t is not None), None)
