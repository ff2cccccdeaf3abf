"""Features made once: what they save nearest means and regression. Not a test.

    python tests/speed/kept_features.py [--rounds 3] [--backbone vit_glyphs] [--seed 0]

Whole runs on glyphs, 10 experiences of 10 classes, 10,000 training images and 2,000 test images,
one thread: from the images, then with cache_features=true, the first of which makes the features
in an empty cache folder. Seconds of the clock, and of the processor, for a run from its first line
to its result; the images and the weights of vit_glyphs are in the user's cache by then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from clbench import protocol
from clbench.conditions import Conditions
from clbench.glyph_vit import GlyphViT
from clbench.nn.backbones import Backbone, SlimResNet18
from clbench.results import Result
from clbench.types import Strategy
from scenarios.glyphs import Glyphs
from strategies.aper import APER
from strategies.nmc import NMC
from strategies.ranpac import RanPAC

BACKBONES: Mapping[str, type[Backbone]] = {
    "vit_glyphs": GlyphViT,
    "slim_resnet18": SlimResNet18,
}
METHODS: Mapping[str, Strategy] = {
    "nmc": NMC(),
    "aper, tuning=none": APER(tuning="none"),
    "ranpac, tuning=none": RanPAC(tuning="none"),
}


def timed(
    scenario: Glyphs, method: str, conditions: Conditions, cache: Path
) -> tuple[Result, tuple[float, float]]:
    """A run, and its seconds: of the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    result = protocol.run(scenario, METHODS[method], conditions, cache_dir=cache)
    return result, (time.perf_counter() - clock, time.process_time() - processor)


def measured(
    scenario: Glyphs, method: str, seed: int, rounds: int, cache: Path
) -> dict[str, float | str]:
    """Medians over rounds; what makes the features is the first run in the cache folder."""
    plain = Conditions(device="cpu", threads=1, seed=seed)
    cached = Conditions(device="cpu", threads=1, seed=seed, cache_features=True)
    first, making = timed(scenario, method, cached, cache)
    seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for conditions in (plain, cached):
            result, spent = timed(scenario, method, conditions, cache)
            seconds[conditions.cache_features].append(spent)
            assert result.accuracy_matrix == first.accuracy_matrix, "kept features change answers"
    images, features = (
        [statistics.median(spent) for spent in zip(*seconds[kept], strict=True)]
        for kept in (False, True)
    )
    return {
        "features": method,
        "images_s": images[0],
        "images_cpu_s": images[1],
        "first_s": making[0],
        "first_cpu_s": making[1],
        "kept_s": features[0],
        "kept_cpu_s": features[1],
        "ratio_cpu": images[1] / features[1],
        "accuracy": first.metrics["average_accuracy"] or 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", choices=[*BACKBONES], default="vit_glyphs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scenario = Glyphs(backbone=BACKBONES[arguments.backbone]())
    lines = []
    with tempfile.TemporaryDirectory() as cache:
        for method in METHODS:
            place = Path(cache)
            lines.append(measured(scenario, method, arguments.seed, arguments.rounds, place))
    print("| method | from images [s] | CPU | first, kept [s] | CPU | kept [s] | CPU | x CPU |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        numbers = [f"{v:.2f}" for k, v in line.items() if k not in ("features", "accuracy")]
        print(f"| {line['features']} | {' | '.join(numbers)} |")
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
