"""A model called on the rows of one process, its outputs and gradients those of all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from clbench.errors import UserError
from clbench.nn.row_hooks import RowHook
from clbench.passes import Hook
from clbench.processes.group import Group

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Division:
    """How rows are divided among the processes of a group.

    Args:
        group: The processes.

    Attributes:
        part: Rows that this process computes, or computed last; None: all.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.part: slice | None = None
        self.inside = False

    def sizes(self, rows: int) -> list[int]:
        """Rows of each process: as equal as can be."""
        whole, more = divmod(rows, self.group.count)
        return [whole + (rank < more) for rank in range(self.group.count)]

    def own(self, rows: int) -> slice:
        """Which of so many rows this process has."""
        sizes, rank = self.sizes(rows), self.group.rank
        start = sum(sizes[:rank])
        return slice(start, start + sizes[rank])

    @contextmanager
    def computing(self, part: slice | None) -> Iterator[None]:
        """What is called within is a part of the model, and is not divided again."""
        self.part, self.inside = part, True
        try:
            yield
        finally:
            self.inside = False


class Forward:
    """Takes the place of a model's `forward`; copies of the model have copies of it.

    Args:
        division: Which rows this process computes.
        model: Called on one tensor with a row for each sample; answers likewise.
    """

    def __init__(self, division: Division, model: nn.Module) -> None:
        self.division, self.model, self._whole = division, model, _Whole(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        # A copy of the model is under way, and known already.
        return Forward(self.division, memo[id(self.model)])

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        division = self.division
        if division.inside:
            return self._whole(*arguments, **named)
        if not named and len(arguments) == 1 and self._divisible(arguments[0]):
            answer = self._divided(arguments[0])
            if answer is not None:
                return answer
        with division.computing(None):
            return self._whole(*arguments, **named)

    def _divisible(self, inputs: Any) -> bool:
        """Whether rows can be told apart: else every process computes all of them."""
        return (
            isinstance(inputs, Tensor)
            and len(inputs) >= self.division.group.count
            and torch._C._functorch.peek_interpreter_stack() is None
            and not any(map(_sees_batches, self.model.modules()))
        )

    def _divided(self, inputs: Tensor) -> Tensor | None:
        """The outputs of all rows; None if weights take part that are not the model's own."""
        _refuse_batch_norm(self.model)
        division = self.division
        part = division.own(len(inputs))
        wanted: dict[str, Tensor] = {}
        if torch.is_grad_enabled():
            wanted = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        entered: tuple[Tensor, ...] = ()
        rows = inputs[part]
        if wanted or (torch.is_grad_enabled() and inputs.requires_grad):
            if inputs.requires_grad:
                rows, *entered = _Enter.apply(division, inputs, *wanted.values())
            else:
                _, *entered = _Enter.apply(division, None, *wanted.values())
        with division.computing(part), _no_draws(inputs.device):
            weights = {f"model.{n}": w for n, w in zip(wanted, entered, strict=True)}
            local = functional_call(self._whole, weights, (rows,)) if weights else self._whole(rows)
        foreign = isinstance(local, Tensor) and local.requires_grad and _foreign(local)
        self._require_agreement(len(inputs), local, foreign)
        if foreign or not isinstance(local, Tensor):
            return None
        answer: Tensor = _Gather.apply(division, len(inputs), local)
        return answer

    def _require_agreement(self, rows: int, local: Any, foreign: bool) -> None:
        """Refuses to exchange what does not fit; says so where a process is out of step.

        Raises:
            RuntimeError: In all of them.
        """
        shape = list(local.shape[1:]) if isinstance(local, Tensor) else []
        shape += [-1] * (4 - len(shape))
        said = self.division.group.all_of([rows, foreign, *shape[:4]])
        if any(other != said[0] for other in said):
            raise RuntimeError(
                f"the processes of this run are not at the same: rows and shapes are {said}"
            )


class _Whole(nn.Module):
    """A model without what watches its calls, for all rows that it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return type(self.model).forward(self.model, *arguments, **named)


class _Enter(torch.autograd.Function):
    """Rows of the inputs, and weights; back, all rows' gradient, and the sum over processes.

    What a loss has of the weights besides (a penalty) does not come this way: it is the same in
    every process, and not to be summed.
    """

    @staticmethod
    def forward(ctx: Any, division: Division, inputs: Tensor | None, *weights: Tensor) -> Any:
        ctx.set_materialize_grads(False)  # None: a weight that took no part
        ctx.division, ctx.rows = division, 0 if inputs is None else len(inputs)
        ctx.like = [t.detach() for t in (inputs, *weights) if t is not None]
        rows = None if inputs is None else inputs[division.own(len(inputs))].clone()
        return rows, *(w.view_as(w) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor | None, *gradients: Tensor | None) -> Any:
        group = ctx.division.group
        arrived = [rows, *gradients] if ctx.rows else list(gradients)
        flags = group.all_of([g is not None for g in arrived])
        there = [any(some) for some in zip(*flags, strict=True)]
        filled = [
            (torch.zeros_like(t) if g is None else g) if known else None
            for t, g, known in zip(ctx.like, arrived, there, strict=True)
        ]
        inputs = None
        if ctx.rows:
            first = filled.pop(0)
            sizes = ctx.division.sizes(ctx.rows)
            if first is not None:
                inputs = group.gather(first[: sizes[group.rank]], sizes)
        known = [g for g in filled if g is not None]
        sums = iter(_by_type(group, known))
        return None, inputs, *(None if g is None else next(sums) for g in filled)


def _by_type(group: Group, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the processes, of tensors of several types."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        some = [(i, t) for i, t in enumerate(tensors) if t.dtype == dtype]
        places, values = zip(*some, strict=True)
        found |= dict(zip(places, group.total(values), strict=True))
    return [found[i] for i in range(len(tensors))]


class _Gather(torch.autograd.Function):
    """The outputs of all rows; back, the gradient of this process's rows, as it is.

    Every process makes the same of all outputs, so each has the whole gradient already.
    """

    @staticmethod
    def forward(ctx: Any, division: Division, rows: int, local: Tensor) -> Tensor:
        ctx.part = division.own(rows)
        return division.group.gather(local.detach(), division.sizes(rows))

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> tuple[None, None, Tensor]:
        return None, None, arrived[ctx.part]


def _sees_batches(module: nn.Module) -> bool:
    """Whether something watches a part of the model that may ask for whole batches."""
    content = module.__dict__
    return any(
        not isinstance(hook, (Hook, RowHook))
        for name in _HOOKS
        for hook in (content[name] or {}).values()
    )


def _refuse_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise UserError(
                f"The batch norm {name} normalises by the statistics of a batch, of which each of "
                "several processes sees only a part. Use one process, or a model without (a vision "
                "transformer; backbone.norm=group where there is a choice)."
            )


@contextmanager
def _no_draws(device: torch.device) -> Iterator[None]:
    """Refuses what draws random numbers: with other rows, it would draw others.

    Raises:
        UserError: With what to do.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    before = [generator.get_state() for generator in generators]
    yield
    for generator, state in zip(generators, before, strict=True):
        if not torch.equal(generator.get_state(), state):
            raise UserError(
                "The model draws random numbers while it is called (dropout, most likely), which "
                "would depend on the number of processes. Set its dropout to 0, or use one process."
            )


def _foreign(outputs: Tensor) -> bool:
    """Whether gradients would reach weights beside those that the model was called with."""
    met, left = set(), [outputs.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in met:
            continue
        met.add(node)
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            return True
        if kind != f"{_Enter.__name__}Backward":
            left += [following for following, _ in node.next_functions]
    return False
