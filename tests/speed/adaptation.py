"""What test-time adaptation costs beside loops written by hand. Not a test.

    python tests/speed/adaptation.py [--rounds 7] [--batches 4] [--batch-size 200]

ResNet-20 on random 32x32 images, kept as bytes on both sides. The suite's side is its whole loop
over an experience: gathering, normalising, answering, adapting, counting errors, calibration and
collapse. The loops by hand do the least: normalise, forward (backward, step), count what is right;
in the memory format that the suite gives the model (channels last), and in PyTorch's default.
Contenders take turns in one process, in reverse order in every other round; a ratio compares the
CPU seconds of two runs of one round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from turns import Pass, compare, show

from clbench.adaptation import Adaptation
from clbench.nn.backbones import CifarResNet
from clbench.nn.heads import classifier
from clbench.nn.transforms import ImageTransform
from clbench.online import Online
from clbench.samples import Samples, TensorSource
from clbench.toys import ToyDrift
from clbench.types import Arrivals, Context, Experience, Stream
from strategies.source import Source
from strategies.tent import Tent

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
LAST, DEFAULT = torch.channels_last, torch.contiguous_format


def resnet() -> nn.Module:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classifier(CifarResNet(), (3, 32, 32), 10).eval()


def suite(strategy: Adaptation, images: Tensor, labels: Tensor, size: int) -> Pass:
    """The suite's loop over one experience."""
    transform = ImageTransform(MEAN, STD)
    samples = Samples(TensorSource(images, labels), torch.arange(len(images)), transform)
    arrivals = Arrivals(samples, torch.zeros(len(images), dtype=torch.int64))
    one = Experience(0, "random", None)
    stream = Stream([one], [], transform, 10, arrivals=[arrivals], domains=["random"])
    scenario = ToyDrift(batch_size=size)
    context = Context(
        device=torch.device("cpu"),
        seed=0,
        scenario=scenario,
        objective=scenario.objective(),
        transform=transform,
        n_outputs=10,
    )
    strategy.setup(resnet().to(memory_format=LAST), context)
    online = Online(stream, strategy, context)

    tally = online.by_domain

    def run() -> float:
        before = float(tally.right)
        for _ in online.meet(0):
            pass
        return (float(tally.right) - before) / len(images)

    return run


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def by_batch(model: nn.Module) -> nn.Module:
    """The model, normalising with the statistics of each batch and keeping none."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return model


def inference(images: Tensor, labels: Tensor, size: int, layout: torch.memory_format) -> Pass:
    """The model as it is, by hand."""
    model = resnet().to(memory_format=layout)

    @torch.inference_mode()
    def run() -> float:
        right = 0
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            right += int((model(normalised(x)).argmax(1) == y).sum())
        return right / len(images)

    return run


def entropy_steps(images: Tensor, labels: Tensor, size: int, layout: torch.memory_format) -> Pass:
    """TENT, by hand."""
    model = by_batch(resnet().to(memory_format=layout)).requires_grad_(False)
    scales: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            scales += [module.weight.requires_grad_(True), module.bias.requires_grad_(True)]  # type: ignore[list-item]
    optimizer = torch.optim.Adam(scales, 1e-3)

    def run() -> float:
        right = 0
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            outputs = model(normalised(x))
            loss = -(outputs.softmax(1) * outputs.log_softmax(1)).sum(1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            right += int((outputs.argmax(1) == y).sum())
        return right / len(images)

    return run


#: A method, and the loop by hand that does the same.
JOBS: dict[str, tuple[Adaptation, Callable[..., Pass]]] = {
    "source": (Source(), inference),
    "tent": (Tent(), entropy_steps),
}


def random_images(count: int) -> tuple[Tensor, Tensor]:
    """Noise on a random colour; labels: what the model says first, by statistics of 100 each."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((192, (count, 3, 1, 1)), (64, (count, 3, 32, 32)))
    colours, noise = (torch.randint(n, s, generator=generator).byte() for n, s in shapes)
    images = colours + noise
    model = by_batch(resnet())
    with torch.no_grad():
        return images, torch.cat([model(normalised(x)) for x in images.split(100)]).argmax(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares, and prints a table for each kind of job."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=200)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size, count = asked.batch_size, asked.batches * asked.batch_size
    images, labels = random_images(count)
    for title, (strategy, by_hand) in JOBS.items():
        contenders = {
            "clbench": suite(copy.deepcopy(strategy), images, labels, size),
            "by hand": by_hand(images, labels, size, LAST),
            "by hand, default format": by_hand(images, labels, size, DEFAULT),
        }
        seconds = compare(contenders, asked.rounds)
        show(title, seconds, "by hand", count, "image")


if __name__ == "__main__":
    main()
