"""A model trained on the clean source before a stream begins; made once, then read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench import cache, config
from clbench.machine import isolated_rng, thread_count
from clbench.progress import counting
from clbench.samples import Samples
from clbench.types import derive_seed

#: Raised when the code below trains other weights from the same options.
_VERSION = 1
_PURPOSE = "source model"

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a source model is trained: AdamW, one cycle of the learning rate, cross-entropy.

    Attributes:
        epochs: Passes over the source's samples.
        batch_size: Samples in a step.
        lr: Largest learning rate.
        weight_decay: Decoupled.
        seed: Of initialisation and order.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0


def train(
    model: nn.Module,
    samples: Samples,
    recipe: Recipe,
    key: Mapping[str, Any],
    cache_dir: Path | None,
    loss: Loss = F.cross_entropy,
) -> None:
    """Gives a model the weights that it has after training on the source.

    Trains where the cache has no such weights yet, on the CPU: the same ones for every device.

    Args:
        model: Freshly made; its weights are replaced.
        samples: Labelled, on the CPU; augmented as their transform does.
        recipe: How.
        key: What decides model and samples, plain data.
        cache_dir: The cache folder; None: the user's.
        loss: What is minimised, of outputs and targets; its name is not part of the key.
    """

    def make() -> dict[str, Any]:
        # One thread: the same bits whatever the number of cores.
        with isolated_rng(recipe.seed, _PURPOSE), thread_count(1):
            _train(model, samples, recipe, loss)
        state = model.state_dict()
        flat = {f"t{i}": tensor.numpy() for i, tensor in enumerate(state.values())}
        return {k: np.atleast_1d(v) for k, v in flat.items()}

    everything = {"version": _VERSION, "recipe": vars(recipe), **key, "torch": torch.__version__}
    found = cache.arrays(
        cache_dir or cache.default_folder(), "source_model", everything, make, mmap=False
    )
    state = model.state_dict()
    for i, (name, tensor) in enumerate(state.items()):
        state[name] = torch.from_numpy(found[f"t{i}"]).view(tensor.shape)
    model.load_state_dict(state)
    model.eval()


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(json.dumps([name, [*tensor.shape]]).encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def described(part: Any) -> dict[str, Any]:
    """The options of a part of a scenario that decide its weights, plain data for a key."""
    return config.options(part)


def sha256(tensor: Tensor) -> str:
    """Of a tensor's numbers."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _train(model: nn.Module, samples: Samples, recipe: Recipe, loss: Loss) -> None:
    steps = recipe.epochs * -(-len(samples) // recipe.batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)
    shuffle, augment = (
        torch.Generator().manual_seed(derive_seed(recipe.seed, f"{_PURPOSE} {purpose}"))
        for purpose in ("shuffle", "augment")
    )
    model.train()
    with counting("training the source model", "samples") as tell:
        done, total = 0, recipe.epochs * len(samples)
        for _ in range(recipe.epochs):
            order = samples.shuffled(recipe.batch_size, shuffle)
            for batch in samples.batches(order, recipe.batch_size, augment):
                optimizer.zero_grad()
                loss(model(batch.inputs), batch.targets).backward()
                optimizer.step()
                schedule.step()
                done += len(batch)
                tell(done, total)
    model.eval()
