"""Whole classifiers of other libraries, cut into features and their final layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nn.weights import brief


def without_head(model: nn.Module, n_classes: int, whose: str) -> nn.Linear:
    """Takes the last linear layer of so many outputs out of a model.

    Args:
        model: Changed in place.
        n_classes: Outputs.
        whose: Name of the model, for the message.

    Returns:
        The layer, in whose place the identity is now.

    Raises:
        UserError: If there is none.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if path and isinstance(module, nn.Linear) and module.out_features == n_classes
    ]
    if not found:
        raise UserError(
            f"{whose} has no linear layer of {n_classes} outputs, so it can't be cut into "
            "features and a head. Choose another backbone.name."
        )
    path, head = found[-1]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return head


def features_of(model: nn.Module, image_shape: tuple[int, int, int], whose: str) -> int:
    """Length of a cut model's output, from one black image; leaves the model in its mode.

    Raises:
        UserError: If it can't read such images, or gives something else than a vector each.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = model(torch.zeros(1, *image_shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{whose} can't read images of shape {image_shape}: {brief(error)}. Choose a scenario "
            "with images of another size or another backbone.name, or set "
            "backbone.input_size=weights where there is this option."
        ) from error
    model.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UserError(
            f"{whose} does not end in its linear layer, so it can't be cut into features and a "
            "head. Choose another backbone.name."
        )
    return int(features.shape[1])
