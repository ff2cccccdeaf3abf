"""The state of a run, from its loop to its folder and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clbench import checkpoint, scratch
from clbench.account import Account
from clbench.interruption import Stop
from clbench.limits import Limits
from clbench.midway import Midway
from clbench.population.companion import Companion
from clbench.results import Result, RunFolder
from clbench.scoring import Scoring
from clbench.state import capture, restore
from clbench.types import Context, Experience, Strategy


class Saving:
    """Saves one run after every experience and within them, and continues it.

    Args:
        strategy: Set up, or about to be.
        context: Of the run.
        result: Of the run.
        scoring: Its rows so far.
        account: What it has spent so far.
        folder: Where it is saved; None: nowhere.
        limits: How often within an experience.
        stop: Whether the run should stop.
        companion: The processes of the run, of which the one that leads has the folder.

    Attributes:
        keeps: The run is saved, by one of its processes.
        midway: Safe points within one experience after another.
    """

    def __init__(
        self,
        strategy: Strategy,
        context: Context,
        result: Result,
        scoring: Scoring,
        account: Account,
        folder: RunFolder | None,
        limits: Limits,
        stop: Stop,
        companion: Companion,
    ) -> None:
        self.strategy, self.context, self.result = strategy, context, result
        self.scoring, self.account = scoring, account
        self.folder = folder if strategy.resumable else None
        self.companion = companion
        self.keeps = companion.told(lambda: self.folder is not None)
        self._pending: dict[str, Any] | None = None
        self.midway = Midway(
            self.folder.within if self.folder else None,
            limits.checkpoint_every,
            stop,
            self._first_step,
            self._within,
            self._go_on,
            folder.log if folder else lambda _: None,
        )

    def resume(self) -> int:
        """Continues an interrupted run; returns the experience to learn next.

        Raises:
            UserError: If another run left what is saved there.
        """
        if not self.keeps:
            return 0
        saved, self._pending = self.companion.told(self._load)
        newest = self._pending or saved
        if newest is not None:
            self._same_machine(newest)
        if saved is None:
            return 0
        self.scoring.load_state_dict(saved)
        restore(self.strategy, saved["strategy"])
        self._put_back(saved)
        self._log(f"resumed after experience {saved['next']}")
        return int(saved["next"])

    def _load(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """What was saved between experiences, and within one."""
        assert self.folder is not None
        device = self.context.device
        saved = checkpoint.load_for(self.result.run, self.folder.checkpoint, device)
        pending = checkpoint.load_for(self.result.run, self.folder.within, device)
        for found, place in ((saved, self.folder.checkpoint), (pending, self.folder.within)):
            if found is None and checkpoint.remains(place):
                self._log(f"the checkpoint in {place.name} is damaged, and not used")
        return saved, pending

    def _log(self, line: str) -> None:
        if self.folder is not None:
            self.folder.log(line)

    def enter(self, experience: Experience) -> None:
        """An experience begins; within it, perhaps, the run goes on."""
        pending, self._pending = self._pending, None
        saved = pending if experience.index == (pending or {}).get("experience") else None
        self.midway.enter(experience.index, saved)
        self.context.proceed = self.midway.proceed

    def after(self, experience: Experience) -> None:
        """Saves the run between two experiences."""
        if self.folder is None:
            return
        content = {
            **self._progress(),
            "next": experience.index + 1,
            "strategy": capture(self.strategy),
            **self.scoring.state_dict(),
        }
        checkpoint.save(self.folder.checkpoint, content)
        checkpoint.discard(self.folder.within)

    def _progress(self) -> dict[str, Any]:
        """What changes with every step, but for the strategy."""
        online = self.scoring.online
        return {
            "run": self.result.run,
            "environment": self.result.environment,
            "elapsed": self.account.elapsed,
            "step": self.account.step,
            "threads": torch.get_num_threads(),
            "generators": {k: g.get_state() for k, g in self.context.generators.items()},
            "costs": self.account.costs,
            "online": online.state_dict() if online else None,
            "evaluations": self.result.evaluations,
        }

    def _put_back(self, saved: Mapping[str, Any]) -> None:
        """`_progress`, but for the generators of the whole machine."""
        self.account.step = saved["step"]
        self.account.costs.update(saved["costs"])
        self.result.evaluations = saved["evaluations"]
        if self.scoring.online:
            self.scoring.online.load_state_dict(saved["online"])
        for key, state in saved["generators"].items():
            purpose, _, kind = key.rpartition("@")
            self.context.generator(purpose, torch.device(kind)).set_state(state.cpu())

    def _first_step(self) -> None:
        self._constants = scratch.constants(self.strategy)

    def _within(self) -> dict[str, Any]:
        """All state in the midst of an experience."""
        self.account.train()
        return {**self._progress(), "scratch": scratch.capture(self.strategy, self._constants)}

    def _go_on(self, saved: Mapping[str, Any]) -> None:
        """Puts back what changes with every step."""
        scratch.restore(self.strategy, saved["scratch"])
        self._put_back(saved)
        self.account.go_on()

    def _same_machine(self, saved: Mapping[str, Any]) -> None:
        """As many threads as before, which decide bits; says what else is not as before."""
        self.account.resume(saved.get("elapsed", 0.0))
        before, now = saved.get("environment", {}), self.result.environment
        torch.set_num_threads(saved["threads"])
        now["threads"] = saved["threads"]
        changed = [f"{k} {before[k]} -> {now.get(k)}" for k in before if before[k] != now.get(k)]
        if changed:
            self._log(f"resumed on another machine or version: {', '.join(changed)}")
