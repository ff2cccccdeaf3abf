"""Streams of instruction tasks: what is in them, what is taught first, what a run leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from suite import composed

from clbench import protocol, source_model
from clbench.conditions import Conditions
from clbench.config import build
from clbench.errors import UserError
from clbench.testing import check_scenario
from clbench.text import string_tasks
from clbench.text.decoders import Llama
from clbench.text.instructions import text_source
from clbench.text.language_model import LanguageModel
from clbench.types import Scenario, Split
from scenarios.instruction_tuning import StringInstructions
from strategies.finetune import Finetune

pytest.importorskip("transformers", reason="the extra `text` is not installed")

TINY = Llama(width=16, depth=1, heads=2, inner=16, context_length=64, spread=0.1)
SMALL = {
    "per_task": 32,
    "tests_per_task": 4,
    "base_per_task": 40,
    "base_tests_per_task": 3,
    "base_epochs": 1,
}


def strings(folder: Path, **options: Any) -> StringInstructions:
    language_model = options.pop("language_model", TINY)
    return StringInstructions(
        language_model=language_model,
        template="{instruction}: {input}\n",
        separator="",
        cache_dir=folder,
        **{**SMALL, **options},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def model(scenario: StringInstructions, seed: int = 0, split: Split = Split.EVALUATE) -> Any:
    return scenario.model(seed, scenario.stream(split, seed))


def test_strings_are_sound(folder: Path) -> None:
    check_scenario(strings(folder))


def test_each_split_has_tasks_of_its_own_and_the_seed_orders_them(folder: Path) -> None:
    scenario = strings(folder)
    names = {split: [e.name for e in scenario.stream(split, 0).experiences] for split in Split}
    assert set(names[Split.EVALUATE]) == set(string_tasks.NEW)
    assert set(names[Split.TUNE]) == set(string_tasks.TUNING)
    other = [e.name for e in scenario.stream(Split.EVALUATE, 1).experiences]
    assert sorted(other) == sorted(names[Split.EVALUATE])
    assert other != names[Split.EVALUATE]


def test_an_order_can_be_given_and_may_leave_tasks_out(folder: Path) -> None:
    stream = strings(folder, order=("sort", "add")).stream(Split.EVALUATE, 5)
    assert [e.name for e in stream.experiences] == ["sort", "add"]
    with pytest.raises(UserError, match=r"scenario.order: no task 'sorting'. Did you mean 'sort'"):
        strings(folder, order=("sorting",)).stream(Split.EVALUATE, 0)
    with pytest.raises(UserError, match=r"scenario.order names a task twice"):
        strings(folder, order=("sort", "sort")).stream(Split.EVALUATE, 0)


def test_fewer_examples_are_always_the_same_ones(folder: Path) -> None:
    few = {"train_samples": 10, "test_samples": 2, "evaluation_share": 0.0}
    scenario = strings(folder, **few, order=("sort",))
    stream = scenario.stream(Split.EVALUATE, 0)
    train, test = stream.experiences[0].train, stream.tests[0]
    assert train is not None
    assert (len(train), len(test)) == (10, 2)
    again = scenario.stream(Split.EVALUATE, 1).experiences[0].train
    assert again is not None
    assert torch.equal(train.take(torch.arange(10)).raw, again.take(torch.arange(10)).raw)


def test_what_is_taught_is_made_once_for_all_seeds_splits_and_tunings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = strings(folder)
    one = source_model.digest(model(scenario))
    monkeypatch.setattr(source_model, "_train", None)
    assert source_model.digest(model(scenario, seed=1)) == one
    assert source_model.digest(model(replace(scenario, order=("sort",)))) == one
    other_split = model(scenario, split=Split.TUNE)
    for name, value in other_split.state_dict().items():
        assert torch.equal(value, model(scenario).state_dict()[name])


def test_a_model_that_was_taught_differs_from_a_fresh_one(folder: Path) -> None:
    taught, fresh = model(strings(folder)), model(strings(folder, base_epochs=0))
    assert source_model.digest(taught) != source_model.digest(fresh)


def test_low_rank_updates_of_a_taught_model(folder: Path) -> None:
    pytest.importorskip("peft", reason="the extra `text` is not installed")
    scenario = strings(folder, language_model=replace(TINY, tuning="lora", lora_rank=2))
    adapted, plain = model(scenario), model(strings(folder))
    assert isinstance(adapted, LanguageModel)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    samples = scenario.stream(Split.EVALUATE, 0).tests[0]
    inputs = samples.take(torch.arange(2)).inputs
    assert torch.allclose(adapted.eval()(inputs), plain.eval()(inputs), atol=1e-5)
    result = protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1))
    facts = result.scenario_facts["backbone"]
    assert result.status == "complete"
    assert facts["trained_parameters"] < facts["parameters"] / 4


def test_a_run_leaves_scores_by_task_and_what_is_left_of_the_base(folder: Path) -> None:
    scenario = strings(folder, order=("upper", "sort"))
    result = protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1))
    assert result.experiences == ["upper", "sort"]
    for matrix in (result.accuracy_matrix, result.scores["answer"], result.scores["format"]):
        assert [len(row) for row in matrix] == [2, 2]
        assert all(cell is not None for row in matrix for cell in row)
    assert len(result.general["tests_before"]["accuracy"]) == 2
    for name in ("accuracy", "answer", "format"):
        assert len(result.general["after"][name]) == 2
        assert 0 <= result.general["before"][name] <= 1
    metrics = result.metrics
    last, before = result.general["after"]["accuracy"][-1], result.general["before"]["accuracy"]
    assert metrics["general_change"] == pytest.approx(last - before)
    assert metrics["forward_transfer"] is not None
    assert metrics["format_error_rate"] == pytest.approx(
        1 - sum(result.scores["format"][-1]) / 2  # type: ignore[arg-type]
    )
    facts = result.scenario_facts
    assert facts["decoding"] == {"method": "generate", "search": "greedy", "answer_length": 10}
    assert facts["train"]["cut_prompts"] == 0
    assert 0 <= facts["padding_share"] < 0.2
    assert facts["source_model_sha256"]


def test_ranking_is_another_way_to_be_scored(folder: Path) -> None:
    scenario = strings(folder, order=("count",), scoring="rank", base_epochs=0)
    result = protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1))
    assert result.metrics["format_error_rate"] == 0
    assert result.scenario_facts["decoding"]["method"] == "rank"


def test_a_trained_tokenizer_reads_the_same_text_with_fewer_tokens(folder: Path) -> None:
    by_bytes = strings(folder, base_epochs=0).stream(Split.EVALUATE, 0)
    scenario = strings(folder, base_epochs=0, tokenizer="trained", vocabulary_size=320)
    trained = scenario.stream(Split.EVALUATE, 0)
    lengths = [text_source(s.experiences[0].train).lengths.sum() for s in (by_bytes, trained)]
    assert lengths[1] < 0.8 * lengths[0]
    assert trained.n_outputs == trained.facts["tokenizer"]["size"] == 320
    result = protocol.run(scenario, Finetune(), Conditions(device="cpu", threads=1))
    assert result.status == "complete"


def test_the_default_scenario_wastes_little_on_padding() -> None:
    scenario = build(composed("scenario=string_instructions")["scenario"], Scenario, "scenario")
    stream = scenario.stream(Split.EVALUATE, 0)
    assert stream.facts["padding_share"] < 0.2
    assert [len(e.train or ()) for e in stream.experiences] == [1000] * 8


def test_evaluations_ask_no_more_than_is_learned_unless_that_is_wanted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """2 tasks of 32, so 64 to learn, 32 for each of 2 evaluations, 4 for each of 8 tests."""
    options: dict[str, Any] = {
        "order": ("upper", "sort"),
        "tests_per_task": 10,
        "base_tests_per_task": 9,
        "base_epochs": 0,
    }
    stream = strings(folder, **options).stream(Split.EVALUATE, 0)
    assert stream.facts["evaluation"] == {"questions": 32, "there_are": 74}
    assert [len(t) for t in stream.tests] == [4, 4]
    assert stream.source_test is not None
    assert len(stream.source_test) == 24
    assert "asks 32 of 74 test examples" in caplog.text
    again = strings(folder, **options).stream(Split.EVALUATE, 1)
    for one, other in zip(stream.tests, again.tests, strict=True):
        assert torch.equal(one.take(torch.arange(4)).inputs, other.take(torch.arange(4)).inputs)
    for more in ({"evaluation_share": 0.0}, {"epochs": 4}):
        whole = strings(folder, **options, **more).stream(Split.EVALUATE, 0)
        assert whole.facts["evaluation"] == {"questions": 74, "there_are": 74}
