"""What refresh learning costs beside its base, for each unlearning step. Not a test.

    python tests/speed/refresh_steps.py [--base replay,derpp] [--steps 2] [--form relative]

An MLP 784-400-400-10 learns random images, 32 in a batch and 32 from the memory, in an
experience after another one, so that memories are full and penalties and Fisher information are
there. Base and refreshed base take turns in one process, the order reversed in every other round;
a ratio compares the CPU seconds of
two runs of one round. "steps": the loop over batches; "learn": all of it, the
pass for the Fisher information at the end of the single epoch included.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from clbench.classification import ClassIncrementalImages, Images
from clbench.nn.backbones import MLP, Backbone
from clbench.samples import TensorSource
from clbench.training import GradientStrategy, Trainer
from clbench.types import Context, Split, Stream
from strategies.der import DER
from strategies.derpp import DERpp
from strategies.er_ace import ERACE
from strategies.ewc import EWC
from strategies.finetune import Finetune
from strategies.lwf import LwF
from strategies.refresh import Refresh
from strategies.replay import Replay

BASES: dict[str, GradientStrategy] = {
    "finetune": Finetune(),
    "replay": Replay(),
    "der": DER(),
    "derpp": DERpp(),
    "er_ace": ERACE(),
    "ewc": EWC(fisher="empirical", ewc_lambda=1e-3),
    "lwf": LwF(),
}


@dataclass(kw_only=True)
class RandomImages(ClassIncrementalImages):
    """Two experiences of five classes, nothing to learn.

    Attributes:
        count: Images of each class.
    """

    backbone: Backbone = field(default_factory=MLP)
    n_experiences: int = 2
    count: int = 1200

    def images(self, split: Split) -> Images:  # noqa: ARG002
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(10).repeat(self.count)
        shape = (len(targets), 1, 28, 28)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        source = TensorSource(pixels, targets)
        return Images(source, source, [str(i) for i in range(10)], (0.5,), (0.3,))


def prepared(strategy: Trainer, scenario: RandomImages, stream: Stream) -> Trainer:
    """A copy that has learned the first experience."""
    strategy = copy.deepcopy(strategy)
    torch.manual_seed(0)
    context = Context(
        device=torch.device("cpu"),
        seed=0,
        scenario=scenario,
        objective=scenario.objective(),
        transform=stream.transform,
        n_outputs=stream.n_outputs,
    )
    strategy.setup(scenario.model(0, stream), context)
    strategy.learn(stream.experiences[0])
    return strategy


def timed(strategy: Trainer, stream: Stream) -> tuple[float, float]:
    """CPU seconds of the loop, and of everything, in the second experience."""
    experience = stream.experiences[1]
    began = time.process_time()
    strategy.before(experience)
    material = strategy.material(experience)
    looped = time.process_time()
    strategy.fit(material)
    done = time.process_time()
    strategy.after(experience)
    return done - looped, time.process_time() - began


def compare(name: str, refreshed: Refresh, rounds: int) -> str:
    """One line: ratios of the median round, of the fastest and of the slowest."""
    scenario = RandomImages(memory_size=500)
    stream = scenario.stream(Split.EVALUATE, 0)
    pair = [prepared(s, scenario, stream) for s in (refreshed.base, refreshed)]
    base, steps, learn = [], [], []
    for index in range(rounds):
        order = (0, 1) if index % 2 else (1, 0)
        seconds = {which: timed(pair[which], stream) for which in order}
        base.append(seconds[0][0] / -(-5 * scenario.count // scenario.batch_size))
        steps.append(seconds[1][0] / seconds[0][0])
        learn.append(seconds[1][1] / seconds[0][1])
    told = [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in (steps, learn)]
    milliseconds = 1000 * statistics.median(base)
    return f"{name:9} base {milliseconds:5.2f} ms/step   steps {told[0]}   learn {told[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares the bases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default=",".join(BASES), help="some of these, by comma")
    parser.add_argument("--steps", type=int, default=1, help="unlearning steps for each step")
    parser.add_argument("--form", choices=("sde", "relative"), default="sde")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in asked.base.split(","):
        refreshed = Refresh(base=BASES[name], form=asked.form, unlearn_steps=asked.steps)
        print(compare(name, refreshed, asked.rounds), flush=True)


if __name__ == "__main__":
    main()
