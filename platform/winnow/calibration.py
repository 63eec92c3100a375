"""Probabilities that mean what they say: one temperature for all logits, and how far confidence is from accuracy.

Legend: N images (or pixels), C classes; ``labels_N`` int64 (N,), class indices.

Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (2017), sections 2 and 4.2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

LEAST_IMAGES = 20
"""With fewer images no temperature is fitted: it is 1."""

HIGHEST = 100.0
"""Temperatures lie in [1 / HIGHEST, HIGHEST]."""

NUM_BINS = 15


def fit_temperature(logits_NC: Floats, labels_N: Labels) -> float:
    """The T above 0 for which ``softmax(logits / T)`` has the least log-loss; 1.0 of fewer than ``LEAST_IMAGES``.

    Every label counts as a share of 1 / (N + 1) spread evenly over all classes, as if one image of unknown class had
    been seen too. Without it a few images that are all right would make T nothing, and every answer certain; Platt,
    "Probabilistic Outputs for Support Vector Machines" (1999), section 2.2, does likewise for two classes. What the
    likeliest class is does not change.

    Raises:
        ValueError: logits that are not finite.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    if len(labels_N) < LEAST_IMAGES:
        return 1.0
    logits_NC = np.asarray(logits_NC, dtype=np.float64)
    if not np.isfinite(logits_NC).all():
        raise ValueError("logits are NaN or infinite; leave these images out")
    logits_NC = logits_NC - logits_NC.max(axis=1, keepdims=True)
    unknown = 1 / (len(labels_N) + 1)
    of_labels = float(logits_NC[np.arange(len(labels_N)), labels_N].mean())
    expected = (1 - unknown) * of_labels + unknown * float(logits_NC.mean())

    def loss(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        return float(logsumexp(logits_NC * inverse, axis=1).mean()) - expected * inverse

    edge = math.log(HIGHEST)
    found = minimize_scalar(loss, bounds=(-edge, edge), method="bounded", options={"xatol": 1e-5})
    return math.exp(float(found.x))


def reliability(probabilities_NC: Floats, labels_N: Labels, num_bins: int = NUM_BINS) -> list[dict[str, Any]]:
    """Images by the probability of the likeliest class, in bins of equal width, the lowest first.

    Each with its edges ``above`` and ``to``, ``n`` images, their mean ``confidence`` and their ``accuracy``. Bins
    without images are left out, and so are rows of NaN.
    """
    answered_N = np.isfinite(probabilities_NC).all(axis=1)
    probabilities_NC, labels_N = probabilities_NC[answered_N], labels_N[answered_N]
    if not len(labels_N):
        return []
    confidence_N = probabilities_NC.max(axis=1).astype(np.float64)
    right_N = probabilities_NC.argmax(axis=1) == labels_N
    bin_N = np.clip(np.ceil(confidence_N * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    return [
        {
            "above": float(number / num_bins),
            "to": float((number + 1) / num_bins),
            "n": int((bin_N == number).sum()),
            "confidence": float(confidence_N[bin_N == number].mean()),
            "accuracy": float(right_N[bin_N == number].mean()),
        }
        for number in np.unique(bin_N)
    ]


def expected_calibration_error(probabilities_NC: Floats, labels_N: Labels, num_bins: int = NUM_BINS) -> float:
    """Mean distance of confidence and accuracy over the bins of ``reliability``, weighted by images; NaN of none.

    Of few images it is above 0 also where probabilities are true: around .05 for 300 images.
    """
    bins = reliability(probabilities_NC, labels_N, num_bins)
    num_images = sum(each["n"] for each in bins)
    if not num_images:
        return math.nan
    return float(sum(each["n"] * abs(each["confidence"] - each["accuracy"]) for each in bins) / num_images)


def calibration_metrics(logits_NC: Floats, labels_N: Labels, temperature: float) -> dict[str, Any]:
    """ECE and log-loss (nats) before and after division by the temperature, and the ``bins`` of ``reliability`` after.

    Of no images there is only ``n``.
    """
    from winnow.metrics import log_loss
    from winnow.uncertainty import softmax

    if not len(labels_N):
        return {"n": 0}
    before_NC, after_NC = softmax(logits_NC), softmax(logits_NC / temperature)
    return {
        "n": len(labels_N),
        "ece_before": expected_calibration_error(before_NC, labels_N),
        "ece": expected_calibration_error(after_NC, labels_N),
        "log_loss_before": log_loss(labels_N, before_NC),
        "log_loss": log_loss(labels_N, after_NC),
        "bins": reliability(after_NC, labels_N),
    }
