"""The jobs of a sweep are those that Hydra would compose, and those that ended are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clbench import userspace
from clbench.cells import execute
from clbench.commands.phases import cell_of
from clbench.commands.sweeping import unfinished
from clbench.composing import own_part
from clbench.planning import Composer

#: Overrides of each kind: parts, values of every type, what is looked up elsewhere, additions.
WORDS = (
    "strategy=replay",
    "strategy=derpp",
    "strategy=refresh",
    "strategy@strategy.base=er_ace",
    "scenario=glyphs",
    "scenario=digits",
    "backbone=convnet",
    "engine=slurm",
    "seed=3",
    "seed='7'",
    "device=cpu",
    "cache_dir=null",
    "cache_dir=a/b",
    "results_dir='with = and, commas'",
    "results_dir=${data_dir}/r",
    "data_dir=elsewhere",
    "scenario.epochs=2",
    "scenario.memory_size=1e3",
    "scenario.classes=[1,2]",
    "scenario.n_experiences=null",
    "strategy.lr=0.5",
    "strategy.lr=1e-3",
    "strategy.base.lr=0.25",
    "strategy.alpha=0.1",
    "strategy.lr=???",
    "strategy.nothing=1",
    "reference_strategies.pretrained=[]",
    "budget.trials=4",
    "+budget.trials=5",
    "~tracker",
    "workers=2",
)


@pytest.fixture
def master() -> Iterator[tuple[ConfigLoader, DictConfig]]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(userspace.configuration()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield loader, loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)


def by_hydra(loader: ConfigLoader, master: DictConfig, overrides: list[str]) -> object:
    """What Hydra composes, as plain data; or the kind of its refusal."""
    try:
        whole = loader.load_sweep_config(master, overrides)
        return OmegaConf.to_container(own_part(whole), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        return type(error)


def by_us(composer: Composer, overrides: list[str]) -> object:
    try:
        return composer.job(overrides).tree
    except (HydraException, OmegaConfBaseException) as error:
        return type(error)


def test_every_job_is_what_hydra_would_compose(master: tuple[ConfigLoader, DictConfig]) -> None:
    """In any order, with what was composed before in mind: with what Hydra refuses too."""
    loader, ours = master
    composer = Composer(loader, ours)  # kept: what it remembers must not leak into other jobs

    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.sampled_from(WORDS), max_size=5, unique_by=lambda w: w.split("=")[0]))
    def check(overrides: list[str]) -> None:
        assert by_us(composer, overrides) == by_hydra(loader, ours, overrides)

    check()


@pytest.mark.parametrize("word", WORDS)
def test_every_kind_of_word_is_tried(word: str, master: tuple[ConfigLoader, DictConfig]) -> None:
    loader, ours = master
    composer = Composer(loader, ours)
    for overrides in ([word, "seed=1"], ["strategy=derpp", word]):
        if len({w.split("=")[0] for w in overrides}) == len(overrides):
            assert by_us(composer, overrides) == by_hydra(loader, ours, overrides)


def test_jobs_that_ended_are_found_and_no_others(
    tmp_path: Path, master: tuple[ConfigLoader, DictConfig]
) -> None:
    loader, ours = master
    composer = Composer(loader, ours)
    fixed = ["scenario.epochs=1", "scenario.n_experiences=2", f"results_dir={tmp_path}"]
    jobs = [
        composer.job([*fixed, f"strategy={strategy}", f"seed={seed}"])
        for strategy in ("finetune", "replay")
        for seed in (0, 1, 2)
    ]
    for number in (1, 3):
        execute(cell_of(jobs[number]))
    codes, left = unfinished(jobs)
    assert left == [0, 2, 4, 5]
    assert codes == [0] * 6
    changed = composer.job([*fixed, "strategy=replay", "seed=0", "strategy.lr=0.01"])
    forced = composer.job([*fixed, "strategy=replay", "seed=0", "force=true"])
    assert unfinished([changed, forced])[1] == [0, 1]
