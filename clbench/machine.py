"""The machine a run is on: device, threads, random numbers, facts for the record."""

from __future__ import annotations

import os
import platform
import random
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clbench.errors import UserError
from clbench.types import derive_seed

#: Operations in a forward pass of one training batch above which all cores are used.
#: On two idle cores the second thread always pays: a step is 1.6 x as fast for an MLP
#: 784-400-400-10 with 64 samples (6e7), 1.3 to 1.6 x for a slim ResNet-18 with 32 (3e9), 1.7 x
#: for a ResNet-20 with 32 (3e9), 1.85 x for a ViT-Ti of 64 patches with 32 (2e10).
#: Where another process has one of the cores, threads wait for each other, and two are slower
#: than one: 100 x for that MLP, 3 x and more for the slim ResNet. Small models are run side by
#: side, a process a core, so they get one thread.
FLOPS_PER_STEP_FOR_THREADS = 5e8


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        UserError: If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"device={name} is unknown. Use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: PyTorch sees no CUDA device here. Use device=auto or cpu.")
    return torch.device(name)


def forward_flops(model: nn.Module, inputs: Tensor) -> int:
    """Floating-point operations of one forward pass, counted by PyTorch's own counter."""
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    model.train(training)
    return int(counter.get_total_flops())


def choose_threads(threads: int, flops_per_step: float) -> int:
    """How many CPU threads PyTorch should use.

    Args:
        threads: What the user asked for; 0: choose by the size of the work.
        flops_per_step: Operations of a forward pass over one training batch.
    """
    if threads:
        return threads
    return available_cores() if flops_per_step >= FLOPS_PER_STEP_FOR_THREADS else 1


def available_cores() -> int:
    """CPU cores this process may use: no more than OMP_NUM_THREADS says, which schedulers set."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    share = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(cores, int(share)) if share.isdecimal() and int(share) else cores


def idle_cores() -> int:
    """CPU cores of this process that nobody has used over the last minute, but at least one."""
    idle = (os.cpu_count() or 1) - int(os.getloadavg()[0])
    return max(1, min(idle, available_cores()))


def available_memory() -> int:
    """Bytes of main memory that this process could still take, a container's limit included."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    limits = [pages * size]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * next(int(x.split()[1]) for x in lines if x[:13] == "MemAvailable:"))
    for path in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such limit, or "max"
            limits.append(int((Path("/sys/fs/cgroup") / path).read_text()))
    return min(limits)


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Runs the block with this many PyTorch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Makes cuDNN choose algorithms that give the same bits every time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


@contextmanager
def isolated_rng(seed: int, purpose: str) -> Iterator[None]:
    """Seeds every global generator for the block, and puts them back afterwards.

    The suite draws from generators of its own; dropout, initialisers and third-party code
    draw from the global ones, so these too are a function of (seed, purpose).
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    derived = derive_seed(seed, purpose)
    with torch.random.fork_rng(devices):
        # Not torch.manual_seed: where CUDA sleeps, that queues a seed for when it wakes.
        torch.default_generator.manual_seed(derived)
        if devices:
            torch.cuda.manual_seed_all(derived)
        random.seed(derived)
        np.random.seed(derived % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement of peak device memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU since the last reset, or resident in this process so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # On Linux, what getrusage says includes the parent, as large as it was at the start.
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock read now is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device, threads: int) -> Mapping[str, Any]:
    """What decides the bits of a result, without names of hosts, users or folders."""
    packages = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "hydra-core")
    return {
        "clbench": version("clbench"),
        "code": code_version(),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        **{name: version(name) for name in packages},
    }


@cache
def version(package: str) -> str | None:
    """The installed version of a package, None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def code_version() -> str:
    """The git commit of this checkout ("+dirty" if it was changed), or the wheel's version."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        try:
            commit = _git(root, "rev-parse", "--short=12", "HEAD")
            dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
            return commit + ("+dirty" if dirty else "")
        except (OSError, subprocess.SubprocessError):
            pass
    return f"wheel {version('clbench')}"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
