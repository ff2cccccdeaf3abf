"""Some matrices of a model kept as they are, to the bit, while the rest trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clbench.nn.partition import Matrix, Part


class Frozen:
    """Freezes matrices; `restrict` each new optimizer, `release` when the rest has trained.

    A parameter that is frozen in whole requires no gradient, so an optimizer made afterwards
    never sees it: neither gradient nor weight decay nor momentum moves it, and there is no
    state for it. A parameter of several matrices, some of them frozen, still gets a gradient:
    that of the frozen pieces is zero, and in an optimizer its trained pieces take its place,
    each a parameter of its own in the same memory.

    Args:
        model: Whose parameters they are.
        matrices: What to freeze.
    """

    def __init__(self, model: nn.Module, matrices: Sequence[Matrix]) -> None:
        parameters = dict(model.named_parameters())
        frozen: dict[str, list[Part]] = {}
        for matrix in matrices:
            for part in matrix.parts:
                frozen.setdefault(part.name, []).append(part)
        self._whole: list[nn.Parameter] = []
        self._pieces: list[_Piece] = []
        self._hooks: list[Any] = []
        for name, parts in frozen.items():
            parameter, count = parameters[name], parts[0].pieces
            if len(parts) == count:
                parameter.requires_grad_(False)
                self._whole.append(parameter)
                continue
            kept = {part.piece for part in parts}
            others = [Part(name, i, count, parts[0].dim) for i in range(count) if i not in kept]
            self._pieces += [_Piece(parameter, part) for part in others]
            self._hooks.append(parameter.register_hook(_Blank(parts)))

    def restrict(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts trained pieces in the place of their parameter.

        Args:
            optimizer: New, over the parameters that require gradients.
        """
        if not self._pieces:
            return
        pieces: dict[nn.Parameter, list[nn.Parameter]] = {}
        for piece in self._pieces:
            pieces.setdefault(piece.parameter, []).append(piece.leaf)
        for group in optimizer.param_groups:
            group["params"] = [q for p in group["params"] for q in pieces.get(p, [p])]
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def release(self) -> None:
        """Everything requires gradients again."""
        for parameter in self._whole:
            parameter.requires_grad_(True)
        for hook in self._hooks:
            hook.remove()
        self._whole, self._pieces, self._hooks = [], [], []

    def _before_step(self, *_: Any) -> None:
        for piece in self._pieces:
            piece.fetch()

    def _after_step(self, *_: Any) -> None:
        for piece in self._pieces:
            piece.put_back()


class _Piece:
    """A piece of a parameter as a parameter for optimizers."""

    def __init__(self, parameter: nn.Parameter, part: Part) -> None:
        self.parameter, self.part = parameter, part
        view = part.of(parameter.detach())
        # Fused optimizers need dense tensors: columns of a matrix have to be copied.
        self.leaf = nn.Parameter(view.contiguous())
        self.copied = self.leaf.data_ptr() != view.data_ptr()

    @torch.no_grad()
    def fetch(self) -> None:
        gradient = self.parameter.grad
        self.leaf.grad = None if gradient is None else self.part.of(gradient).contiguous()
        if self.copied:
            self.leaf.copy_(self.part.of(self.parameter))

    @torch.no_grad()
    def put_back(self) -> None:
        if self.copied:
            self.part.of(self.parameter).copy_(self.leaf)
        # The optimizer's zero_grad() no longer reaches it.
        self.parameter.grad = self.leaf.grad = None


class _Blank:
    """A gradient, zero in some parts: of backward() and of torch.autograd.grad() alike."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    def __call__(self, gradient: Tensor) -> Tensor:
        blanked = gradient.clone()
        for part in self.parts:
            part.of(blanked).zero_()
        return blanked
