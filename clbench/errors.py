"""The ways a command can end without a result, and a run without its numbers."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend.

    Shown without a traceback. The message says what is wrong, where, and what to do.
    """


class Busy(UserError):
    """Another process has what this one wants: a mistake that time mends."""


class Submitted(Exception):
    """Work is in a queue, and nobody waits for it: nothing is wrong, and nothing is there yet."""


class Interrupted(BaseException):
    """A signal has asked a run to stop; what could be saved is. To be started again later.

    Like `KeyboardInterrupt` it is no `Exception`, so that nothing takes it for a failure.
    """


class TimedOut(BaseException):
    """A run has used up its `timeout`. It ends as "timed out"; no `Exception`, as above."""


class Diverged(Exception):
    """A run whose loss or outputs stopped being finite. It ends as "diverged", not as a crash."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The sentence that offers the nearest option and lists them all.

    Args:
        name: What the user wrote.
        options: What would have worked.

    Returns:
        "Did you mean 'ewc'? Available: ..." or, when nothing is near, only the list.
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"Did you mean '{near[0]}'? " if near else ""
    return f"{guess}Available: {', '.join(known) or 'none'}."
