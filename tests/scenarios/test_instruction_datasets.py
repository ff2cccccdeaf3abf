"""Published layouts of instruction data, small ones made here and the real files where they are."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench import protocol
from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.testing import check_scenario
from clbench.text.decoders import Llama
from clbench.text.instructions import InstructionScenario, text_source
from clbench.types import Split
from scenarios.cl_benchmark import ORDERS, TASKS, CLBenchmark
from scenarios.jsonl import JSONLines
from scenarios.superni import SuperNI
from scenarios.trace import TASKS as TRACE_TASKS
from scenarios.trace import Trace
from strategies.finetune import Finetune

TINY = Llama(width=8, depth=1, heads=1, inner=8, context_length=400)
ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "cl-benchmark-text.tar.gz"
LABELS = ["neutral", "entailment"]


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    return path


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"sentence": f"{name} {i}\n", "label": LABELS[i % 2]} for i in range(count)]


def benchmark(root: Path, names: Sequence[str] = ORDERS[1], **options: Any) -> CLBenchmark:
    for name in names:
        folder = root / TASKS[name] / name
        dump(folder / "train.json", rows(f"{name} train", 60))
        dump(folder / "test.json", rows(f"{name} test", 6))
        dump(folder / "labels.json", LABELS)
    return CLBenchmark(language_model=TINY, root=root, **options)


def prompts(scenario: InstructionScenario, split: Split = Split.EVALUATE) -> Mapping[str, str]:
    """The first training prompt and answer of each experience."""
    stream = scenario.stream(split, 0)
    found = {}
    for experience in stream.experiences:
        source = text_source(experience.train)
        assert experience.train is not None
        row = source.inputs[experience.train.index[0]].tolist()
        found[experience.name] = source.tokenizer.decode([c for c in row if 0 <= c < 256])
    return found


def test_the_published_orders_are_of_the_fifteen_datasets() -> None:
    assert {len(set(order)) for order in ORDERS.values()} == {4, 15}
    for order in ORDERS.values():
        assert set(order) <= TASKS.keys()
    assert set(ORDERS[4]) == set(ORDERS[5]) == set(ORDERS[6]) == TASKS.keys()


def test_a_prompt_has_names_instruction_options_text_and_cue(tmp_path: Path) -> None:
    text = prompts(benchmark(tmp_path))["agnews"]
    assert text.startswith("Task:TC\nDataset:agnews\nWhat is the topic of this text?")
    shown = r"\nOption: neutral, entailment\nagnews train (\d+)\nAnswer: (neutral|entailment)$"
    found = re.search(shown, text)
    assert found
    assert LABELS[int(found[1]) % 2] == found[2]
    plain = prompts(benchmark(tmp_path, name_task=False))["agnews"]
    assert plain.startswith("What is the topic")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_published_orders_hold_for_every_seed(tmp_path: Path, number: int) -> None:
    scenario = benchmark(tmp_path, published_order=number)
    for seed in (0, 1):
        names = [e.name for e in scenario.stream(Split.EVALUATE, seed).experiences]
        assert names == list(ORDERS[number])


def test_datasets_that_an_order_leaves_are_for_tuning(tmp_path: Path) -> None:
    scenario = benchmark(tmp_path, (*ORDERS[1], "RTE", "CB", "QQP", "WiC"))
    tuned = scenario.stream(Split.TUNE, 0)
    assert [e.name for e in tuned.experiences] == ["CB", "WiC", "QQP", "RTE"]
    assert tuned.facts["division"] == "disjoint tasks"
    shared = benchmark(tmp_path, published_order=0)
    for split, sizes in ((Split.EVALUATE, {48}), (Split.TUNE, {10})):
        stream = shared.stream(split, 0)
        assert {len(e.train or ()) for e in stream.experiences} == sizes
        assert stream.facts["division"] == "disjoint examples"


def test_the_benchmark_is_sound(tmp_path: Path) -> None:
    check_scenario(benchmark(tmp_path, ("RTE", "CB", "QQP"), published_order=0))


def test_missing_datasets_are_refused_or_left_out(tmp_path: Path) -> None:
    names = ("dbpedia", "amazon", "agnews")
    with pytest.raises(UserError, match=r"lacks yahoo of this order; there are amazon, dbpedia"):
        benchmark(tmp_path, names).check(Split.EVALUATE)
    scenario = benchmark(tmp_path, names, missing="skip")
    scenario.check(Split.EVALUATE)
    stream = scenario.stream(Split.EVALUATE, 0)
    assert [e.name for e in stream.experiences] == list(names)
    assert stream.facts["skipped"] == ["yahoo"]
    with pytest.raises(UserError, match=r"there is no <Task>/<Dataset>/train.json"):
        CLBenchmark(language_model=TINY, root=tmp_path / "nowhere").check(Split.EVALUATE)


def test_datasets_can_be_taught_before_the_stream(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    names = ("RTE", "CB", "QQP", "WiC")
    options: dict[str, Any] = {"published_order": 0, "base_epochs": 1, "cache_dir": cache}
    scenario = benchmark(root, names, taught=("RTE", "WiC"), **options)
    streams = {split: scenario.stream(split, 0) for split in Split}
    kept = {}
    for split, stream in streams.items():
        assert sorted(e.name for e in stream.experiences) == ["CB", "QQP"]
        assert stream.source is not None
        assert stream.source_test is not None
        assert len(stream.source) == 120
        source = text_source(stream.source_test)
        kept[split] = {source.examples[i].input for i in stream.source_test.index.tolist()}
        assert all(text.startswith(("RTE test", "WiC test")) for text in kept[split])
    assert not kept[Split.TUNE] & kept[Split.EVALUATE]
    one, other = (scenario.model(seed, streams[Split.EVALUATE]) for seed in (0, 1))
    untaught = replace(scenario, base_epochs=0).model(0, streams[Split.EVALUATE])
    pairs = list(zip(one.parameters(), other.parameters(), untaught.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q, _ in pairs)
    assert not all(torch.equal(p, r) for p, _, r in pairs)
    result = protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1))
    assert result.metrics["general_change"] is not None
    with pytest.raises(UserError, match=r"taught: there is no dataset 'CBB'. Did you mean 'CB'"):
        benchmark(root, names, taught=("CBB",), **options).check(Split.EVALUATE)
    with pytest.raises(UserError, match="taught: CB comes in the stream too"):
        benchmark(root, names, taught=("CB",), order=("CB",), **options).check(Split.EVALUATE)


def test_a_dataset_with_one_file_is_divided(tmp_path: Path) -> None:
    scenario = benchmark(tmp_path, ("RTE", "CB"), published_order=0)
    (tmp_path / "NLI" / "RTE" / "train.json").unlink()
    dump(tmp_path / "NLI" / "RTE" / "test.json", rows("RTE test", 50))
    stream = scenario.stream(Split.EVALUATE, 0)
    sizes = {
        e.name: (len(e.train or ()), len(test))
        for e, test in zip(stream.experiences, stream.tests, strict=True)
    }
    assert sizes == {"RTE": (32, 10), "CB": (48, 6)}
    assert stream.facts["divided_files"] == {"RTE": "test.json"}


def test_examples_without_a_label_are_counted_and_others_refused(tmp_path: Path) -> None:
    scenario = benchmark(tmp_path)
    path = tmp_path / "TC" / "agnews" / "train.json"
    dump(path, [*rows("x", 40), {"sentence": "nobody knows", "label": "-"}])
    stream = scenario.stream(Split.EVALUATE, 0)
    assert stream.facts["without_label"] == {"agnews": 1}
    before = scenario.fingerprint()
    dump(path, [*rows("x", 4), {"sentence": "s", "label": "sports"}])
    assert scenario.fingerprint() != before
    with pytest.raises(
        UserError, match=r"agnews/train.json, line 18: field 'label' is 'sports', which labels"
    ):
        scenario.stream(Split.EVALUATE, 0)
    dump(path, [*rows("x", 4), {"label": "neutral"}])
    with pytest.raises(UserError, match=r"train.json, line 18: field 'sentence' is missing"):
        scenario.stream(Split.EVALUATE, 0)


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE.name} is not beside the checkout")
def test_the_published_files(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = {path.parents[2] for path in tmp_path.rglob("labels.json")}
    scenario = CLBenchmark(
        language_model=TINY,
        root=root,
        published_order=4,
        missing="skip",
        train_samples=20,
        test_samples=10,
    )
    stream = scenario.stream(Split.EVALUATE, 0)
    assert [e.name for e in stream.experiences] == [
        *("MNLI", "QQP", "RTE", "IMDB", "yelp", "amazon", "SST-2", "dbpedia", "agnews")
    ]
    assert stream.facts["without_label"] == {"MNLI": 131}
    assert stream.facts["divided_files"] == {
        "IMDB": "train.json",
        "yelp": "train.json",
        "dbpedia": "test.json",
    }
    assert len(text_source(stream.tests[-1]).tasks[-1].labels) == 4


def trace(root: Path, **options: Any) -> Trace:
    for name, _, _ in TRACE_TASKS:
        for part, count in (("train", 60), ("test", 5)):
            content = [
                {"prompt": f"{part} {name} {i}", "answer": "AB"[i % 2]} for i in range(count)
            ]
            dump(root / name / f"{part}.json", content)
    return Trace(language_model=TINY, root=root, **options)


def test_trace_has_its_order_passes_and_scores(tmp_path: Path) -> None:
    scenario = trace(tmp_path)
    scenario.check(Split.EVALUATE)
    stream = scenario.stream(Split.EVALUATE, 3)
    assert [e.name for e in stream.experiences] == [name for name, _, _ in TRACE_TASKS]
    visits = [len(e.train or ()) for e in stream.experiences]
    assert visits == [48 * passes for passes in (5, 3, 7, 5, 3, 5, 5, 7)]
    tasks = text_source(stream.tests[0]).tasks
    assert [task.score for task in tasks[:4]] == [
        *("strict_match", "strict_match", "rouge_l", "edit_similarity")
    ]
    assert tasks[0].labels == ("A", "B")
    assert tasks[2].labels == ()
    train = stream.experiences[1].train
    assert train is not None
    assert sorted(train.index.bincount()[train.index.unique()].unique().tolist()) == [3]
    assert prompts(scenario)["FOMC"].startswith("train FOMC")
    once = trace(tmp_path, published_passes=False).stream(Split.EVALUATE, 0)
    assert [len(e.train or ()) for e in once.experiences] == [48] * 8


def test_trace_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scenario.root=.* is no folder"):
        Trace(language_model=TINY).check(Split.EVALUATE)
    scenario = trace(tmp_path)
    (tmp_path / "Py150" / "test.json").unlink()
    with pytest.raises(UserError, match=r"There is no file .*Py150/test.json"):
        scenario.check(Split.EVALUATE)
    path = dump(tmp_path / "Py150" / "test.json", [{"prompt": "x", "answer": "y"}, {"prompt": 3}])
    with pytest.raises(UserError, match=rf"{path.name}, line 6: field 'prompt' is a number"):
        scenario.stream(Split.EVALUATE, 0)


def superni(root: Path, count: int = 60, **options: Any) -> SuperNI:
    for name in ("task1_add", "task2_say", "task3_rest"):
        instances = [
            {"id": str(i), "input": f"{name} {i}", "output": [f"{i}", f"number {i}"]}
            for i in range(count)
        ]
        example = {"input": "1 2", "output": "3", "explanation": "a sum"}
        dump(
            root / f"{name}.json",
            {
                "Definition": [f"Do {name}."],
                "Positive Examples": [example] * 3,
                "Negative Examples": [],
                "Instances": instances,
            },
        )
    return SuperNI(
        language_model=TINY,
        root=root,
        template="{instruction}\nInput: {input}\nOutput:",
        **options,
    )


def test_natural_instructions_show_definition_and_examples(tmp_path: Path) -> None:
    scenario = superni(tmp_path, tasks=("task2_say", "task1_add"))
    scenario.check(Split.EVALUATE)
    stream = scenario.stream(Split.EVALUATE, 0)
    assert [e.name for e in stream.experiences] == ["task2_say", "task1_add"]
    assert [
        (len(e.train or ()), len(t)) for e, t in zip(stream.experiences, stream.tests, strict=True)
    ] == [(38, 12)] * 2
    text = prompts(scenario)["task1_add"]
    assert text.startswith("Definition: Do task1_add.\nPositive Example 1-\nInput: 1 2\nOutput: 3")
    assert "Positive Example 2-" in text
    assert "Positive Example 3-" not in text
    assert "Now complete the following example-\nInput: task1_add" in text
    source = text_source(stream.tests[0])
    assert source.tasks[0].score == "rouge_l"
    assert all(len(example.outputs) == 2 for example in source.examples)


def test_natural_instructions_divide_by_task_where_they_can(tmp_path: Path) -> None:
    scenario = superni(tmp_path, experiences=1)
    names = {split: [e.name for e in scenario.stream(split, 0).experiences] for split in Split}
    assert names[Split.TUNE] != names[Split.EVALUATE]
    check_scenario(superni(tmp_path))


def test_natural_instructions_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file task2.json. Did you mean 'task2_say'"):
        superni(tmp_path, tasks=("task2",)).check(Split.EVALUATE)
    dump(tmp_path / "task4.json", {"Definition": "x", "Instances": [{"input": "a", "output": []}]})
    scenario = superni(tmp_path, tasks=("task4",))
    with pytest.raises(UserError, match=r"task4.json, line 4: field 'output' is an empty list"):
        scenario.stream(Split.EVALUATE, 0)


def lines(path: Path, name: str, count: int = 60, **more: str) -> Path:
    content = [
        {"instruction": name, "input": str(i), "output": "xy"[i % 2], **more} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_every_file_is_an_experience(tmp_path: Path) -> None:
    for name in ("one", "two"):
        lines(tmp_path / f"{name}.jsonl", name)
    scenario = JSONLines(language_model=TINY, paths=(str(tmp_path / "*.jsonl"),), keep_order=True)
    scenario.check(Split.EVALUATE)
    stream = scenario.stream(Split.EVALUATE, 0)
    assert [e.name for e in stream.experiences] == ["one", "two"]
    assert prompts(scenario)["two"].startswith("two\n")
    assert text_source(stream.tests[0]).tasks[0].labels == ("x", "y")
    for name in ("three", "four"):
        lines(tmp_path / f"{name}.jsonl", name)
    check_scenario(JSONLines(language_model=TINY, paths=scenario.paths))


def test_a_field_can_tell_experiences_apart(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    dump(
        path,
        [{"ask": "q", "text": f"{i}", "say": ["a", "b"], "task": "uvw"[i % 3]} for i in range(90)],
    )
    scenario = JSONLines(
        language_model=TINY, paths=(str(path),), by="task", fields=("ask", "text", "say")
    )
    names = {e.name for e in scenario.stream(Split.EVALUATE, 0).experiences}
    assert names == {"u", "v", "w"}


def test_what_is_to_be_kept_is_measured_after_every_experience(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    scenario = JSONLines(
        language_model=TINY,
        paths=(str(lines(tmp_path / "one.jsonl", "one")), str(lines(tmp_path / "b.jsonl", "b"))),
        general=lines(tmp_path / "general.json", "keep", 12).rename(tmp_path / "general.jsonl"),
    )
    stream = scenario.stream(Split.EVALUATE, 0)
    assert stream.source is None
    assert stream.source_test is not None
    assert len(stream.source_test) == 12
    result = protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1))
    assert len(result.general["after"]["accuracy"]) == 2
    fingerprint = scenario.fingerprint()
    lines(tmp_path / "general.jsonl", "other", 12)
    assert scenario.fingerprint() != fingerprint


def test_json_lines_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scenario.paths names no file that is there"):
        JSONLines(language_model=TINY).check(Split.EVALUATE)
    with pytest.raises(UserError, match=r"There is no file .*absent.jsonl"):
        JSONLines(language_model=TINY, paths=(str(tmp_path / "absent.jsonl"),)).check(Split.TUNE)
    path = lines(tmp_path / "a.jsonl", "a")
    with path.open("a") as file:
        file.write('{"instruction": "x", "input": 3, "output": "y"}\n')
    scenario = JSONLines(language_model=TINY, paths=(str(path),))
    with pytest.raises(UserError, match=r"a.jsonl, line 61: field 'input' is a number, not text"):
        scenario.stream(Split.EVALUATE, 0)
    few = JSONLines(language_model=TINY, paths=(str(lines(tmp_path / "f.jsonl", "f", 1)),))
    with pytest.raises(UserError, match=r"experience 'f' has 1 examples, too few"):
        few.stream(Split.EVALUATE, 0)


def test_text_of_any_script(tmp_path: Path) -> None:
    """A task of nothing but other scripts, and one whose answers are empty."""
    pytest.importorskip("transformers", reason="the extra `text` is not installed")
    content = [{"instruction": "猫", "input": "ж" * (i + 1), "output": "🐈"} for i in range(20)]
    silent = [{"instruction": "hush", "input": str(i), "output": ""} for i in range(20)]
    paths = (str(dump(tmp_path / "a.json", content)), str(dump(tmp_path / "b.json", silent)))
    scenario = JSONLines(language_model=TINY, paths=paths, test_fraction=0.3)
    result = protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1))
    assert result.status == "complete"
    learned = JSONLines(language_model=TINY, paths=paths[1:], epochs=10)
    result = protocol.run(learned, Finetune(), Conditions(device="cpu", threads=1))
    assert result.accuracy_matrix == [[1.0]], "nothing but the end token is easily learned"


def test_a_prompt_longer_than_the_context_is_counted(tmp_path: Path) -> None:
    content = [{"instruction": "x", "input": "y" * 500, "output": "z"}] * 3
    content += [{"instruction": "x", "input": f"{i}", "output": "z"} for i in range(20)]
    path = dump(tmp_path / "a.json", content)
    stream = JSONLines(language_model=TINY, paths=(str(path),), tuning_fraction=0).stream(
        Split.EVALUATE, 0
    )
    cut = stream.facts["train"]["cut_prompts"] + stream.facts["test"]["cut_prompts"]
    assert cut == 3
    train = stream.experiences[0].train
    assert train is not None
    assert int(text_source(train).lengths.max()) <= TINY.context
    assert torch.equal(train.targets[0, :2], torch.tensor([32, ord("z")]))
