"""Joint training: the ceiling for a method that learns one experience after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from clbench.errors import UserError
from clbench.nn.joined import join
from clbench.samples import Samples
from clbench.training import GradientStrategy
from clbench.types import LABELLED, Context, Experience, Setting


@dataclass(kw_only=True)
class Joint(GradientStrategy):
    """Trains on all samples of all experiences so far, at once.

    Equation: after experience t minimise CE(h(x), y) over D_1 ∪ ... ∪ D_t, for the epochs that
    the scenario allows on one experience.

    It goes back to earlier data, so the memory budget does not bind it: it is a reference and no
    continual learner.

    Attributes:
        from_scratch: Start from the initial model each time, so that every row of the matrix is
            a joint training of its own; else from the model as the last experience left it.

    **Differs from the paper:** there is no paper; this is the upper reference.
    """

    settings: ClassVar[frozenset[Setting]] = LABELLED

    revisits: ClassVar[bool] = True

    from_scratch: bool = True

    def setup(self, model: nn.Module, context: Context) -> None:
        super().setup(model, context)
        # Scratch: a resumed run is set up with the same model again.
        self._initial = {name: value.clone() for name, value in model.state_dict().items()}

    def before(self, experience: Experience) -> None:  # noqa: ARG002
        if self.from_scratch:
            self.model.load_state_dict(self._initial)

    def material(self, experience: Experience) -> Samples:  # noqa: ARG002
        """The samples of all experiences so far."""
        if not self.context.seen:
            raise UserError("joint can't be the base of another method: run strategy=joint.")
        return join([e.train for e in self.context.seen if e.train is not None])
