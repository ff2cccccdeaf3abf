"""A fixed budget of stored samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.samples import Batch, Samples, TensorSource
from clbench.types import Context

Selection = Literal["reservoir", "class_balanced", "greedy"]


@dataclass(frozen=True)
class Recalled:
    """Samples drawn from a memory.

    Attributes:
        inputs: Augmented afresh and normalised, [B, ...].
        targets: Labels, [B] int64; [B, A] where a sample has several.
        extras: What was stored beside the samples, such as logits, [B, ...] each.
        slots: Their places in the memory, [B] int64.
    """

    inputs: Tensor
    targets: Tensor
    extras: Mapping[str, Tensor]
    slots: Tensor


class Memory:
    """Stored samples, un-augmented, with whatever a method keeps beside them.

    Args:
        size: Samples it may hold.
        context: Lends device, transform and random numbers.
        selection: Who is kept:
            "reservoir": every sample offered so far with equal probability (Vitter 1985,
            algorithm R);
            "class_balanced": all until it is full; then each class that is or was the largest
            keeps a reservoir of its own, and any other class takes places from the largest
            (Chrysakis and Moens 2020, CBRS);
            "greedy": a class takes places, from the largest if there are no free ones, until it
            has its share size / classes (Prabhu et al. 2020, GDumb, algorithm 1).
            The latter two look at the labels, for which a GPU has to be waited for.
        name: Tells the random streams of several memories apart.

    **Differs from the paper:** in CBRS a class counts as "full" only from the moment on when the
    memory is; read literally, whichever classes come first in a stream would never grow again.
    Where several classes are the largest, the place is taken from all of them alike.
    """

    def __init__(
        self, size: int, context: Context, selection: Selection = "reservoir", name: str = "memory"
    ) -> None:
        self.size, self.context, self.selection = size, context, selection
        self.seen = 0
        self._filled = 0
        # Columns have room for more rows than are filled: a power of two, at most `size`.
        self._raw = torch.empty(0, device=context.device)
        self._targets = torch.empty(0, dtype=torch.int64, device=context.device)
        self._extras: dict[str, Tensor] = {}
        # Who is kept is decided on the CPU, where it costs no wait for a GPU.
        self._choose = context.generator(f"{name}.select", torch.device("cpu"))
        self._recall = context.generator(f"{name}.recall")
        self._augment = context.generator(f"{name}.augment")
        self._slots_of: dict[int, list[int]] = {}
        self._seen_of: dict[int, int] = {}
        self._once_largest: set[int] = set()

    def __len__(self) -> int:
        return self._filled

    @property
    def raw(self) -> Tensor:
        """The samples as they came, un-augmented, [N, ...]; a view."""
        return self._raw[: self._filled]

    @property
    def targets(self) -> Tensor:
        """Their labels, [N] int64; a view."""
        return self._targets[: self._filled]

    @property
    def extras(self) -> dict[str, Tensor]:
        """What is kept beside them, [N, ...] each; views."""
        return {name: column[: self._filled] for name, column in self._extras.items()}

    def add(self, batch: Batch, extras: Mapping[str, Tensor] | None = None) -> None:
        """Offers a batch, sample by sample in its order; keeps what the selection decides.

        Args:
            batch: The arriving samples.
            extras: Values to keep beside them, [B, ...] each; the same names every time.
        """
        if not self.size:
            return
        if self.selection == "reservoir":
            chosen = self._reservoir(len(batch))
        elif batch.targets.ndim == 1:
            chosen = self._by_class(batch.targets.tolist())
        else:
            raise UserError(
                f"A memory with selection={self.selection} needs one label for each sample; these "
                f"have {batch.targets.shape[1]}. Use selection=reservoir."
            )
        self.seen += len(batch)
        if chosen:
            self._write(chosen, batch, extras or {})

    def draw(self, n: int) -> Recalled:
        """At most n different samples, uniformly, augmented afresh."""
        order = torch.randperm(len(self), generator=self._recall, device=self._targets.device)
        return self.take(order[:n])

    def take(self, slots: Tensor, augment: bool = True) -> Recalled:
        """The samples in the given slots ([B] int64)."""
        raw = self._raw.index_select(0, slots)
        transform = self.context.transform
        inputs = transform.train(raw, self._augment) if augment else transform.test(raw)
        extras = {name: column.index_select(0, slots) for name, column in self._extras.items()}
        return Recalled(inputs, self._targets.index_select(0, slots), extras, slots)

    def samples(self) -> Samples:
        """All that is stored, for methods that train on it for whole epochs; a view."""
        everything = torch.arange(len(self), device=self._targets.device)
        return Samples(TensorSource(self.raw, self.targets), everything, self.context.transform)

    def replace_extra(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Overwrites what is kept beside some samples.

        Args:
            name: Of the values.
            slots: Which samples, [B] int64, all different.
            values: [B, ...].
        """
        column = self._extras[name]
        column.index_copy_(0, slots, values.detach().to(column.dtype))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the generators, which belong to the context."""
        return {
            "seen": self.seen,
            "targets": self.targets,
            "raw": self.raw,
            "extras": self.extras,
            "slots_of": {k: list(v) for k, v in self._slots_of.items()},
            "seen_of": dict(self._seen_of),
            "once_largest": sorted(self._once_largest),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes copies of what `state_dict` gave."""
        device = self.context.device
        self.seen, self._filled = state["seen"], len(state["targets"])
        self._raw = state["raw"].to(device, copy=True)
        self._targets = state["targets"].to(device, copy=True)
        self._extras = {k: v.to(device, copy=True) for k, v in state["extras"].items()}
        self._slots_of = {k: list(v) for k, v in state["slots_of"].items()}
        self._seen_of = dict(state["seen_of"])
        self._once_largest = set(state["once_largest"])

    # Selection: a dict from slot to position in the batch, later samples overwriting earlier.

    def _reservoir(self, n: int) -> dict[int, int]:
        room = max(0, min(n, self.size - self.seen))
        chosen = {self.seen + i: i for i in range(room)}
        if room < n:
            # Up to about 100 samples, plain numbers cost less than six small tensor operations.
            uniform = torch.rand(n - room, dtype=torch.float64, generator=self._choose).tolist()
            for row, u in enumerate(uniform, room):
                slot = int(u * (self.seen + row + 1))
                if slot < self.size:
                    chosen[slot] = row
        return chosen

    def _by_class(self, labels: list[int]) -> dict[int, int]:
        # Every decision depends on the one before, so this is a loop, of plain numbers only.
        chosen: dict[int, int] = {}
        place = self._balanced if self.selection == "class_balanced" else self._greedy
        uniform = torch.rand(len(labels), 2, dtype=torch.float64, generator=self._choose).tolist()
        for row, (label, (accept, pick)) in enumerate(zip(labels, uniform, strict=True)):
            self._seen_of[label] = self._seen_of.get(label, 0) + 1
            slot = place(label, accept, pick)
            if slot >= 0:
                chosen[slot] = row
        return chosen

    def _balanced(self, label: int, accept: float, pick: float) -> int:
        """CBRS: the slot that a sample of this class may take; -1: none."""
        if label in self._once_largest:
            mine = self._slots_of[label]
            kept = accept * self._seen_of[label] < len(mine)
            return mine[int(pick * len(mine))] if kept else -1
        slot = self._claim(label, pick)
        if self._filled == self.size:
            self._once_largest.update(self._largest())
        return slot

    def _greedy(self, label: int, accept: float, pick: float) -> int:  # noqa: ARG002
        """GDumb: likewise. A class may come up to size / classes, counted before it arrived."""
        mine = self._slots_of.get(label)
        if mine is not None and len(mine) * len(self._slots_of) >= self.size:
            return -1
        return self._claim(label, pick)

    def _claim(self, label: int, pick: float) -> int:
        """A free slot, else one of the largest class, now this class's."""
        mine = self._slots_of.setdefault(label, [])
        if self._filled < self.size:
            slot = self._filled
            self._filled += 1
        else:
            largest = self._largest()
            share = pick * len(largest)
            donors = self._slots_of[largest[int(share)]]
            slot = donors.pop(int(share % 1 * len(donors)))
        mine.append(slot)
        return slot

    def _largest(self) -> list[int]:
        """The classes with the most stored samples."""
        most = max(map(len, self._slots_of.values()))
        return [c for c, slots in self._slots_of.items() if len(slots) == most]

    def _write(self, chosen: dict[int, int], batch: Batch, extras: Mapping[str, Tensor]) -> None:
        device = self._targets.device
        slots = torch.tensor(list(chosen)).to(device, non_blocking=True)
        rows = torch.tensor(list(chosen.values())).to(device, non_blocking=True)
        self._filled = max(self._filled, max(chosen) + 1)
        room = min(self.size, 1 << (self._filled - 1).bit_length())
        self._raw = _put(self._raw, batch.raw, slots, rows, room)
        self._targets = _put(self._targets, batch.targets, slots, rows, room)
        for name, values in extras.items():
            column = self._extras.get(name, values.new_empty(0))
            self._extras[name] = _put(column, values, slots, rows, room)


def _put(column: Tensor, values: Tensor, slots: Tensor, rows: Tensor, room: int) -> Tensor:
    """The column with `values[rows]` in `slots`, grown to `room` rows where it is shorter."""
    if len(column) < room:
        longer = (column if len(column) else values).new_empty(room, *values.shape[1:])
        if len(column):
            longer[: len(column)] = column
        column = longer
    return column.index_copy_(0, slots, values.detach().index_select(0, rows).to(column.dtype))
