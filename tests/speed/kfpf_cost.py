"""What k-FPF and FPF cost beside replay with as much memory. Not a test.

    python tests/speed/kfpf_cost.py [--backbone slim] [--enlarge 3] [--epochs 20] [--seeds 3]

All methods learn scikit-learn's digits, five experiences of two classes, from the same weights,
in turns in one process, the order reversed in every other round. Samples forward and backward are
counted by the suite's own counter; seconds are of the processor, for learning alone; a ratio
compares two runs of one round. "step" is what PyTorch counts of operations in a fine-tuning step,
forward and backward, beside a step on the whole model: where few modules are trained, gradients
of the others' weights are not formed, and no gradient goes further back than to the first that is.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from clbench.classification import Images
from clbench.finetuning import ModuleFinetuning, only
from clbench.machine import isolated_rng
from clbench.nn.backbones import MLP, SlimResNet18
from clbench.passes import BACKWARD, FORWARD, Passes
from clbench.samples import Source, TensorSource
from clbench.training import Trainer
from clbench.types import Context, Split
from scenarios.digits import Digits
from strategies.finetune import Finetune
from strategies.fpf import FPF
from strategies.kfpf import KFPF
from strategies.replay import Replay

METHODS: dict[str, Trainer] = {
    "finetune": Finetune(),
    "replay": Replay(),
    "replay_measured": FPF(base=Replay(), finetune_steps=0),
    "kfpf": KFPF(base=Finetune()),
    "kfpf_all": KFPF(base=Finetune(), modules="all"),
    "kfpf_kd": KFPF(base=Finetune(), distillation=0.2),
    "fpf_finetune": FPF(base=Finetune(), finetune_steps=60),
    "fpf_replay": FPF(base=Replay(), finetune_steps=60),
}


@dataclass(kw_only=True)
class LargeDigits(Digits):
    """Every pixel several times, so that convolutions have as much to do as on larger images.

    Attributes:
        times: In each direction.
    """

    times: int = 1

    def images(self, split: Split) -> Images:
        found = super().images(split)

        def enlarged(source: Source) -> TensorSource:
            everything = source.gather(torch.arange(len(source)))
            for dim in (2, 3):
                everything = everything.repeat_interleave(self.times, dim)
            return TensorSource(everything, source.targets)

        return replace(found, train=enlarged(found.train), test=enlarged(found.test))


@dataclass(frozen=True)
class Cost:
    """Of one method in one run."""

    seconds: float
    forward: int
    backward: int
    accuracy: float
    share: float | None
    step: float | None


def learned(method: Trainer, scenario: Digits, seed: int) -> Cost:
    """The whole stream; then the accuracy on all classes."""
    strategy = copy.deepcopy(method)
    with isolated_rng(seed, "speed"):
        stream = scenario.stream(Split.EVALUATE, seed)
        model = scenario.model(seed, stream).to(memory_format=torch.channels_last)
        context = Context(
            device=torch.device("cpu"),
            seed=seed,
            scenario=scenario,
            objective=scenario.objective(),
            transform=stream.transform,
            n_outputs=stream.n_outputs,
            stream_batches=stream.batches(scenario),
        )
        passes = Passes({FORWARD: 0, BACKWARD: 0})
        with passes.watch(model), passes.counting(True):
            strategy.setup(model, context)
            began = time.process_time()
            for experience in stream.experiences:
                strategy.learn(experience)
            seconds = time.process_time() - began
    with torch.inference_mode():
        scores = context.objective.score(strategy.predict, stream.tests, stream.experiences, 1000)
    accuracy = statistics.mean(scores["accuracy"])
    part = operations(strategy, context) if isinstance(strategy, ModuleFinetuning) else (None, None)
    return Cost(seconds, passes.costs[FORWARD], passes.costs[BACKWARD], accuracy, *part)


def operations(strategy: ModuleFinetuning, context: Context) -> tuple[float, float]:
    """Share of the numbers that a fine-tuning moves, and of a whole step's operations."""
    units = strategy.sensitivity.units
    chosen = [units[i] for i in strategy.chosen()]
    (batch,) = strategy.recalled(1)
    counts = []
    for some in (chosen, units):
        with only(strategy.model, some), FlopCounterMode(display=False) as counter:
            context.objective.loss(strategy.base.forward(batch.inputs), batch.targets).backward()
        counts.append(counter.get_total_flops())
    return sum(u.size for u in chosen) / sum(u.size for u in units), counts[0] / counts[1]


def row(name: str, rounds: Sequence[Cost], base: Sequence[Cost]) -> str:
    """A line of the table."""
    seconds = [mine.seconds / other.seconds for mine, other in zip(rounds, base, strict=True)]
    steps = [cost.step for cost in rounds if cost.step is not None]
    shares = [100 * cost.share for cost in rounds if cost.share is not None]
    cells = [
        name,
        f"{rounds[0].forward:,}",
        f"{rounds[0].backward:,}",
        f"{rounds[0].forward / base[0].forward:.2f}",
        f"{statistics.median(cost.seconds for cost in rounds):.2f}",
        f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
        f"{statistics.median(steps):.2f}" if steps else "-",
        f"{statistics.median(shares):.1f}" if shares else "-",
        f"{100 * statistics.mean(cost.accuracy for cost in rounds):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares all methods."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", choices=("mlp", "slim"), default="mlp")
    parser.add_argument("--enlarge", type=int, default=1, help="images of 8 times this")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of these, by comma")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="each is a round")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    backbone = MLP() if asked.backbone == "mlp" else SlimResNet18()
    scenario = LargeDigits(
        backbone=backbone, epochs=asked.epochs, memory_size=200, times=asked.enlarge
    )
    names = list(dict.fromkeys(["replay", *asked.methods.split(",")]))
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    learned(METHODS["finetune"], replace(scenario, epochs=1), 0)  # what a first time costs
    for seed in range(asked.seeds):
        for name in names[:: 1 if seed % 2 else -1]:
            costs[name].append(learned(METHODS[name], scenario, seed))
    titles = "method, forward, backward, x replay, CPU s, x replay, step, moved %, accuracy %"
    print("| " + " | ".join(titles.split(", ")) + " |")
    print("|" + "---|" * len(titles.split(", ")))
    for name, rounds in costs.items():
        print(row(name, rounds, costs["replay"]), flush=True)


if __name__ == "__main__":
    main()
