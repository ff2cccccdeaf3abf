"""A small memory of samples without labels, balanced over what they are taken for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Item:
    slot: int
    entropy: float
    born: int


class CategoryMemory:
    """Category-balanced sampling with timeliness and uncertainty, as in RoTTA.

    Yuan et al. 2023, "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR, arXiv 2303.13899,
    and its code. Each class has a share of size / n_classes places. How little a sample is worth:

        timeliness / (1 + exp(−age / size)) + uncertainty · entropy / ln n_classes

    A newcomer whose class has less than its share takes a free place, or where there is none that
    of the worst sample of the largest classes; else that of the worst sample of its own class;
    in both cases only if that one is worth less than the newcomer. Then all get older by 1.

    Who stays depends on who came before, so newcomers are looked at one after another; that is
    arithmetic on numbers of the CPU. The samples themselves are copied once for each `add`.

    **Differs from the source:** nothing.

    Args:
        size: Samples it may hold.
        n_classes: Different labels, from 0.
        timeliness: Weight of the age.
        uncertainty: Weight of the entropy.
    """

    def __init__(
        self, size: int, n_classes: int, timeliness: float = 1.0, uncertainty: float = 1.0
    ) -> None:
        self.size, self.n_classes = size, n_classes
        self.timeliness, self.uncertainty = timeliness, uncertainty
        self._classes: list[list[_Item]] = [[] for _ in range(n_classes)]
        self._clock = 0
        self._raw: Tensor | None = None

    def __len__(self) -> int:
        return sum(map(len, self._classes))

    def add(self, raw: Tensor, labels: Sequence[int], entropies: Sequence[float]) -> None:
        """Offers samples one after another.

        Args:
            raw: As they are stored, [B, ...].
            labels: What they are taken for, B of them.
            entropies: In nats, B of them.
        """
        if self._raw is None:
            self._raw = raw.new_zeros(self.size, *raw.shape[1:])
        row_in: dict[int, int] = {}
        for row, (label, entropy) in enumerate(zip(labels, entropies, strict=True)):
            slot = self._place(label, entropy)
            if slot is not None:
                self._classes[label].append(_Item(slot, entropy, self._clock))
                row_in[slot] = row
            self._clock += 1
        if row_in:
            slots, rows = torch.tensor([[*row_in.keys()], [*row_in.values()]], device=raw.device)
            self._raw[slots] = raw[rows]

    def content(self) -> tuple[Tensor, Tensor]:
        """Samples as they are stored, [M, ...], and their ages as a part of `size`, [M]."""
        items = [item for members in self._classes for item in members]
        assert self._raw is not None
        slots = torch.tensor([item.slot for item in items], device=self._raw.device)
        ages = torch.tensor([self._clock - item.born for item in items], device=self._raw.device)
        return self._raw[slots], ages / self.size

    def _place(self, label: int, entropy: float) -> int | None:
        """Where a newcomer goes; None: nowhere. Who was there is forgotten."""
        held = len(self)
        if len(self._classes[label]) >= self.size / self.n_classes:
            candidates = [label]
        elif held < self.size:
            return held
        else:
            largest = max(map(len, self._classes))
            candidates = [c for c, members in enumerate(self._classes) if len(members) == largest]
        worst, where = -math.inf, (0, 0)
        for c in candidates:
            for i, item in enumerate(self._classes[c]):
                badness = self._badness(self._clock - item.born, item.entropy)
                if badness >= worst:
                    worst, where = badness, (c, i)
        if worst <= self._badness(0, entropy):
            return None
        return self._classes[where[0]].pop(where[1]).slot

    def _badness(self, age: int, entropy: float) -> float:
        old = self.timeliness / (1 + math.exp(-age / self.size))
        return old + self.uncertainty * entropy / math.log(max(self.n_classes, 2))

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        classes = [[astuple(item) for item in members] for members in self._classes]
        return {"classes": classes, "clock": self._clock, "raw": self._raw}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts `state_dict` back; nothing of it is shared."""
        self._classes = [[_Item(*item) for item in members] for members in state["classes"]]
        self._clock = state["clock"]
        self._raw = None if state["raw"] is None else state["raw"].clone()
