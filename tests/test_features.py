"""Kept features: made once, by whatever process asks first, and worth as much as the images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from suite import Headless
from torch import nn

from clbench import features, from_python, machine, protocol
from clbench.classification import Images
from clbench.conditions import Conditions, identify
from clbench.errors import UserError
from clbench.nn.backbones import MLP
from clbench.nn.heads import Classifier
from clbench.results import Result
from clbench.samples import MappedSource
from clbench.testing import ToyScenario, ToyViT
from clbench.training import GradientStrategy
from clbench.types import Context, Scenario, Split, Strategy
from strategies.aper import APER
from strategies.finetune import Finetune
from strategies.nmc import NMC
from strategies.ranpac import RanPAC

CPU = Conditions(device="cpu", threads=1)
KEPT = replace(CPU, cache_features=True)
METHODS: dict[str, Callable[[], Strategy]] = {
    "nmc": NMC,
    "nmc euclidean": lambda: NMC(metric="euclidean"),
    "ranpac": lambda: RanPAC(tuning="none", projection=64),
    "aper": lambda: APER(tuning="none"),
}


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a backbone got while features were made."""
    sizes: list[int] = []
    whole = features._Store._batches

    def counted(self: features._Store, *args: object) -> object:
        for rows, found in whole(self, *args):  # type: ignore[arg-type]
            sizes.append(len(found))
            yield rows, found

    monkeypatch.setattr(features._Store, "_batches", counted)
    return sizes


def run(scenario: Scenario, strategy: Strategy, conditions: Conditions, cache: Path) -> Result:
    return protocol.run(scenario, strategy, conditions, cache_dir=cache)


@pytest.mark.parametrize("backbone", [MLP(hidden=(32,)), ToyViT()], ids=["mlp", "vit"])
@pytest.mark.parametrize("method", METHODS)
def test_kept_features_are_worth_as_much_as_the_images(
    method: str, backbone: MLP | ToyViT, tmp_path: Path
) -> None:
    scenario = ToyScenario(backbone=backbone)
    plain = run(scenario, METHODS[method](), CPU, tmp_path)
    assert not list(tmp_path.iterdir())
    made, found = (run(scenario, METHODS[method](), KEPT, tmp_path) for _ in range(2))
    assert made.accuracy_matrix == found.accuracy_matrix == plain.accuracy_matrix
    assert made.task_aware_accuracy_matrix == plain.task_aware_accuracy_matrix
    for cost in ("parameters", "train_samples", "trainable_parameters", "forward_flops"):
        assert made.costs[cost] == plain.costs[cost]
    assert made.scenario_facts == plain.scenario_facts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_differ_from_those_of_a_run_by_rounding_alone(
    precision: str, tmp_path: Path
) -> None:
    """In the 6th digit, in bf16 in the 3rd: images meet in other batches, that is all."""
    scenario = ToyScenario(backbone=ToyViT())
    stream = scenario.stream(Split.EVALUATE, 0)
    torch.manual_seed(0)
    model = scenario.model(0, stream).eval()
    assert isinstance(model, Classifier)
    kept, head = features.kept(scenario, stream, model, precision, tmp_path)
    for ours, theirs in zip(kept.tests, stream.tests, strict=True):
        some = torch.arange(7)
        mine, batch = ours.take(some), theirs.take(some)
        assert torch.equal(mine.targets, batch.targets)
        assert torch.equal(head.features(mine.inputs), mine.raw)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.no_grad(), mixed:
            expected = model.features(batch.inputs).float()
        close = 1e-5 if precision == "fp32" else 2e-2
        torch.testing.assert_close(mine.inputs, expected, rtol=close, atol=close)


def test_one_pass_over_the_images_serves_all_methods(tmp_path: Path, embedded: list[int]) -> None:
    scenario = ToyScenario()
    for make in METHODS.values():
        costs = run(scenario, make(), KEPT, tmp_path).costs
        assert costs["forward_samples"] == 0
        assert (costs["feature_seconds"] or 0) > 0
    assert sum(embedded) == 240 + 120  # training and test images, once


@dataclass(kw_only=True)
class Inverted(ToyScenario):
    """The same toy in negative."""

    def images(self, split: Split) -> Images:
        images = super().images(split)
        images.train.inputs = 255 - images.train.inputs  # type: ignore[attr-defined]
        return images


@pytest.mark.parametrize(
    ("scenario", "conditions", "anew"),
    [
        (ToyScenario(epochs=1, batch_size=7, n_experiences=2), KEPT, 0),
        (ToyScenario(crop_padding=2, flip=True), KEPT, 0),
        (ToyScenario(), replace(KEPT, evaluate_batch_size=5), 0),
        (Inverted(), KEPT, 240),
        (ToyScenario(per_class=41), KEPT, 246 + 120),
        (ToyScenario(backbone=MLP(hidden=(31,))), KEPT, 360),
        (ToyScenario(backbone=MLP(hidden=(32,), mean=(0.4,), std=(0.3,))), KEPT, 360),
        (ToyScenario(), replace(KEPT, seed=1), 360),
        (ToyScenario(), replace(KEPT, precision="bf16"), 360),
        (ToyScenario(), replace(KEPT, threads=2), 360),
    ],
    ids=[
        *("other budget", "augmentation", "other batches", "other images", "more images"),
        *("other backbone", "other normalisation", "other weights", "bf16", "two threads"),
    ],
)
def test_features_are_made_anew_where_anything_decides_them(
    scenario: Scenario, conditions: Conditions, anew: int, tmp_path: Path, embedded: list[int]
) -> None:
    run(ToyScenario(), NMC(), KEPT, tmp_path)
    before = sum(embedded)
    run(scenario, NMC(), conditions, tmp_path)
    assert sum(embedded) - before == anew


def test_two_processes_make_them_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from clbench import protocol;"
        "from clbench.conditions import Conditions; from clbench.testing import ToyScenario;"
        "from strategies.nmc import NMC; from clbench import features as f;"
        "make = f._Store._batches;"
        "f._Store._batches = lambda s, *a: (print('made', flush=True), make(s, *a))[1];"
        "c = Conditions(device='cpu', threads=1, cache_features=True);"
        "print(protocol.run(ToyScenario(), NMC(), c, cache_dir=Path(sys.argv[1])).accuracy_matrix)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(line == "made" for lines in told for line in lines) == 2  # training and test
    assert told[0][-1] == told[1][-1]


def test_a_damaged_entry_is_made_again(tmp_path: Path, embedded: list[int]) -> None:
    first = run(ToyScenario(), NMC(), KEPT, tmp_path)
    for path in tmp_path.glob("features-*/features.npy"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    assert run(ToyScenario(), NMC(), KEPT, tmp_path).accuracy_matrix == first.accuracy_matrix
    assert sum(embedded) == 2 * 360


def test_what_does_not_fit_in_memory_stays_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(ToyScenario(), NMC(), KEPT, tmp_path)
    monkeypatch.setattr(machine, "available_memory", lambda: 0)
    kinds: list[type] = []
    whole = features._Store.embedded

    def spy(self: features._Store, *args: object) -> object:
        found = whole(self, *args)  # type: ignore[arg-type]
        kinds.append(type(found))
        return found

    monkeypatch.setattr(features._Store, "embedded", spy)
    large = run(ToyScenario(), NMC(), KEPT, tmp_path)
    assert kinds == [MappedSource, MappedSource]
    assert large.accuracy_matrix == plain.accuracy_matrix


@pytest.mark.parametrize(
    ("scenario", "strategy", "words"),
    [
        (ToyScenario(), Finetune(), ["Finetune", "changes the features", "cache_features=false"]),
        (ToyScenario(backbone=ToyViT()), RanPAC(), ["RanPAC", "strategy.tuning=none"]),
        (ToyScenario(backbone=ToyViT()), APER(tuning="full"), ["APER", "strategy.tuning=none"]),
    ],
    ids=["finetune", "ranpac", "aper"],
)
def test_what_changes_features_is_refused_before_anything_is_loaded(
    scenario: Scenario,
    strategy: Strategy,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(scenario), "stream", None)
    with pytest.raises(UserError) as error:
        from_python.run(scenario, strategy, cache_features=True, results_dir=tmp_path)
    assert all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


@dataclass(kw_only=True)
class Probe(GradientStrategy):
    """A linear head on features. **Differs from the paper:** there is none."""

    @property
    def keeps_features(self) -> bool:
        return True

    def setup(self, model: nn.Module, context: Context) -> None:
        assert isinstance(model, Classifier)
        model.features.requires_grad_(False)
        super().setup(model, context)


def test_a_head_may_train_on_them_but_not_on_augmented_ones(tmp_path: Path) -> None:
    plain = run(ToyScenario(), Probe(lr=0.5), CPU, tmp_path)
    kept = run(ToyScenario(), Probe(lr=0.5), KEPT, tmp_path)
    assert plain.accuracy_matrix[2] == pytest.approx(kept.accuracy_matrix[2], abs=0.026)
    assert (kept.metrics["average_accuracy"] or 0) > 1 / 6
    assert kept.costs["backward_samples"] == plain.costs["backward_samples"]
    with pytest.raises(UserError, match=r"augment.*cache_features=false"):
        run(ToyScenario(flip=True), Probe(), KEPT, tmp_path)


def test_a_model_without_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"features and a head.*Sequential.*cache_features=false"):
        run(Headless(), Probe(), KEPT, tmp_path)


def test_the_choice_is_part_of_a_run_only_where_it_is_made() -> None:
    plain = identify(ToyScenario(), NMC(), CPU)
    kept = identify(ToyScenario(), NMC(), KEPT)
    assert plain["run_id"] != kept["run_id"]
    assert kept["cache_features"] is True
    assert "cache_features" not in plain
    assert "cache_features" not in CPU.identity()


def test_rows_of_a_board_are_told_apart_by_it(tmp_path: Path) -> None:
    from clbench.leaderboard import build
    from clbench.results import read

    for kept in (False, True):
        overrides = [f"cache_dir={tmp_path / 'cache'}", "scenario.n_experiences=2"]
        from_python.run(
            *("digits", "nmc", 0, overrides), cache_features=kept, results_dir=tmp_path / "results"
        )
    assert len(list((tmp_path / "cache").glob("features-*"))) == 2
    (board,) = build(read(tmp_path / "results")).boards
    assert sorted(board.table["strategy"]) == ["nmc", "nmc (cache_features=True)"]
    assert board.table["average_accuracy"].nunique() == 1
