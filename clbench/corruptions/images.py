"""Between uint8 images and numbers in [0, 1]."""

import numpy as np
import numpy.typing as npt

from clbench.corruptions.draws import Floats

Images = npt.NDArray[np.uint8]

_LUMA = np.array([0.299, 0.587, 0.114])


def to_unit(images: Images) -> Floats:
    """uint8 of any shape to [0, 1]."""
    return np.asarray(images / 255.0, np.float64)


def to_uint8(values: npt.NDArray[np.floating]) -> Images:
    """Values of any shape, clipped to [0, 1], to whole levels of 255, cut off not rounded."""
    return np.asarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


def luma(values: Floats) -> Floats:
    """[..., C, H, W] to the brightness [..., 1, H, W] of ITU-R BT.601; one channel stays."""
    if values.shape[-3] == 1:
        return values
    return np.asarray(np.einsum("c,...chw->...hw", _LUMA, values)[..., None, :, :])


def tint(red: int, green: int, blue: int, channels: int) -> Floats:
    """A colour of levels up to 255 as [channels, 1, 1] in [0, 1]; for one channel its luma."""
    colour = to_unit(np.array([red, green, blue], np.uint8)).reshape(3, 1, 1)
    return colour if channels == 3 else luma(colour)
