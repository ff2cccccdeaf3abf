"""A fixed budget of stored samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.samples import Batch
from clbench.types import Context

Selection = Literal["reservoir", "class_balanced", "greedy"]


@dataclass(frozen=True)
class Recalled:
    """Samples drawn from a memory.

    Attributes:
        inputs: Augmented afresh and normalised, [B, ...].
        targets: Labels, [B] int64.
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
        selection: Who is kept once it is full:
            "reservoir": every sample seen so far with equal probability (Vitter 1985,
            algorithm R);
            "class_balanced": reservoir within each class, room for new classes taken from the
            largest (Chrysakis and Moens 2020, CBRS);
            "greedy": classes kept equal by evicting from the largest; a class that has its
            share takes no more (Prabhu et al. 2020, GDumb).
        name: Tells the random streams of several memories apart.
    """

    def __init__(
        self, size: int, context: Context, selection: Selection = "reservoir", name: str = "memory"
    ) -> None:
        self.size, self.context, self.selection = size, context, selection
        self.seen = 0
        self.targets = torch.empty(0, dtype=torch.int64, device=context.device)
        self.raw = torch.empty(0, device=context.device)
        self.extras: dict[str, Tensor] = {}
        # Who is kept is decided on the CPU, where it costs no wait for a GPU.
        self._choose = context.generator(f"{name}.select", torch.device("cpu"))
        self._recall = context.generator(f"{name}.recall")
        self._augment = context.generator(f"{name}.augment")
        self._slots_of: dict[int, list[int]] = {}
        self._seen_of: dict[int, int] = {}
        self._once_largest: set[int] = set()

    def __len__(self) -> int:
        return len(self.targets)

    def add(self, batch: Batch, extras: Mapping[str, Tensor] | None = None) -> None:
        """Offers a batch; keeps what the selection decides.

        Args:
            batch: The arriving samples.
            extras: Values to keep beside them, [B, ...] each; the same names every time.
        """
        if not self.size:
            return
        if self.selection == "reservoir":
            chosen = self._reservoir(len(batch))
        else:
            chosen = self._by_class(batch.targets.tolist())
        self.seen += len(batch)
        if chosen:
            self._write(chosen, batch, extras or {})

    def draw(self, n: int) -> Recalled:
        """At most n different samples, uniformly, augmented afresh."""
        order = torch.randperm(len(self), generator=self._recall, device=self.targets.device)
        return self.take(order[:n])

    def take(self, slots: Tensor, augment: bool = True) -> Recalled:
        """The samples in the given slots ([B] int64)."""
        raw = self.raw.index_select(0, slots)
        transform = self.context.transform
        inputs = transform.train(raw, self._augment) if augment else transform.test(raw)
        extras = {name: value.index_select(0, slots) for name, value in self.extras.items()}
        return Recalled(inputs, self.targets.index_select(0, slots), extras, slots)

    def replace_extra(self, name: str, slots: Tensor, values: Tensor) -> None:
        """Overwrites what is kept beside some samples."""
        self.extras[name][slots] = values.to(self.extras[name].dtype)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the generators, which belong to the context."""
        return {
            "seen": self.seen,
            "targets": self.targets,
            "raw": self.raw,
            "extras": dict(self.extras),
            "slots_of": {k: list(v) for k, v in self._slots_of.items()},
            "seen_of": dict(self._seen_of),
            "once_largest": sorted(self._once_largest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self.targets, self.raw, self.extras = state["targets"], state["raw"], state["extras"]
        self._slots_of, self._seen_of = state["slots_of"], state["seen_of"]
        self._once_largest = set(state["once_largest"])

    def _reservoir(self, n: int) -> dict[int, int]:
        """Slot to position in the batch; a later sample overwrites an earlier one's slot."""
        room = max(0, min(n, self.size - self.seen))
        chosen = {self.seen + i: i for i in range(room)}
        if room < n:
            counts = torch.arange(self.seen + room + 1, self.seen + n + 1, dtype=torch.float64)
            uniform = torch.rand(n - room, dtype=torch.float64, generator=self._choose)
            slots = (uniform * counts).long()
            for i in (slots < self.size).nonzero().flatten().tolist():
                chosen[int(slots[i])] = room + i
        return chosen

    def _by_class(self, labels: list[int]) -> dict[int, int]:
        """As `_reservoir`, for the two selections that look at the labels."""
        chosen: dict[int, int] = {}
        filled = len(self)
        uniform = torch.rand(len(labels), 2, generator=self._choose).tolist()
        for i, (label, (accept, pick)) in enumerate(zip(labels, uniform, strict=True)):
            mine = self._slots_of.setdefault(label, [])
            self._seen_of[label] = self._seen_of.get(label, 0) + 1
            if filled < self.size:
                slot = filled
                filled += 1
                mine.append(slot)
            else:
                slot = self._evict(label, accept, pick)
                if slot < 0:
                    continue
            chosen[slot] = i
            most = max(map(len, self._slots_of.values()))
            self._once_largest |= {c for c, slots in self._slots_of.items() if len(slots) == most}
        return chosen

    def _evict(self, label: int, accept: float, pick: float) -> int:
        """The slot a sample of this class may take in a full memory; -1: none."""
        mine = self._slots_of[label]
        if self.selection == "class_balanced" and label in self._once_largest:
            kept = mine and accept < len(mine) / self._seen_of[label]
            return mine[int(pick * len(mine))] if kept else -1
        largest = max(self._slots_of, key=lambda c: len(self._slots_of[c]))
        share = self.size // len(self._slots_of)
        limit = share if self.selection == "greedy" else len(self._slots_of[largest])
        if len(mine) >= limit:
            return -1
        donors = self._slots_of[largest]
        slot = donors.pop(int(pick * len(donors)))
        mine.append(slot)
        return slot

    def _write(self, chosen: dict[int, int], batch: Batch, extras: Mapping[str, Tensor]) -> None:
        device = self.targets.device
        slots = torch.tensor(list(chosen), device=device)
        rows = torch.tensor(list(chosen.values()), device=device)
        columns = {"raw": batch.raw, "targets": batch.targets}
        grow = max(0, max(chosen) + 1 - len(self))
        self.raw = _put(self.raw, columns["raw"], slots, rows, grow)
        self.targets = _put(self.targets, columns["targets"], slots, rows, grow)
        for name, value in extras.items():
            kept = self.extras.get(name, value.new_empty(0))
            self.extras[name] = _put(kept, value, slots, rows, grow)


def _put(kept: Tensor, arriving: Tensor, slots: Tensor, rows: Tensor, grow: int) -> Tensor:
    if grow:
        room = arriving.new_empty(grow, *arriving.shape[1:])
        kept = torch.cat((kept, room)) if len(kept) else room
    kept[slots] = arriving.detach()[rows].to(kept.dtype)
    return kept
