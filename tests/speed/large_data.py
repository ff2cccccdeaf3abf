"""More images than memory: what it costs to leave them on the disk. Not a test.

    python tests/speed/large_data.py FOLDER [--images 1000000] [--held 200000] [--rounds 2]

Random images of 64x64 pixels in three colours are written to the cache in FOLDER (12.3 GB for a
million), as `image_folder` writes what it decodes. Then, each in a process of its own, in turns:
"disk" draws from all of them and leaves them in their file, "memory" from the first --held of
them, all held. Jobs: "load" goes through all images in a random order, gathers and normalises
them, nothing else, in batches of 32; "train" takes --steps steps of a small convolutional network
on such batches. Then "disk" again with a file of which the system holds nothing ("cold"). One
thread beside the one that reads. Resident is the largest that the process had,
what PyTorch takes included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from clbench import cache, machine
from clbench.nn.backbones import ConvNet
from clbench.nn.heads import classifier
from clbench.nn.transforms import ImageTransform
from clbench.rows import Rows
from clbench.samples import Batch, MappedSource, Samples, Source, TensorSource

SHAPE, CLASSES, BATCH, AT_ONCE = (3, 64, 64), 100, 32, 4096


def stored(folder: Path, images: int) -> np.ndarray:
    """The images, mapped; made at the first call."""

    def make(lend: cache.Lend) -> dict[str, Rows]:
        rows, generator = lend("images", (images, *SHAPE), np.uint8), np.random.default_rng(0)
        for start in range(0, images, AT_ONCE):
            count = min(AT_ONCE, images - start)
            rows[start : start + count] = generator.integers(0, 256, (count, *SHAPE), np.uint8)
        return {"images": rows}

    return cache.filled(folder, "synthetic", {"images": images}, make)["images"]


def source(kind: str, mapped: np.ndarray, held: int) -> Source:
    labels = torch.arange(len(mapped)) % CLASSES
    if kind == "memory":
        whole = torch.empty(held, *SHAPE, dtype=torch.uint8)
        rows = Rows.behind(mapped)
        for start in range(0, held, AT_ONCE):
            some = np.arange(start, min(start + AT_ONCE, held))
            whole[start : start + len(some)] = torch.from_numpy(rows[some])
        return TensorSource(whole, labels[:held])
    return MappedSource(Rows.behind(mapped), labels)


def batches(samples: Samples, count: int) -> Iterator[Batch]:
    """So many, from one random order after another."""
    generator = torch.Generator().manual_seed(0)
    orders = (samples.shuffled(BATCH, generator) for _ in itertools.count())
    every = (b for order in orders for b in samples.batches(order, BATCH))
    return itertools.islice(every, count)


def train(batch: Batch, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch.inputs), batch.targets).backward()
    optimizer.step()


def job(kind: str, name: str, folder: Path, images: int, held: int, steps: int) -> None:
    """One case in this process; prints its line."""
    torch.set_num_threads(1)
    mapped = stored(folder, images)
    if kind == "cold":
        _forget(mapped)
    data = source(kind, mapped, held)
    transform = ImageTransform((0.5,) * 3, (0.3,) * 3)
    samples = Samples(data, torch.arange(len(data)), transform)
    model = classifier(ConvNet(), SHAPE, CLASSES).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=True)
    clock, processor = time.perf_counter(), time.process_time()
    for batch in batches(samples, steps):
        if name == "train":
            train(batch, model, optimizer)
    line = {
        "data": kind,
        "job": name,
        "images": len(data),
        "images_per_s": steps * BATCH / (time.perf_counter() - clock),
        "cpu_us_per_image": 1e6 * (time.process_time() - processor) / (steps * BATCH),
        "resident_mib": machine.peak_memory(torch.device("cpu")) / 2**20,
    }
    print(json.dumps(line))


def _forget(mapped: np.ndarray) -> None:
    """Has the system drop what it holds of a file."""
    whole = mapped if isinstance(mapped, np.memmap) else mapped.base
    assert isinstance(whole, np.memmap)
    descriptor = os.open(str(whole.filename), os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--held", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.case:
        kind, name = arguments.case
        count = arguments.images // BATCH if name == "load" and kind in _WARM else arguments.steps
        job(kind, name, arguments.folder, arguments.images, arguments.held, count)
        return
    stored(arguments.folder, arguments.images)
    made = {"seconds": time.perf_counter() - began, "bytes": arguments.images * 12288}
    made["resident_mib"] = machine.peak_memory(torch.device("cpu")) / 2**20
    print(json.dumps({"made": made}), flush=True)
    lines = [line for _ in range(arguments.rounds) for line in _round()]
    print("| data | job | images/s | CPU us/image | resident, MiB |\n|---|---|---|---|---|")
    for case in dict.fromkeys((line["data"], line["job"]) for line in lines):
        mine = [line for line in lines if (line["data"], line["job"]) == case]
        speed = statistics.median(line["images_per_s"] for line in mine)
        cpu = statistics.median(line["cpu_us_per_image"] for line in mine)
        most = max(line["resident_mib"] for line in mine)
        print(f"| {case[0]} | {case[1]} | {speed:,.0f} | {cpu:.1f} | {most:,.0f} |")


_WARM = ("memory", "disk")


def _round() -> Iterator[dict[str, float]]:
    """Every case once, each in a process of its own."""
    cases = [(k, j) for j in ("load", "train") for k in _WARM]
    for kind, name in (*cases, ("cold", "train")):
        command = [sys.executable, *sys.argv, "--case", kind, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(done.stdout, end="", flush=True)
        yield json.loads(done.stdout)


if __name__ == "__main__":
    main()
