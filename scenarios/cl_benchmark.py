"""The continual-learning benchmark of 15 text-classification datasets, as O-LoRA publishes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clbench.errors import UserError, did_you_mean
from clbench.text.encoding import Example, Task
from clbench.text.instruction_files import Item, read_items, read_labels, sha256
from clbench.text.instructions import Instructions, Part
from clbench.text.parting import part_examples, parted
from clbench.text.taught import TaughtInstructions
from clbench.types import LOCATION, Split, require

#: Folder of each dataset: the task that it is an example of.
TASKS: Mapping[str, str] = {
    **dict.fromkeys(("MNLI", "CB", "RTE"), "NLI"),
    **dict.fromkeys(("yelp", "amazon", "IMDB", "SST-2"), "SC"),
    **dict.fromkeys(("dbpedia", "agnews", "yahoo"), "TC"),
    **{name: name for name in ("WiC", "COPA", "QQP", "BoolQA", "MultiRC")},
}
#: In what words each task is asked for; ours, the same for all methods.
INSTRUCTIONS: Mapping[str, str] = {
    "NLI": "How does the second sentence relate to the first one? Choose one of the options.",
    "QQP": "Do both sentences mean the same? Choose one of the options.",
    "SC": "What is the sentiment of this text? Choose one of the options.",
    "TC": "What is the topic of this text? Choose one of the options.",
    "BoolQA": "Is the answer to the question true or false, by the passage? Choose one of the "
    "options.",
    "MultiRC": "Is the candidate answer true or false, by the passage and the question? Choose one "
    "of the options.",
    "WiC": "Does the word have the same sense in both sentences? Choose one of the options.",
    "COPA": "",
}
_LONG = (
    *("MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB", "yelp", "amazon", "SST-2"),
    *("dbpedia", "agnews", "MultiRC", "yahoo"),
)
#: The six published orders, by number.
ORDERS: Mapping[int, tuple[str, ...]] = {
    1: ("dbpedia", "amazon", "yahoo", "agnews"),
    2: ("dbpedia", "amazon", "agnews", "yahoo"),
    3: ("yahoo", "amazon", "agnews", "dbpedia"),
    4: _LONG,
    5: (
        *("MultiRC", "BoolQA", "WiC", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2"),
        *("dbpedia", "agnews", "yelp", "amazon", "yahoo"),
    ),
    6: (
        *("yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2", "dbpedia"),
        *("agnews", "yahoo", "MultiRC", "BoolQA", "WiC"),
    ),
}
#: Of a dataset without test.json, or without train.json, the part that becomes the test.
TEST_FRACTION = 0.2
#: What stands in the place of a label where nobody agreed on one.
NO_LABEL = "-"


@dataclass(kw_only=True)
class CLBenchmark(TaughtInstructions):
    """Fifteen datasets of text classification, one after another in a published order.

    A prompt is "Task:<task>", "Dataset:<name>", an instruction, "Option: " and the labels, the
    text, "Answer:". An answer is scored by exact match, in lower case and without punctuation.

    Source: github.com/cmnfriend/O-LoRA, folder CL_Benchmark (Wang et al. 2023, arXiv 2310.14152;
    the datasets of Zhang et al. 2015, GLUE, SuperGLUE and IMDB).
    Licence: each dataset has its own; see its makers.
    Sizes: 250 (CB) to 14000 (dbpedia) examples to learn from, 56 to 7600 to be scored on; dev.json
    is the same as test.json and not read.
    Splits: TUNE has the first of the datasets that the order leaves, if there are as many; else a
    part of each one's training examples.

    Attributes:
        root: Folder with <Task>/<Dataset>/{train,test,labels}.json.
        published_order: 1 to 6: of the datasets; 1 to 3 have four, 4 to 6 all fifteen. 0: all that
            are there, drawn from the seed.
        missing: What is done about datasets of the order that are not there: "refuse", or "skip".
        taught: Datasets, none of the order's, that the model is taught before the stream, all of
            it, once for all runs; measured after every experience. For a model that starts from
            random weights; `train_samples` and `test_samples` hold for each of them too.
        name_task: Begin the prompt with the names of task and dataset, as published.
        tuning_fraction: Part of each dataset's training examples that TUNE gets, if it gets no
            datasets of its own; 0: none.

    Order 4 of SAPT is order 6 here, its 5 is 4. A dataset without a training or without a test
    file is divided, four fifths to learn from; `scenario_facts` says which. So it does how many
    examples were left out because nobody agreed on their label ("-").
    """

    root: Path | None = field(default=None, metadata=LOCATION)
    published_order: int = 1
    missing: Literal["refuse", "skip"] = "refuse"
    taught: tuple[str, ...] = ()
    name_task: bool = True
    tuning_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "published_order", at_least=0, at_most=6)
        require(self, "tuning_fraction", at_least=0, at_most=0.9)

    def check(self, split: Split) -> None:
        self._chosen(split)

    def fingerprint(self) -> Mapping[str, Any]:
        files = [path for name in sorted(TASKS) for path in self._files(name)]
        return {"files": sha256(files)}

    def instructions(self, split: Split) -> Instructions:
        names, own = self._chosen(split)
        facts: dict[str, Any] = {"divided_files": {}, "without_label": {}}
        parts = [self._part(name, facts) for name in names]
        if not own:
            parts = [part_examples(part, split, self.tuning_fraction) for part in parts]
        base = [self._base(name, split, facts) for name in self.taught]
        facts["division"] = "disjoint tasks" if own else "disjoint examples"
        facts["skipped"] = [name for name in self._wanted() if name not in self._there()]
        return Instructions(parts, base, ordered=self.published_order > 0, facts=facts)

    def _base(self, name: str, split: Split, facts: dict[str, Any]) -> Part:
        """A dataset that is taught; both splits have it, and test on different examples."""
        part = self._limited(self._part(name, facts))
        rest, tuning = parted(part.test, self.tuning_fraction, f"base {name}")
        return replace(part, test=rest if split is Split.EVALUATE or not tuning else tuning)

    def _wanted(self) -> tuple[str, ...]:
        return self.order or ORDERS.get(self.published_order, ())

    def _chosen(self, split: Split) -> tuple[list[str], bool]:
        """Datasets of a split, and whether the splits have none in common.

        Raises:
            UserError: If datasets are not there.
        """
        there = self._there()
        if not there:
            raise UserError(
                f"scenario.root={self.root}: there is no <Task>/<Dataset>/train.json. Name the "
                "folder CL_Benchmark of github.com/cmnfriend/O-LoRA."
            )
        wanted = self._wanted() or tuple(name for name in there if name not in self.taught)
        self._check_taught(there, wanted)
        absent = [name for name in wanted if name not in there]
        if absent and self.missing == "refuse":
            raise UserError(
                f"scenario.root={self.root} lacks {', '.join(absent)} of this order; there are "
                f"{', '.join(there)}. Set scenario.missing=skip to go without, or choose another "
                "scenario.published_order or scenario.order."
            )
        mine = [name for name in wanted if name in there]
        others = [name for name in there if name not in (*mine, *self.taught)]
        own = bool(mine) and len(others) >= len(mine)
        if split is Split.TUNE and own:
            mine = others[: len(mine)]
        if not mine or (split is Split.TUNE and not own and not self.tuning_fraction):
            raise UserError(
                "Nothing is left for this split: set scenario.tuning_fraction=0.2, or choose "
                "another scenario.published_order."
            )
        return mine, own

    def _check_taught(self, there: Sequence[str], wanted: Sequence[str]) -> None:
        for name in self.taught:
            if name not in there:
                raise UserError(
                    f"scenario.taught: there is no dataset {name!r}. {did_you_mean(name, there)}"
                )
            if name in wanted:
                raise UserError(
                    f"scenario.taught: {name} comes in the stream too. Leave it out of one."
                )

    def _there(self) -> list[str]:
        """Datasets of which a training or a test file is there."""
        return [name for name in _LONG if any(path.is_file() for path in self._files(name)[:2])]

    def _ordered(self, found: Instructions, seed: int) -> list[Part]:
        # Datasets for tuning have an order of their own.
        names = {part.task.name for part in found.parts}
        if self.order and names <= set(self.order):
            return sorted(found.parts, key=lambda part: self.order.index(part.task.name))
        if self.order or found.ordered:
            return list(found.parts)
        return super()._ordered(found, seed)

    def _files(self, name: str) -> list[Path]:
        folder = (self.root or Path()) / TASKS[name] / name
        return [folder / f"{part}.json" for part in ("train", "test", "labels")]

    def _part(self, name: str, facts: dict[str, Any]) -> Part:
        train_file, test_file, labels_file = self._files(name)
        labels = read_labels(labels_file)
        read = {
            path: self._examples(path, name, labels, facts)
            for path in (train_file, test_file)
            if path.is_file()
        }
        if len(read) == 2:
            train, test = read[train_file], read[test_file]
        else:
            (only,) = read
            train, test = parted(read[only], TEST_FRACTION, f"test {name}")
            facts["divided_files"][name] = only.name
        return Part(Task(name, labels=labels), train, test)

    def _examples(
        self, path: Path, name: str, labels: Sequence[str], facts: dict[str, Any]
    ) -> list[Example]:
        items = read_items(path)
        told = [item for item in items if item.text("label") != NO_LABEL]
        if len(told) < len(items):
            counts = facts["without_label"]
            counts[name] = counts.get(name, 0) + len(items) - len(told)
        return [self._example(item, name, labels) for item in told]

    def _example(self, item: Item, name: str, labels: Sequence[str]) -> Example:
        label = item.text("label")
        if label not in labels:
            raise item.wrong("label", f"is {label!r}, which labels.json does not list")
        task = TASKS[name]
        lines = [f"Task:{task}", f"Dataset:{name}"] if self.name_task else []
        if INSTRUCTIONS[task]:
            lines += [INSTRUCTIONS[task], f"Option: {', '.join(labels)}"]
        return Example("\n".join(lines), item.text("sentence").strip("\n"), (label,))
