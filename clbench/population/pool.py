"""A pool of runs that train at once in this process, as far as they do the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clbench import machine
from clbench.engines.pool import Answer, Died, Item, Pool, Raised
from clbench.errors import Interrupted, UserError
from clbench.limits import out_of_memory
from clbench.population import reading
from clbench.population.companion import Companion, introduce
from clbench.population.reading import Unlike
from clbench.population.requests import Backward, Call, Gradients, Request, Skeletons
from clbench.population.turns import Turns
from clbench.training import has_own_loop
from clbench.types import Strategy

_log = logging.getLogger(__name__)


class Population(Pool):
    """So many pieces of work at once, each a run or several runs one after another.

    They go on in turns until each waits for its model or for gradients. Then the largest group
    that wants the same is answered; the others wait, and so come to be in step with it again.

    Args:
        size: How many.

    Attributes:
        shared: Calls of models that were answered together, one for each run.
        alone: Calls for training that a run made by itself.
    """

    def __init__(self, size: int) -> None:
        self.room = size
        self.shared = self.alone = 0
        self._skeletons = Skeletons()
        self._refused: set[Hashable] = set()

    def close(self) -> None:
        self._skeletons = Skeletons()

    def said(self) -> str:
        """How much was done together, for people."""
        calls = self.shared + self.alone
        if not calls:
            return "nothing was trained."
        advice = "" if self.shared else " Set population=0; workers=N makes N runs at once."
        return f"{self.shared / calls:.0%} of {calls:,} calls of models were shared.{advice}"

    @staticmethod
    def check(strategy: Strategy) -> None:
        """Refuses a method whose runs would never be in step.

        Raises:
            UserError: With what to do instead.
        """
        if has_own_loop(strategy):
            raise UserError(
                f"population: {type(strategy).__name__} learns in a loop of its own, whose steps "
                "can't be taken together with those of other runs. Set population=0; workers=N "
                "makes N runs at once in processes."
            )

    def answers(
        self, function: Callable[[Item], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer | Died | Raised]]:
        """See `Pool.answers`; here function and items may be anything."""
        waiting = list(enumerate(items))
        members: dict[int, _Member] = {}
        try:
            with machine.deterministic():  # the members' own settings of it come and go
                while waiting or members:
                    while waiting and len(members) < self.room:
                        number, item = waiting.pop(0)
                        members[number] = _Member(self, partial(function, item))
                        members[number].go_on()
                    for number in [n for n, m in members.items() if m.ended]:
                        yield number, _answer(members.pop(number))
                    if members and (len(members) == self.room or not waiting):
                        self._serve(list(members.values()))
        finally:
            for member in members.values():
                member.leave(Interrupted("the runs that it trained with were stopped"))

    def _serve(self, members: Sequence[_Member]) -> None:
        """Answers those who want the same as most others."""
        groups: dict[Hashable, list[_Member]] = {}
        for member in members:
            groups.setdefault(member.request.key, []).append(member)
        group = max(groups.values(), key=lambda g: (len(g), -min(m.answered for m in g)))
        began = time.perf_counter()
        answers = self._together([member.request for member in group])
        spent = time.perf_counter() - began
        for member, answer in zip(group, answers, strict=True):
            member.seconds += spent / len(group)
            member.go_on(answer)

    def _together(self, requests: Sequence[Request]) -> Sequence[Any]:
        """An answer to each of several requests with one key; `_BY_ITSELF` where it is none."""
        first, count = requests[0], len(requests)
        if count == 1 or first.key in self._refused:
            self.alone += isinstance(first, Call) * count
            return [_BY_ITSELF] * count
        try:
            with machine.thread_count(first.threads):
                answers = first.together(requests, self._skeletons)
        except Exception as error:
            if out_of_memory(error):
                raise UserError(
                    f"{count} runs at once need more memory than there is ({error}). Set "
                    "population to a smaller number."
                ) from error
            if isinstance(first, Call):
                return self._refuse(first, error, count)
            return [error] * count
        self.shared += isinstance(first, Call) * count
        return answers

    def _refuse(self, first: Call, error: Exception, count: int) -> Sequence[Any]:
        """What can't be done together is done by each, where it may fail again for all to see."""
        self._refused.add(first.key)
        reason = f"{type(error).__name__}: {error}"
        _log.warning("the models of a population are called one by one: %s", reason)
        self.alone += count
        return [_BY_ITSELF] * count


class _Member(Turns, Companion):
    """One piece of work, and the companion of each run in it."""

    def __init__(self, pool: Population, work: Callable[[], Any]) -> None:
        self.pool = pool

        def introduced() -> Any:
            introduce(self)
            return work()

        super().__init__(introduced)

    def adopt(self, model: nn.Module) -> None:
        model.forward = _Forward(self, model)

    def clock(self) -> float:
        return Turns.clock(self)

    def backward(self, loss: Tensor) -> None:
        if self._asked(Backward(_key("backward", loss), loss)) is _BY_ITSELF:
            super().backward(loss)

    def gradients(self, loss: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found: Any = self._asked(Gradients(_key("gradients", loss), loss, weights))
        return super().gradients(loss, weights) if found is _BY_ITSELF else found

    def _asked(self, request: Backward | Gradients) -> Any:
        return self.ask(request) if request.loss.requires_grad else _BY_ITSELF


class _Forward:
    """Takes the place of a model's `forward`; copies of the model have copies of it."""

    def __init__(self, member: _Member, model: nn.Module) -> None:
        self.member, self.model = member, model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        # A copy of the model is under way, and known already.
        return _Forward(self.member, memo[id(self.model)])

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        answer: Any = _BY_ITSELF
        if len(arguments) == 1 and not named and isinstance(arguments[0], Tensor):
            try:
                found = reading.read(self.model, arguments[0])
            except Unlike:
                self.member.pool.alone += not torch.is_inference_mode_enabled()
            else:
                answer = self.member.ask(Call(found.key, self.model, found))
        if answer is _BY_ITSELF:
            return type(self.model).forward(self.model, *arguments, **named)
        return answer


#: In place of an answer: the run is to do it by itself, in its own thread.
_BY_ITSELF = object()


def _key(kind: str, loss: Tensor) -> Hashable:
    return kind, loss.device, torch.get_num_threads()


def _answer(member: _Member) -> Any:
    if member.error is None:
        return member.found
    if isinstance(member.error, Exception):
        return Raised(member.error)
    raise member.error
