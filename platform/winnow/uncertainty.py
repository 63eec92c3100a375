"""How sure a classifier is, from its probabilities alone.

Shapes: ``logits_NC`` and ``probabilities_NC`` (N, C), one row per image; results (N,) or (N, k). float32 throughout.
``probabilities_VNC`` (V, N, C): the same images seen in V ways.
A row of NaN, which is what ``softmax`` makes of logits that are not all finite, gives NaN everywhere.

Least confidence, margin and entropy are the three measures of Settles, "Active Learning Literature Survey"
(2009), section 3.1, stated there as what to ask people about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Float32s = NDArray[np.float32]


def softmax(logits_NC: Floats) -> Float32s:
    """Probabilities, float32 (N, C), rows sum to 1. A row with a logit that is NaN or infinite is NaN throughout.

    ``exp(z_i) / Σ exp(z_j)`` with the row's maximum subtracted first (Goodfellow et al., "Deep Learning", section 4.1).
    """
    logits_NC = np.asarray(logits_NC, dtype=np.float32)
    finite_N = is_answered(logits_NC)
    safe_NC = np.where(finite_N[:, None], logits_NC, np.float32(0))
    powers_NC = np.exp(safe_NC - safe_NC.max(axis=1, keepdims=True))
    probabilities_NC: Float32s = powers_NC / powers_NC.sum(axis=1, keepdims=True)
    probabilities_NC[~finite_N] = np.nan
    return probabilities_NC


def sigmoid(logits_NC: Floats) -> Float32s:
    """Probability of each class on its own, float32 (N, C). A row with a logit that is not finite is NaN throughout."""
    from scipy.special import expit

    probabilities_NC = np.asarray(expit(np.asarray(logits_NC, dtype=np.float32)), dtype=np.float32)
    probabilities_NC[~is_answered(logits_NC)] = np.nan
    return probabilities_NC


def is_answered(probabilities_NC: Floats) -> NDArray[np.bool_]:
    """True for the rows that are finite throughout, bool (N,). The others are failures ``not_finite``."""
    return np.asarray(np.isfinite(probabilities_NC).all(axis=1), dtype=np.bool_)


def confidence(probabilities_NC: Floats) -> Float32s:
    """Probability of the likeliest class, float32 (N,), in [1/C, 1]. Low means uncertain (Lewis & Gale 1994)."""
    return np.asarray(probabilities_NC.max(axis=1), dtype=np.float32)


def margin(probabilities_NC: Floats) -> Float32s:
    """Probability of the likeliest class minus that of the second, float32 (N,), in [0, 1].

    Low means uncertain (Scheffer et al. 2001).
    """
    if probabilities_NC.shape[1] < 2:
        raise ValueError("a margin needs at least two classes")
    top_N2 = np.partition(probabilities_NC, -2, axis=1)[:, -2:]
    return np.asarray(top_N2[:, 1] - top_N2[:, 0], dtype=np.float32)


def entropy(probabilities_NC: Floats) -> Float32s:
    """Entropy, the sum of -p ln p, in nats, float32 (N,), in [0, ln C]; 0 ln 0 is 0.

    High means uncertain (Shannon 1948).
    Divide by ln C to compare tasks of different numbers of classes.
    """
    return np.asarray(_entropy(probabilities_NC.astype(np.float64)), dtype=np.float32)


def _entropy(probabilities_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    logs_NC = np.log(probabilities_NC, out=np.zeros_like(probabilities_NC), where=probabilities_NC != 0)
    return np.asarray(np.abs((probabilities_NC * logs_NC).sum(axis=1)))


def disagreement(probabilities_VNC: Floats) -> Float32s:
    """How much the views of an image disagree, in nats, float32 (N,), in [0, ln min(V, C)].

    The entropy of the mean minus the mean of the entropies: ``H(1/V Σ p_v) - 1/V Σ H(p_v)``. It is the mutual
    information of Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning" (2011),
    equation 2, with views in the place of models; and the Jensen-Shannon divergence of Lin (1991). 0 when all agree,
    however unsure each may be.
    """
    wide_VNC = probabilities_VNC.astype(np.float64)
    mean_entropy_N = np.mean([_entropy(view_NC) for view_NC in wide_VNC], axis=0)
    # Never negative but for rounding; NaN stays NaN.
    return np.asarray(np.maximum(_entropy(wide_VNC.mean(axis=0)) - mean_entropy_N, 0.0), dtype=np.float32)


# ------------------------------------------------------------------------------ where an image may have several classes


def confidence_of_sets(probabilities_NC: Floats) -> Float32s:
    """Probability of the least sure decision, present or not, of an image's classes, float32 (N,), in [0.5, 1]."""
    return np.asarray(np.maximum(probabilities_NC, 1.0 - probabilities_NC).min(axis=1), dtype=np.float32)


def margin_of_sets(probabilities_NC: Floats) -> Float32s:
    """How far the least sure class is from being as likely present as not: ``min |2p - 1|``, float32 (N,)."""
    return np.asarray(np.abs(2.0 * probabilities_NC - 1.0).min(axis=1), dtype=np.float32)


def entropy_of_sets(probabilities_NC: Floats) -> Float32s:
    """Entropy of all decisions, taken as independent, in nats, float32 (N,), in [0, C ln 2]."""
    return np.asarray(_entropy_of_decisions(probabilities_NC).sum(axis=1), dtype=np.float32)


def disagreement_of_sets(probabilities_VNC: Floats) -> Float32s:
    """As ``disagreement``, added up over the decisions about each class, in nats, float32 (N,)."""
    means_NC = np.mean([_entropy_of_decisions(view_NC) for view_NC in probabilities_VNC], axis=0)
    of_mean_NC = _entropy_of_decisions(probabilities_VNC.mean(axis=0))
    return np.asarray(np.maximum((of_mean_NC - means_NC).sum(axis=1), 0.0), dtype=np.float32)


def _entropy_of_decisions(probabilities_NC: Floats) -> NDArray[np.float64]:
    """In nats, (N, C)."""
    shape = probabilities_NC.shape
    chances = np.stack([probabilities_NC, 1.0 - probabilities_NC], axis=-1).astype(np.float64)
    return _entropy(chances.reshape(-1, 2)).reshape(shape)


# -------------------------------------------------------------------------------------------------------- likeliest


def top_k(probabilities_NC: Floats, k: int) -> tuple[NDArray[np.int64], Float32s]:
    """Classes and probabilities of the ``min(k, C)`` likeliest, most likely first, int64 and float32 (N, k).

    Of equal probabilities the class that comes first is taken, as ``argmax`` does. Rows of NaN give class 0 and NaN.
    """
    if k < 1:
        raise ValueError(f"k = {k} must be at least 1")
    rest_NC = np.where(np.isnan(probabilities_NC), np.float32(-1), probabilities_NC).astype(np.float32)
    k = min(k, rest_NC.shape[1])
    rows_N = np.arange(len(rest_NC))
    indices_NK = np.empty((len(rest_NC), k), dtype=np.int64)
    for rank in range(k):  # k passes of argmax are faster than sorting, and break ties by class
        indices_NK[:, rank] = rest_NC.argmax(axis=1)
        rest_NC[rows_N, indices_NK[:, rank]] = -2.0
    scores_NK = np.take_along_axis(probabilities_NC, indices_NK, axis=1).astype(np.float32)
    return indices_NK, scores_NK
