"""Which answers may go unseen: a bound on their error rate that holds at a stated confidence, from a blind sample.

Legend: N audit images, drawn at random and labelled blind; T thresholds.

A set of answers is all whose confidence is at least a threshold. Its error rate on all images is at most the
Clopper-Pearson bound of its errors in the sample, with a probability of at least 1 - delta (Clopper & Pearson, "The use
of confidence or fiducial limits illustrated in the case of the binomial", 1934). To choose among many sets without
paying for each, they are tested in an order that no label decides, from the surest on, and the first that fails ends
it: the fixed-sequence procedure of Angelopoulos et al., "Learn then Test" (2021), section 4. Looking again at a larger
sample is paid for: the k-th look spends delta / (k (k + 1)), and all looks together no more than delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

THRESHOLDS = tuple(round(1.0 - step / 200, 3) for step in range(201))
"""Thresholds that are tested, from the surest on: 1.000, 0.995, … 0. Fixed, so that no label decides them."""


_ALLOWED = (3, 2, 1, 0)
"""Errors that the first set tested may have: without any, one unlucky image among the surest would end it all."""


@dataclass(frozen=True)
class Claim:
    """A set of answers with a bound on its error rate.

    Attributes:
        threshold: least confidence of its answers.
        bound: the error rate is at most this, at the confidence asked for.
        num_audited: images of the sample that are in the set.
        num_wrong: of those, images whose answer is wrong.
    """

    threshold: float
    bound: float
    num_audited: int
    num_wrong: int


def upper_bound(num_wrong: int, num: int, delta: float) -> float:
    """The largest error rate that so few errors do not rule out: Clopper and Pearson's one-sided upper limit.

    Args:
        num_wrong: errors in the sample.
        num: images in the sample.
        delta: probability with which the true rate may exceed the result, in (0, 1).
    """
    if not 0 <= num_wrong <= num:
        raise ValueError(f"{num_wrong} errors among {num} images")
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta = {delta} must lie between 0 and 1")
    return 1.0 if num_wrong == num else float(betaincinv(num_wrong + 1, num - num_wrong, 1.0 - delta))


def least_sample(max_error: float, delta: float, num_wrong: int = 0) -> int:
    """Images that a claim needs when so many of them are wrong; without errors ``ln delta / ln (1 - max_error)``."""
    if not 0.0 < max_error < 1.0:
        raise ValueError(f"max_error = {max_error} must lie between 0 and 1")
    low, high = num_wrong + 1, max(2, math.ceil((num_wrong + 1) / max_error))
    while upper_bound(num_wrong, high, delta) > max_error:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if upper_bound(num_wrong, middle, delta) <= max_error else (middle + 1, high)
    return low


def share_of_look(delta: float, look: int) -> float:
    """What the look of that number, from 1 on, may spend: all of them together spend delta."""
    if look < 1:
        raise ValueError(f"looks count from 1, not {look}")
    return delta / (look * (look + 1))


def largest_claim(
    confidence_N: NDArray[np.floating[Any]], wrong_N: NDArray[np.bool_], max_error: float, delta: float
) -> Claim | None:
    """The largest set of answers whose error rate is at most ``max_error``, with a probability of at least 1 - delta.

    The first set tested is one that a few errors do not fail, as far as there are images enough: how many there are
    depends on confidences, not on labels.

    Args:
        confidence_N: of the answers to the audit images, the surest 1.
        wrong_N: the answer is wrong; an image that was skipped counts as wrong.
        max_error: highest error rate.
        delta: probability with which the promise may be broken; of a look its ``share_of_look``.

    Returns:
        None when the sample supports no claim.
    """
    needed = (least_sample(max_error, delta, num_wrong) for num_wrong in _ALLOWED)
    least = next((num for num in needed if num <= len(wrong_N)), None)
    if least is None:
        return None
    best = None
    for threshold in THRESHOLDS:
        inside_N = confidence_N >= threshold
        num, num_wrong = int(inside_N.sum()), int(wrong_N[inside_N].sum())
        if num < least:
            continue
        bound = upper_bound(num_wrong, num, delta)
        if bound > max_error:
            break
        best = Claim(threshold, bound, num, num_wrong)
    return best
