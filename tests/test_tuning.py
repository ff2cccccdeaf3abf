"""Two phases: what is chosen, what is kept, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clbench import tuning
from clbench.cells import Cell, execute
from clbench.conditions import Conditions, Names
from clbench.engines.local import Workers
from clbench.errors import UserError
from clbench.results import read
from clbench.study import Study, Trial
from clbench.tuning import FIRST_TUNING_SEED, Budget
from clbench.types import Split

TOY = {"_target_": "clbench.testing.ToyScenario", "epochs": 1, "batch_size": 20, "backbone": None}
MLP = {"_target_": "clbench.nn.backbones.MLP", "hidden": [8]}
FINETUNE = {
    "_target_": "strategies.finetune.Finetune",
    "lr": 0.1,
    "search": {"lr": "interval(0.001, 0.1)"},
}
SMALL = Budget(trials=3, tuning_seeds=2, seeds=2)


def planned(folder: Path, strategy: Any = FINETUNE, **changes: Any) -> Cell:
    return Cell(
        composed={"scenario": {**TOY, "backbone": MLP}, "strategy": strategy},
        conditions=Conditions(device="cpu"),
        names=Names("toy", "finetune"),
        tuned=None,
        results_dir=folder,
        **changes,
    )


def test_a_search_keeps_every_trial_and_chooses_the_best(tmp_path: Path) -> None:
    study, place = tuning.tune(planned(tmp_path), SMALL)
    assert len(study.trials) == 3
    best = max(study.trials, key=lambda t: t.mean or 0)
    assert study.chosen == best.values
    assert best.mean == pytest.approx(sum(best.scores) / 2)
    runs = read(tmp_path)
    assert set(runs["split"]) == {"tune"}
    assert set(runs["seed"]) == {FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1}
    assert set(runs["tuned"]) == {"trial"}
    of_best = runs[runs["run_id"].isin(best.runs)]
    assert sorted(of_best["average_accuracy"]) == pytest.approx(sorted(best.scores))
    kept = json.loads(place.read_text())
    assert kept["costs"]["tuning_runs"] == 6
    seconds = sum(t.seconds for t in study.trials)
    assert kept["costs"]["tuning_seconds"] == pytest.approx(seconds)
    assert Study.from_json(place.read_text()) == study


def test_a_search_that_is_there_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = tuning.tune(planned(tmp_path), SMALL)
    monkeypatch.setattr(tuning, "execute", None)
    assert tuning.tune(planned(tmp_path), SMALL)[0] == first


def test_a_killed_search_goes_on_with_the_same_proposals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = tuning.tune(planned(tmp_path / "whole"), SMALL)
    done: list[Cell] = []

    def dies(cell: Cell) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cell)
        return execute(cell)

    monkeypatch.setattr(tuning, "execute", dies)
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(planned(tmp_path / "killed"), SMALL)
    again: list[bool] = []

    def noted(cell: Cell) -> Any:
        ended = execute(cell)
        again.append(ended.earlier)
        return ended

    monkeypatch.setattr(tuning, "execute", noted)
    resumed, _ = tuning.tune(planned(tmp_path / "killed"), SMALL)
    assert again == [True] * 3 + [False] * 3
    assert [(t.values, t.scores, t.runs) for t in resumed.trials] == [
        (t.values, t.scores, t.runs) for t in whole.trials
    ]


def test_the_evaluation_takes_what_was_chosen_to_other_data_and_seeds(tmp_path: Path) -> None:
    study, _ = tuning.tune(planned(tmp_path), SMALL)
    ended = tuning.evaluate(planned(tmp_path), SMALL)
    assert study.chosen
    for seed, each in enumerate(ended):
        run = each.result.run
        assert (run["split"], run["seed"]) == ("evaluate", seed)
        assert run["options"]["strategy"]["lr"] == study.chosen["lr"]
        assert run["tuned"]["protocol"] == "two_phase"
        assert run["tuned"]["study"] == study.name
    repeated = tuning.evaluate(planned(tmp_path), SMALL)
    assert all(each.earlier for each in repeated)


def test_what_was_not_tuned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing was tuned for finetune"):
        tuning.evaluate(planned(tmp_path), SMALL)
    tuning.tune(planned(tmp_path), SMALL)
    other = planned(tmp_path)
    longer = {**other.composed, "scenario": {**TOY, "backbone": MLP, "epochs": 2}}
    with pytest.raises(UserError, match="this shape of toy"):
        tuning.evaluate(replace(other, composed=longer), SMALL)
    with pytest.raises(UserError, match="with this budget"):
        tuning.evaluate(planned(tmp_path), replace(SMALL, trials=4))


def test_untuned_values_are_marked_as_such(tmp_path: Path) -> None:
    (first, _) = tuning.evaluate(planned(tmp_path), SMALL, untuned=True)
    assert first.result.run["tuned"] is None
    assert first.result.run["options"]["strategy"]["lr"] == 0.1


def test_the_conventional_protocol_tunes_on_what_it_reports(tmp_path: Path) -> None:
    study, _ = tuning.tune(planned(tmp_path), SMALL, "conventional")
    runs = read(tmp_path)
    assert set(runs["split"]) == {"evaluate"}
    assert set(runs["seed"]) == {0, 1}
    ended = tuning.evaluate(planned(tmp_path), SMALL, "conventional")
    best = max(study.trials, key=lambda t: t.mean or 0)
    scores = [each.result.metrics["average_accuracy"] for each in ended]
    assert scores == pytest.approx(list(best.scores))
    with pytest.raises(UserError, match="Nothing was tuned"):
        tuning.evaluate(planned(tmp_path), SMALL, "two_phase")


def test_a_diverged_trial_counts_and_is_never_the_best(tmp_path: Path) -> None:
    wild = {**FINETUNE, "search": {"lr": "choice(0.1, 1e30)"}}
    study, _ = tuning.tune(planned(tmp_path, wild), replace(SMALL, trials=6))
    failed = [t for t in study.trials if t.state == "failed"]
    assert len(study.trials) == 6
    assert failed
    assert all(t.values["lr"] == 1e30 and "diverged" in str(t.reason) for t in failed)
    assert study.chosen == {"lr": 0.1}


def test_where_every_trial_fails_nothing_is_chosen(tmp_path: Path) -> None:
    wild = {**FINETUNE, "search": {"lr": "choice(1e30, 1e31)"}}
    study, _ = tuning.tune(planned(tmp_path, wild), SMALL)
    assert study.chosen is None
    with pytest.raises(UserError, match=r"No trial of .* completed.*diverged"):
        tuning.evaluate(planned(tmp_path, wild), SMALL)


def test_a_strategy_without_a_search_space_has_nothing_to_tune(tmp_path: Path) -> None:
    fixed = {"_target_": "strategies.nmc.NMC", "metric": "cosine"}
    study, _ = tuning.tune(planned(tmp_path, fixed), SMALL)
    assert study.trials == ()
    assert study.chosen == {}
    ended = tuning.evaluate(planned(tmp_path, fixed), SMALL)
    assert [each.result.status for each in ended] == ["complete"] * 2


def test_a_configuration_proposed_twice_is_run_once(tmp_path: Path) -> None:
    few = {**FINETUNE, "search": {"lr": "choice(0.05, 0.1)"}}
    study, _ = tuning.tune(planned(tmp_path, few), replace(SMALL, trials=5))
    assert len(study.trials) == 5
    assert study.costs()["tuning_runs"] == len(read(tmp_path)) == 4


def test_trials_and_seeds_side_by_side_are_the_same(tmp_path: Path) -> None:
    one, _ = tuning.tune(planned(tmp_path / "one"), SMALL)
    alone = tuning.evaluate(planned(tmp_path / "one"), SMALL)
    with Workers(2) as pool:
        two, _ = tuning.tune(planned(tmp_path / "two"), SMALL, pool=pool)
        together = tuning.evaluate(planned(tmp_path / "two"), SMALL, pool=pool)
    assert [(t.values, t.scores) for t in one.trials] == [(t.values, t.scores) for t in two.trials]
    assert [e.result.metrics for e in alone] == [e.result.metrics for e in together]


def test_pruned_trials_are_kept_and_not_chosen(tmp_path: Path) -> None:
    budget = Budget(trials=10, tuning_seeds=8, batch=1, prune=True)
    bad = {**FINETUNE, "search": {"lr": "choice(1e-9, 2e-9, 3e-9, 4e-9, 0.1)"}}
    study, _ = tuning.tune(planned(tmp_path, bad), budget)
    pruned = [t for t in study.trials if t.state == "pruned"]
    assert pruned
    assert all(t.values["lr"] < 1e-8 and 2 <= len(t.scores) < 8 for t in pruned)
    assert study.chosen == {"lr": 0.1}


def test_splits_that_share_samples_are_refused_before_the_first_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench.testing import ToyScenario

    images = ToyScenario.images
    monkeypatch.setattr(ToyScenario, "images", lambda self, _: images(self, Split.EVALUATE))
    monkeypatch.setattr(tuning, "execute", None)
    with pytest.raises(UserError, match="samples are in both splits of toy"):
        tuning.tune(planned(tmp_path), SMALL)


def test_evaluation_seeds_stay_below_the_tuning_seeds(tmp_path: Path) -> None:
    cell = planned(tmp_path)
    late = replace(cell, conditions=Conditions(device="cpu", seed=FIRST_TUNING_SEED))
    with pytest.raises(UserError, match="are for tuning"):
        tuning.evaluate(late, SMALL, untuned=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "trials": [1]}'])
def test_a_file_that_is_no_study_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Study.from_json(text)


def test_a_trial_has_a_mean_only_if_it_is_complete() -> None:
    trial = Trial({}, (0.5, 0.7), "complete", None, (), 0.0, 0, 0)
    assert trial.mean == pytest.approx(0.6)
    assert replace(trial, state="pruned").mean is None
