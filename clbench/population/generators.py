"""Random numbers of several runs that take turns in one process."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch


class GlobalGenerators:
    """A state of every global generator, which can take the place of the present one.

    At first it is the present one.
    """

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._python = random.getstate()
        self._numpy = copy.deepcopy(np.random.get_bit_generator())  # type: ignore[attr-defined]

    def exchange(self) -> None:
        """This state becomes the present one, and the present one this."""
        cuda, self._cuda = self._cuda, []
        if torch.cuda.is_initialized():
            self._cuda = torch.cuda.get_rng_state_all()
            if cuda:  # else nobody has drawn there yet
                torch.cuda.set_rng_state_all(cuda)
        theirs, self._torch = self._torch, torch.get_rng_state()
        torch.default_generator.set_state(theirs)
        python, self._python = self._python, random.getstate()
        random.setstate(python)
        # NumPy lends its generators: nothing is copied.
        numpy, self._numpy = self._numpy, np.random.get_bit_generator()  # type: ignore[attr-defined]
        np.random.set_bit_generator(numpy)  # type: ignore[attr-defined]
