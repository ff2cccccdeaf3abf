"""What MOS costs: passes for an image at test, steps in training, bytes of a class. Not a test.

    python tests/speed/mos_passes.py [--pretrained] [--experiences 10] [--epochs 5] [--rounds 5]

Glyphs, ten classes in each experience; a vision transformer of the shape of backbone=vit_glyphs,
at random or, with --pretrained, the one itself (made or read from the cache). "lazy" is MOS,
"eager" what its released code does, every set of adapters on every image, "one" the model without
adapters: seconds of the processor for all test images, taken in turns in one process, the order
reversed in every other round; a ratio compares runs of one round. Steps likewise, in the second
experience; "adapters" is the fine-tuning of as many adapters, "full" that of the whole model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from turns import compare, ratio

from clbench.glyph_vit import GlyphViT
from clbench.machine import isolated_rng
from clbench.nn.backbones import Backbone, FeatureExtractor, ModelFeatures
from clbench.passes import FORWARD, Passes
from clbench.samples import Batch
from clbench.training import GradientStrategy
from clbench.types import Context, Split
from scenarios.glyphs import Glyphs
from strategies.adapter_finetune import AdapterFinetune
from strategies.finetune import Finetune
from strategies.mos import MOS

LEARNERS: dict[str, GradientStrategy] = {
    "mos": MOS(lr=0.03, momentum=0.9, weight_decay=5e-4, schedule="cosine"),
    "adapters": AdapterFinetune(lr=0.03, momentum=0.9, bottleneck=16),
    "full": Finetune(lr=0.01, momentum=0.9),
}


@dataclass(kw_only=True)
class RandomViT(Backbone):
    """A vision transformer of the shape of vit_glyphs, not trained."""

    @property
    def is_vision_transformer(self) -> bool:
        return True

    def _assemble(
        self, image_shape: tuple[int, int, int]
    ) -> tuple[FeatureExtractor, dict[str, Tensor]]:
        from timm.models.vision_transformer import VisionTransformer

        shape = GlyphViT()
        model = VisionTransformer(
            img_size=image_shape[1:],
            patch_size=shape.patch_size,
            num_classes=0,
            embed_dim=shape.embed_dim,
            depth=shape.depth,
            num_heads=shape.num_heads,
        )
        return ModelFeatures(model, shape.embed_dim), {}


def prepared(strategy: GradientStrategy, scenario: Glyphs) -> GradientStrategy:
    """A copy that has met nothing yet."""
    with isolated_rng(0, "model"):
        stream = scenario.stream(Split.EVALUATE, 0)
        model = scenario.model(0, stream)
        context = Context(
            device=torch.device("cpu"),
            seed=0,
            scenario=scenario,
            objective=scenario.objective(),
            transform=stream.transform,
            n_outputs=stream.n_outputs,
        )
        strategy = copy.deepcopy(strategy)
        strategy.setup(model, context)
    return strategy


def told(seconds: Mapping[str, Sequence[float]], base: str, unit: int) -> list[str]:
    """One line for each contender."""
    lines = []
    for name, mine in seconds.items():
        each = 1000 * statistics.median(mine) / unit
        lines.append(f"  {name:9} {each:8.2f} ms   x {base}: {ratio(mine, seconds[base])}")
    return lines


def inference(mos: MOS, batches: Sequence[Batch], rounds: int) -> list[str]:
    """Passes and seconds for the given test images."""

    @torch.inference_mode()
    def eager() -> None:
        for batch in batches:
            for k in range(len(mos.adapters)):
                mos.features(batch.inputs, mos.adapters.of(k))

    def lazy() -> list[Tensor]:
        with torch.inference_mode():
            return [mos.predict(batch) for batch in batches]

    @torch.inference_mode()
    def one() -> None:
        for batch in batches:
            mos.model.get_submodule("features")(batch.inputs)

    images = sum(map(len, batches))
    passes = Passes({FORWARD: 0})
    with passes.watch(mos.model), passes.counting(True):
        lazy()
    said, counted = mos.facts()["mean_passes_per_prediction"], passes.costs[FORWARD] / images
    head = f"passes for each image: {said:.3f} (counted {counted:.3f}), eager {len(mos.adapters)}"
    lines = told(compare({"one": one, "lazy": lazy, "eager": eager}, rounds), "one", images)
    return [head, "processor time for each image:", *lines]


def training(scenario: Glyphs, rounds: int) -> list[str]:
    """Seconds of 20 steps in the second experience."""
    loops = {}
    for name, learner in LEARNERS.items():
        strategy = prepared(learner, replace(scenario, epochs=1))
        first, second = scenario.stream(Split.EVALUATE, 0).experiences[:2]
        with isolated_rng(0, "learn"):
            strategy.learn(first)
        assert second.train is not None
        strategy.before(second)
        batch = second.train.take(torch.arange(scenario.batch_size))
        strategy.begin(10**6)

        def loop(strategy: GradientStrategy = strategy, batch: Batch = batch) -> None:
            for _ in range(20):
                strategy.update(strategy.loss(batch))

        loops[name] = loop
    return ["processor time for each step:", *told(compare(loops, rounds), "adapters", 20)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pretrained", action="store_true", help="vit_glyphs itself")
    parser.add_argument("--experiences", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=100, help="of each class to learn from")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scenario = Glyphs(
        backbone=GlyphViT() if chosen.pretrained else RandomViT(),
        n_experiences=chosen.experiences,
        n_classes=10 * chosen.experiences,
        train_per_class=chosen.images,
        epochs=chosen.epochs,
    )
    mos = prepared(LEARNERS["mos"], scenario)
    assert isinstance(mos, MOS)
    stream = scenario.stream(Split.EVALUATE, 0)
    with isolated_rng(0, "learn"):
        for experience in stream.experiences:
            mos.learn(experience)
    batches = [test.take(torch.arange(len(test))).unlabelled() for test in stream.tests]
    print("\n".join(inference(mos, batches, chosen.rounds)))
    print("\n".join(training(scenario, chosen.rounds)))
    count = len(mos.statistics.classes)
    print(f"bytes of each class, {mos.gaussians}: {mos.statistics.nbytes / count:.0f}")


if __name__ == "__main__":
    main()
