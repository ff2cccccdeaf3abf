"""Random numbers by position: image i gets the same ones in whatever batch it comes."""

import math
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_WORDS = 4  # that one step of Philox's counter gives


@dataclass(frozen=True)
class Draws:
    """Streams of a counter-based generator, Philox4x64 (Salmon et al. 2011), one per purpose.

    Every image owns an equal range of each stream's counter, so all images of a batch are drawn
    at once and no image before them is needed. Normal and Poisson variables are made by inverting
    their distribution functions, since rejection would use up numbers irregularly.

    Attributes:
        entropy: What the streams depend on; numbers of at least 0.
        name: Likewise.
        start: Position of the first image, at least 0.
        count: Number of images.
    """

    entropy: tuple[int, ...]
    name: str
    start: int
    count: int

    def uniform(self, purpose: str, *shape: int) -> Floats:
        """[count, *shape] numbers in (0, 1): odd multiples of 2^-53. 1 and 0 never occur.

        Args:
            purpose: Names the stream; another purpose gives independent numbers.
            shape: Of the numbers of one image.
        """
        words = (self.name.encode(), purpose.encode())
        entropy = np.random.SeedSequence([*self.entropy, *map(zlib.crc32, words)])
        key = entropy.generate_state(2, np.uint64)
        steps = -(-math.prod(shape) // _WORDS)
        generator = np.random.Philox(key=key, counter=self.start * steps)
        raw = generator.random_raw(self.count * steps * _WORDS).reshape(self.count, -1)
        numbers = ((raw[:, : math.prod(shape)] >> np.uint64(12)) + 0.5) * 2.0**-52
        return np.asarray(numbers, np.float64).reshape(self.count, *shape)

    def normal(self, purpose: str, *shape: int) -> Floats:
        """[count, *shape] standard normal numbers; see `uniform`."""
        return np.asarray(special.ndtri(self.uniform(purpose, *shape)))

    def integers(self, purpose: str, high: int, *shape: int) -> Integers:
        """[count, *shape] equally likely integers from 0 to `high` - 1; see `uniform`."""
        return (self.uniform(purpose, *shape) * high).astype(np.int64)
