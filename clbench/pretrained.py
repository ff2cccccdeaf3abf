"""What methods for pre-trained vision transformers share."""

from __future__ import annotations

from clbench.classification import ImageScenario
from clbench.errors import UserError
from clbench.nn.vit import BACKBONES
from clbench.types import Scenario


def require_vision_transformer(strategy: str, scenario: Scenario) -> None:
    """For `Strategy.check`: refuses a scenario whose model is no vision transformer of timm.

    Args:
        strategy: The name that the message gives the method.
        scenario: What it is asked to work on.

    Raises:
        UserError: With the backbones that work.
    """
    if isinstance(scenario, ImageScenario) and scenario.backbone.is_vision_transformer:
        return
    made = f"backbone {scenario.backbone.title}" if isinstance(scenario, ImageScenario) else "model"
    raise UserError(
        f"{strategy} needs a vision transformer of timm, not the {made} of this scenario. "
        f"{BACKBONES}"
    )
