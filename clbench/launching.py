"""Hydra's side of a sweep: it takes the grammar from Hydra, and leaves composing to the suite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Sweeps(ABC):
    """What Hydra is given to call: for one job, and for all of a sweep."""

    @abstractmethod
    def __call__(self, cfg: DictConfig) -> None: ...

    @abstractmethod
    def sweep(
        self, loader: ConfigLoader, master: DictConfig, jobs: Sequence[Sequence[str]]
    ) -> Sequence[int]:
        """Does the jobs; returns their exit codes.

        Args:
            loader: Composes.
            master: The configuration without what the jobs differ in.
            jobs: The overrides of each.
        """


class Jobs(Launcher):
    """`hydra/launcher=clbench`: hands a sweep to the suite as a whole."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        assert isinstance(task_function, Sweeps)
        self.loader, self.sweeps, self.master = (
            hydra_context.config_loader,
            task_function,
            config,
        )

    def launch(
        self,
        job_overrides: Sequence[Sequence[str]],
        initial_job_idx: int,  # noqa: ARG002
    ) -> Sequence[JobReturn]:
        """For the sweepers of others, the value of a job is its exit code."""
        codes = self.sweeps.sweep(self.loader, self.master, job_overrides)
        return [
            JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=code)
            for overrides, code in zip(job_overrides, codes, strict=True)
        ]


class Product(Sweeper):
    """`hydra/sweeper=clbench`: every combination, in order.

    Hydra's own composes each of them before the first one is launched, to see whether it can be;
    launching composes them again.
    """

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader = hydra_context.config_loader
        self.launcher: Launcher | None = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        choices: dict[str, list[str]] = {}
        for override in OverridesParser.create(self.loader).parse_overrides(arguments):
            key = override.get_key_element()
            if not override.is_sweep_override():
                choices[key] = [f"{key}={override.get_value_element_as_str()}"]
            elif override.is_discrete_sweep():
                choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                raise HydraException(
                    f"{override.input_line} has no end: a sweep needs values, as {key}=1,2 has."
                )
        assert self.launcher
        self.launcher.launch([list(job) for job in product(*choices.values())], 0)


def register() -> None:
    """Makes both known to Hydra, which finds by itself only what lies in `hydra_plugins`."""
    known = Plugins.instance().class_name_to_class
    known.update({f"hydra_plugins.clbench.{kind.__name__}": kind for kind in (Jobs, Product)})
