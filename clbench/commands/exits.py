"""How a command ends: with a message for whoever typed it, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from clbench.composing import explained
from clbench.errors import Busy, Submitted, UserError
from clbench.processes import launched

#: Exit codes: a mistake to mend; a run that did not complete; Ctrl-C; to be started again later.
MISTAKE, INCOMPLETE, INTERRUPTED, LATER = 2, 1, 130, 75


def guarded(action: Callable[[], int]) -> int:
    """Turns what a user can mend into one message and an exit code."""
    try:
        return action()
    except Submitted as words:
        print(words, file=sys.stderr)
        return LATER
    except Busy as error:
        print(f"error: {error}", file=sys.stderr)
        return LATER
    except UserError as error:
        message = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = explained(error, sys.argv[1:])
    except yaml.YAMLError as error:
        message = f"A configuration file is no YAML: {error}"
    except ValueError as error:  # Hydra's own for scenario=null
        if "Config group override" not in str(error):
            raise
        message = "A group (scenario, strategy, backbone) needs the name of one of its choices."
    print(f"{launched.speaker()}error: {message}", file=sys.stderr)
    return MISTAKE
