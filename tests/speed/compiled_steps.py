"""Training steps with and without PyTorch's compiler (compile=true). Not a test.

    python tests/speed/compiled_steps.py [--models mlp,slim] [--methods replay,derpp] [--threads 1]

Two copies of a method that has learned one experience of random images go on to learn another, in
turns, in one process, the order reversed in every other round: one as it is, one compiled. A ratio
compares the CPU seconds of two runs of one round. Kernels are made anew, in a folder of their own;
that takes what the last column says, on the clock, before the first round.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from refresh_steps import RandomImages, prepared
from turns import compare, ratio

from clbench import compiling
from clbench.nn.backbones import MLP, Backbone, ConvNet, SlimResNet18
from clbench.training import Trainer
from clbench.types import Split, Stream
from strategies.derpp import DERpp
from strategies.finetune import Finetune
from strategies.lwf import LwF
from strategies.replay import Replay

MODELS: Mapping[str, Callable[[], Backbone]] = {
    "mlp": MLP,
    "convnet": ConvNet,
    "slim": SlimResNet18,
}
METHODS: Mapping[str, Callable[[], Trainer]] = {
    "finetune": Finetune,
    "replay": Replay,
    "derpp": DERpp,
    "lwf": LwF,
}


def learn(strategy: Trainer, stream: Stream) -> None:
    """One epoch over the second experience."""
    experience = stream.experiences[1]
    strategy.before(experience)
    strategy.fit(strategy.material(experience))


def measure(model: str, method: str, steps: int, rounds: int) -> str:
    """A row of the table."""
    scenario = RandomImages(backbone=MODELS[model](), memory_size=500)
    scenario.count = -(-steps * scenario.batch_size // 5)
    stream = scenario.stream(Split.EVALUATE, 0)
    plain = prepared(METHODS[method](), scenario, stream)
    plain.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in a run
    fast = copy.deepcopy(plain)
    spent: list[float] = []
    with compiling.compiled(fast.model, compiling.batch_sizes(scenario), spent.append):
        contenders = {"plain": plain, "compiled": fast}
        found = compare({n: partial(learn, s, stream) for n, s in contenders.items()}, rounds)
    each = [1000 * statistics.median(seconds) / steps for seconds in found.values()]
    cells = f"{each[0]:.2f} | {each[1]:.2f} | {ratio(found['compiled'], found['plain'])}"
    return f"| {model} | {method} | {cells} | {sum(spent):.1f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="mlp,slim", help="some, by comma")
    parser.add_argument("--methods", default="replay,derpp", help="some, by comma")
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    print("| model | method | plain, CPU ms/step | compiled | x plain | compiling [s] |")
    print("|---" * 6 + "|")
    for model in asked.models.split(","):
        for method in asked.methods.split(","):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
                print(measure(model, method, asked.steps, asked.rounds), flush=True)


if __name__ == "__main__":
    main()
