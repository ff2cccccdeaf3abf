"""What instruction tuning costs beside loops written by hand. Not a test.

    python tests/speed/instructions.py [--rounds 5] [--per-task 400] [--whole] [--folder FOLDER]

`string_instructions`, one task for two epochs, the Llama of `llama_tiny` with random weights. The
loops by hand have the same model, the same rows in the same batches, as many steps: ids in lists,
padded to the longest of a batch, a mask, labels of -100 before the answer, the loss and the
`generate` of the transformers library. Contenders take turns in one process, in reverse order in
every other round; a ratio compares the CPU seconds of two runs of one round. `--whole` runs the
default scenario once and compares evaluation with training; `--folder` is that of CL_Benchmark's
files, for its padding.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import Pass, compare, show

from clbench import protocol
from clbench.conditions import Conditions
from clbench.machine import isolated_rng
from clbench.samples import Samples
from clbench.text.answering import padding_share
from clbench.text.encoding import ANSWER, IGNORED, PADDING
from clbench.text.instructions import text_source
from clbench.text.language_model import LanguageModel
from clbench.types import Context, Scenario, Split, Stream
from strategies.finetune import Finetune

sys.path.insert(0, str(Path(__file__).parents[1]))
from suite import composed

from clbench.config import build

LR, EPOCHS = 0.1, 2


def scenario(*overrides: str) -> Any:
    return build(composed(*overrides)["scenario"], Scenario, "scenario")


class Job:
    """One task, and a model to learn it."""

    def __init__(self, per_task: int) -> None:
        self.scenario = scenario(
            "scenario=string_instructions",
            "scenario.base_epochs=0",
            "scenario.order=[reverse]",
            f"scenario.per_task={per_task}",
            f"scenario.epochs={EPOCHS}",
        )
        self.stream: Stream = self.scenario.stream(Split.EVALUATE, 0)
        self.experience = self.stream.experiences[0]
        with isolated_rng(0, "speed"):
            model = self.scenario.model(0, self.stream)
        assert isinstance(model, LanguageModel)
        self.start = model

    @property
    def train(self) -> Samples:
        assert self.experience.train is not None
        return self.experience.train

    def context(self) -> Context:
        return Context(
            device=torch.device("cpu"),
            seed=0,
            scenario=self.scenario,
            objective=self.scenario.objective(),
            transform=self.stream.transform,
            n_outputs=self.stream.n_outputs,
        )

    def suite(self) -> Pass:
        def run() -> Callable[[], float]:
            strategy, model = Finetune(lr=LR), copy.deepcopy(self.start)
            strategy.setup(model, self.context())
            strategy.learn(self.experience)
            return lambda: self.token_accuracy(model.decoder)

        return run

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """Prompts and answers."""
        return [_split(row) for row in text_source(self.train).inputs[self.train.index].tolist()]

    @torch.no_grad()
    def token_accuracy(self, model: Any) -> float:
        """Of the tokens of answers, each after the true ones before it."""
        ids, mask, labels = _collated(self.rows)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        asked = labels[:, 1:] != IGNORED
        return float((logits.argmax(-1) == labels[:, 1:])[asked].float().mean())

    def by_hand(self, grouped: bool) -> Pass:
        """With the suite's batches, or with random ones, as a shuffled DataLoader has them."""
        rows, size = self.rows, self.scenario.batch_size

        def run() -> Callable[[], float]:
            model: Any = copy.deepcopy(self.start).decoder.train()
            optimizer = torch.optim.SGD(model.parameters(), LR)
            generator = self.context().generator("shuffle")
            for _ in range(EPOCHS):
                order = (
                    self.train.shuffled(size, generator)
                    if grouped
                    else torch.randperm(len(rows), generator=generator)
                )
                for some in order.split(size):
                    ids, mask, labels = _collated([rows[i] for i in some.tolist()])
                    loss = model(
                        input_ids=ids, attention_mask=mask, labels=labels, use_cache=False
                    ).loss
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            return lambda: self.token_accuracy(model.eval())

        return run

    def suite_answers(self) -> Pass:
        strategy, objective = Finetune(), self.scenario.objective()
        strategy.setup(self.start, self.context())

        @torch.inference_mode()
        def run() -> None:
            objective.score(strategy.predict, [self.train], [self.experience], 1000)

        return run

    def generated(self) -> Pass:
        """By `generate`, in batches of neighbours in length; texts are made, nothing is scored."""
        source, length = text_source(self.train), self.start.answer_length
        rows = sorted((prompt for prompt, _ in self.rows), key=len)
        model: Any = self.start.eval().decoder
        end = source.tokenizer.end

        @torch.inference_mode()
        def run() -> None:
            for start in range(0, len(rows), 1000):
                some = rows[start : start + 1000]
                width = max(map(len, some))
                ids = torch.tensor([[end] * (width - len(r)) + r for r in some])
                mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in some])
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=length,
                    do_sample=False,
                    eos_token_id=end,
                    pad_token_id=end,
                )
                for row in out[:, width:].tolist():
                    source.tokenizer.decode([i for i in row if i != end])

        return run


def _split(row: Sequence[int]) -> tuple[list[int], list[int]]:
    """Prompt and answer of a row of codes."""
    at = row.index(ANSWER)
    return list(row[:at]), [code for code in row[at + 1 :] if code != PADDING]


def _collated(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(p) + len(a) for p, a in rows)
    rest = [width - len(p) - len(a) for p, a in rows]
    ids = [p + a + [0] * n for (p, a), n in zip(rows, rest, strict=True)]
    mask = [[1] * (len(p) + len(a)) + [0] * n for (p, a), n in zip(rows, rest, strict=True)]
    labels = [[IGNORED] * len(p) + a + [IGNORED] * n for (p, a), n in zip(rows, rest, strict=True)]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def padding(name: str, *overrides: str) -> None:
    """The part of the tokens of a pass that is padding: as grouped, and in random batches."""
    made = scenario(f"scenario={name}", *overrides)
    stream = made.stream(Split.EVALUATE, 0)
    waste = computed = 0.0
    for experience in stream.experiences:
        assert experience.train is not None
        lengths = text_source(experience.train).lengths[experience.train.index]
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
        share = padding_share(lengths, order, made.batch_size)
        whole = int(lengths.sum()) / (1 - share)
        waste, computed = waste + share * whole, computed + whole
    title = f"{name} {overrides[-1] if overrides else ''}"
    print(f"| {title} | {stream.facts['padding_share']:.1%} | {waste / computed:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-task", type=int, default=400)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    job = Job(chosen.per_task)
    steps = {
        "clbench": job.suite(),
        "by hand": job.by_hand(grouped=True),
        "by hand, random batches": job.by_hand(grouped=False),
    }
    show("training", compare(steps, chosen.rounds), "by hand", EPOCHS * chosen.per_task)
    answers = {"clbench": job.suite_answers(), "by hand, generate": job.generated()}
    found = compare(answers, chosen.rounds)
    show("answering and scoring", found, "by hand, generate", chosen.per_task)
    print("\n| padding | in batches of neighbours | in random ones |\n|---|---|---|")
    padding("string_instructions")
    if chosen.folder:
        more = [f"scenario.root={chosen.folder}", "scenario.missing=skip"]
        padding("cl_benchmark", *more)
        padding("cl_benchmark", *more, "language_model.context_length=1024")
    if chosen.whole:
        conditions = Conditions(device="cpu", threads=1)
        costs = protocol.run(scenario("scenario=string_instructions"), Finetune(), conditions).costs
        train, evaluate = costs["train_seconds"], costs["evaluate_seconds"]
        share = evaluate / train
        print(f"\n{train:.1f} s training, {evaluate:.1f} s evaluation: {share:.2f} x")


if __name__ == "__main__":
    main()
