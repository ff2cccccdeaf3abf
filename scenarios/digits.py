"""Handwritten digits that come with scikit-learn: real, tiny, offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clbench.classification import ClassIncrementalImages, Images, channel_statistics
from clbench.datasets import digit_images
from clbench.samples import TensorSource
from clbench.types import Split


@dataclass(kw_only=True)
class Digits(ClassIncrementalImages):
    """Handwritten digits, 10 classes, 8x8 grey; by default 5 experiences of 2 classes.

    Source: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak 1998, UCI
    Machine Learning Repository, its test part, as bundled with scikit-learn.
    Licence: CC BY 4.0.
    Sizes: 1,797 images.
    Splits: TUNE has one third of every class (599 images), EVALUATE the other two (1,198); they
    share no sample, and within each a quarter is for testing. Which sample is where never changes.
    """

    n_experiences: int = 5

    def images(self, split: Split) -> Images:
        from sklearn.model_selection import train_test_split

        images, targets = digit_images()
        labels = targets.numpy()
        tune, evaluate = _halves(train_test_split, np.arange(len(labels)), labels, 2 / 3)
        chosen = tune if split is Split.TUNE else evaluate
        train, test = _halves(train_test_split, chosen, labels[chosen], 0.25)
        mean, std = channel_statistics(images[train])
        return Images(
            train=TensorSource(images[train], targets[train]),
            test=TensorSource(images[test], targets[test]),
            class_names=[str(d) for d in range(10)],
            mean=mean,
            std=std,
        )


def _halves(
    split: Any, positions: NDArray[np.int64], labels: NDArray[np.int64], share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two stratified parts, the second with this share; always the same ones."""
    first, second = split(positions, test_size=share, stratify=labels, random_state=0)
    return first, second
