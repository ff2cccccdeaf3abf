"""How far each module of a model moves within an experience, and from one to the next."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["convolution", "linear", "norm", "statistics", "other"]

# By name: timm has norm layers of its own, without a common base class.
_NORM = re.compile(r"Norm(Act)?(\dd?)?$")


@dataclass(frozen=True)
class Unit:
    """Tensors of one module that change together.

    Attributes:
        name: Path of the module; with ".statistics" for the running statistics of a norm.
        kind: What it is.
        tensors: Names in the model: its own parameters, or mean and variance.
        size: Numbers in them.
    """

    name: str
    kind: Kind
    tensors: tuple[str, ...]
    size: int


def units(model: nn.Module) -> list[Unit]:
    """Every module with parameters of its own and all running statistics, in the model's order.

    A parameter that several modules share belongs to the first.
    """
    found, met = [], set()
    for path, module in model.named_modules():
        own = {}
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in met:
                met.add(id(parameter))
                own[name] = parameter
        if own:
            found.append(_unit(path or "model", _kind(module), own))
        running = {
            name: buffer
            for name, buffer in module.named_buffers(path, recurse=False)
            if name.rpartition(".")[2] in ("running_mean", "running_var")
        }
        if running:
            found.append(_unit(f"{path}.statistics".strip("."), "statistics", running))
    return found


def _unit(name: str, kind: Kind, tensors: Mapping[str, Tensor]) -> Unit:
    return Unit(name, kind, tuple(tensors), sum(t.numel() for t in tensors.values()))


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    return "norm" if _NORM.search(type(module).__name__) else "other"


class Sensitivity:
    """Measures the change of every unit of a model along a stream.

    Change is the mean absolute one for a number, c(a, b) = ‖a − b‖₁ / |θ|. An experience t is
    looked at in N intervals, θ_{t,n} being the weights at the end of interval n and θ_{t,0} those
    at the start of the experience:

    - within_t = mean of c(θ_{t,n}, θ_{t,n−1}) over n = 2..N: the first interval is left out, as
      it is the one just after the switch;
    - across_t = c(θ_{t,N}, θ_{t,0}), for every experience but the first;
    - score = mean of across_t over t / mean of within_t over t.

    A unit is sensitive to switches if its score is high beside others'. Were all intervals alike,
    it would be N where they pull one way, and 0 where they undo each other; what an experience
    changes in the first interval adds to it.

    It costs two copies of the weights, and a pass over them for each interval.

    Args:
        model: Whose units they are; its modules may not be replaced later.

    Attributes:
        units: In the model's order.
        within: within_t of each experience, [units] float64 each, NaN where N is 1.
        across: across_t, from the second experience on, likewise.
    """

    def __init__(self, model: nn.Module) -> None:
        self.units = units(model)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._now = [tensors[name].detach() for unit in self.units for name in unit.tensors]
        device = self._now[0].device
        owners = [i for i, unit in enumerate(self.units) for _ in unit.tensors]
        self._owner = torch.tensor(owners, device=device)
        self._sizes = torch.tensor([unit.size for unit in self.units], device=device)
        self.within: list[Tensor] = []
        self.across: list[Tensor] = []
        self._start: list[Tensor] = []
        self._latest: list[Tensor] = []
        self._changes: list[Tensor] = []

    def begin(self) -> None:
        """An experience starts from the present weights."""
        self._start, self._latest = self._copy(), self._copy()
        self._changes = []

    def mark(self) -> None:
        """An interval ends."""
        self._changes.append(self._change(self._latest))
        torch._foreach_copy_(self._latest, self._now)

    def end(self) -> None:
        """The experience ends, with its last interval."""
        if self.within:
            self.across.append(self._change(self._start))
        later = self._changes[1:]
        nothing = torch.full_like(self._sizes, torch.nan, dtype=torch.float64)
        self.within.append(torch.stack(later).mean(0) if later else nothing)
        self._start, self._latest, self._changes = [], [], []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What changes within the block is not counted."""
        before = self._copy()
        yield
        moved = torch._foreach_sub(self._now, before)
        for reference in (self._start, self._latest):
            if reference:
                torch._foreach_add_(reference, moved)

    def scores(self) -> list[float | None]:
        """The score of each unit; None where nothing has been measured, or nothing moved."""
        across, within = (_mean(rows) for rows in (self.across, self.within))
        if across is None or within is None:
            return [None] * len(self.units)
        return _plain(across / within)

    def facts(self) -> list[dict[str, Any]]:
        """Plain data for the result file, one entry for each unit: within_t and across_t by t."""
        within = [_plain(row) for row in self.within]
        across = [_plain(row) for row in self.across]
        return [
            {
                "name": unit.name,
                "kind": unit.kind,
                "size": unit.size,
                "within": [row[i] for row in within],
                "across": [row[i] for row in across],
                "score": score,
            }
            for i, (unit, score) in enumerate(zip(self.units, self.scores(), strict=True))
        ]

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, and what the experience under way is compared with."""
        under_way = {"start": self._start, "latest": self._latest, "changes": self._changes}
        return {"within": self.within, "across": self.across, **under_way}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.within, self.across = list(state["within"]), list(state["across"])
        self._start, self._latest = list(state.get("start", ())), list(state.get("latest", ()))
        self._changes = list(state.get("changes", ()))

    def _copy(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._now]

    def _change(self, reference: Sequence[Tensor]) -> Tensor:
        """c between the present weights and others, [units] float64."""
        distances = torch._foreach_sub(self._now, list(reference))
        torch._foreach_abs_(distances)
        sums = torch.stack([distance.sum().double() for distance in distances])
        totals = torch.zeros_like(self._sizes, dtype=torch.float64)
        totals.index_add_(0, self._owner, sums)
        return totals / self._sizes


def _mean(rows: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(rows)).nanmean(0) if rows else None


def _plain(row: Tensor) -> list[float | None]:
    """A row as JSON can say it; what is not known, 0/0 included, is None."""
    return [x if math.isfinite(x) else None for x in row.tolist()]
