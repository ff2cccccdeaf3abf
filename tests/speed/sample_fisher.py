"""Fisher information of single samples: the suite's, and a loop over samples. Not a test.

    python tests/speed/sample_fisher.py [--samples 256] [--rounds 5]

Random images of ten classes; an MLP 784-400-400-10 and the slim ResNet, one thread. "exact" is the
expectation over the model's own answers, ten backward passes a sample; "empirical" takes the
label, one. The loop does what most code does: a forward and a backward pass for each sample (and
each class), squares added up. Processor time, in turns. Both estimates are compared first.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from turns import compare, show

from clbench.nn.backbones import MLP, Backbone, SlimResNet18
from clbench.nn.fisher import Fisher, diagonal_fisher
from clbench.nn.heads import classifier
from clbench.nn.transforms import ImageTransform
from clbench.samples import Samples, TensorSource

CLASSES = 10
CASES: dict[str, tuple[Backbone, tuple[int, int, int]]] = {
    "MLP": (MLP(), (1, 28, 28)),
    "slim ResNet": (SlimResNet18(), (3, 32, 32)),
}


def by_hand(model: nn.Module, samples: Samples, kind: Fisher) -> dict[str, Tensor]:
    """One sample after another."""
    weights = dict(model.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for position in range(len(samples)):
        batch = samples.take(torch.tensor([position]))
        log_p = F.log_softmax(model(batch.inputs), 1)[0]
        labels = range(CLASSES) if kind == "exact" else [int(batch.targets)]
        for label in labels:
            share = float(log_p[label].detach().exp()) if kind == "exact" else 1.0
            model.zero_grad()
            log_p[label].backward(retain_graph=True)
            for name, weight in weights.items():
                assert weight.grad is not None
                total[name] += share * weight.grad**2 / len(samples)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds: tuple[Fisher, ...] = ("exact", "empirical")
    for name, (backbone, shape) in CASES.items():
        torch.manual_seed(0)
        model = classifier(backbone, shape, CLASSES).eval().to(memory_format=torch.channels_last)
        pixels = torch.randint(0, 256, (arguments.samples, *shape), dtype=torch.uint8)
        source = TensorSource(pixels, torch.arange(len(pixels)) % CLASSES)
        transform = ImageTransform((0.5,) * shape[0], (0.3,) * shape[0])
        samples = Samples(source, torch.arange(len(pixels)), transform)
        for kind in kinds:
            contenders = {
                "clbench": partial(diagonal_fisher, model, samples, kind),
                "by hand, sample by sample": partial(by_hand, model, samples, kind),
            }
            mine, theirs = (contender() for contender in contenders.values())
            off = max(float((mine[n] - t).abs().max() / t.max()) for n, t in theirs.items())
            # Of the largest entry of a parameter. A ReLU at 0 may turn in single precision; in
            # double precision it is 1e-14.
            assert off < 1e-2, off
            seconds = compare(contenders, arguments.rounds)
            show(f"{name}, {kind}", seconds, "by hand, sample by sample", len(samples))


if __name__ == "__main__":
    main()
