"""Intervals: within which the true figure lies, given the images that were measured.

Legend: N images, B draws of a bootstrap, F figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

CONFIDENCE = 0.95

NUM_DRAWS = 10_000
"""Of a bootstrap: enough for the tails that comparing twenty classes at once needs."""

LEAST_TO_DRAW = 10
"""Images below which a bootstrap says nothing: so few images drawn again and again look alike."""

_AT_ONCE = 4_000_000
"""Weights in memory at a time."""


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def wilson(num: int, num_of: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a share, in [0, 1]: Wilson's score interval.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927); recommended
    for few images too by Brown, Cai & DasGupta, "Interval estimation for a binomial proportion" (2001), equation 4.

    Args:
        num: images that are so.
        num_of: images.
        confidence: in (0, 1).
    """
    if not 0 <= num <= num_of:
        raise ValueError(f"{num} of {num_of} images")
    if not num_of:
        return Interval(0.0, 1.0)
    z = _z(confidence)
    centre = (num + z * z / 2.0) / (num_of + z * z)
    half = z / (num_of + z * z) * math.sqrt(num * (num_of - num) / num_of + z * z / 4.0)
    # At the borders it is exact, but for rounding.
    return Interval(centre - half if num else 0.0, centre + half if num < num_of else 1.0)


def _z(confidence: float) -> float:
    """Standard errors that hold so much of a normal distribution, on both sides together."""
    return float(ndtri(0.5 + confidence / 2.0))


def paired_difference(num_gained: int, num_lost: int, num_of: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the difference of two shares of the same images, in [-1, 1]: Tango's score interval.

    The differences that a score test does not rule out: without 0 exactly where McNemar's test finds a difference.
    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17 (1998), equations 9 to 12; recommended also for few images by Fagerland, Lydersen & Laake,
    "Recommended tests and confidence intervals for paired binomial proportions" (2014).

    Args:
        num_gained: images that are so by the second share alone.
        num_lost: images that are so by the first share alone.
        num_of: images.
        confidence: in (0, 1).

    Returns:
        Of the second share minus the first.
    """
    from scipy.optimize import brentq

    if num_gained < 0 or num_lost < 0 or num_gained + num_lost > num_of:
        raise ValueError(f"{num_gained} and {num_lost} of {num_of} images")
    if not num_of:
        return Interval(-1.0, 1.0)
    z = _z(confidence)
    found = (num_gained - num_lost) / num_of

    def score(difference: float) -> float:
        """How many standard errors the observed difference lies above this one."""
        a = 2.0 * num_of
        b = (2.0 * num_of - num_gained + num_lost) * difference - num_gained - num_lost
        c = -num_lost * difference * (1.0 - difference)
        only_lost = (math.sqrt(max(0.0, b * b - 4.0 * a * c)) - b) / (
            2.0 * a
        )  # its likeliest share under the difference
        variance = num_of * (2.0 * only_lost + difference * (1.0 - difference))
        away = num_gained - num_lost - num_of * difference
        return away / math.sqrt(variance) if variance > 0.0 else math.copysign(1e9, away) if away else 0.0

    def end(sign: float) -> float:
        bound = -sign
        if found == bound:
            return bound
        return float(brentq(lambda difference: score(difference) - sign * z, bound, found, xtol=1e-9))

    return Interval(end(1.0), end(-1.0))


def bootstrap(
    figures: Callable[[NDArray[np.float64]], NDArray[np.floating[Any]]], num_of: int, *, seed: int = 0
) -> NDArray[np.floating[Any]]:
    """Figures of ``NUM_DRAWS`` samples drawn from the images with replacement, float (B, F).

    An interval is what lies between two quantiles of a column (``between``): the percentile method, Efron & Tibshirani,
    "An Introduction to the Bootstrap" (1993), chapter 13. Figures of two models on the same draws are paired.

    Args:
        figures: of weights float64 (B, N), how often each image was drawn, figures (B, F).
        num_of: images.
        seed: the same one gives the same draws.
    """
    random = np.random.default_rng(seed)
    step = max(1, min(NUM_DRAWS, _AT_ONCE // max(1, num_of)))
    shares = np.full(num_of, 1.0 / num_of)
    return np.concatenate(
        [
            figures(random.multinomial(num_of, shares, size=min(step, NUM_DRAWS - start)).astype(np.float64))
            for start in range(0, NUM_DRAWS, step)
        ]
    )


def between(draws_B: NDArray[np.floating[Any]], confidence: float = CONFIDENCE) -> Interval:
    """What lies between the quantiles of a figure's draws; NaN, of draws without the figure, is left out."""
    rest = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(draws_B, [rest, 1.0 - rest])
    return Interval(float(low), float(high))
