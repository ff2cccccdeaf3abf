"""How sure a classifier is of its answers, as a loss and as a threshold."""

from __future__ import annotations

import math

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """H(p) = −Σ p ln p of p = softmax(logits), in nats: from 0, sure, to ln K, guessing.

    Its gradient is ∂H/∂z_k = −p_k (ln p_k + H); finite however sure an answer is.

    Args:
        logits: [..., K].

    Returns:
        [...].
    """
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """H of the mean of several answers: low where each is sure and all agree.

    MEMO (Zhang et al. 2022, arXiv 2110.09506) minimises it over augmented copies of one sample.

    Args:
        logits: [..., V, K], V answers to average.

    Returns:
        [...], in nats.
    """
    log_p = logits.log_softmax(-1).logsumexp(-2) - math.log(logits.shape[-2])
    return -(log_p.exp() * log_p).sum(-1)


def threshold(share: float, n_outputs: int) -> float:
    """`share` of the largest entropy of n_outputs classes, share · ln K, in nats."""
    return share * math.log(n_outputs)
