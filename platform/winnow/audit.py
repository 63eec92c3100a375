"""What a look at the blind audit says besides its claims: accuracy, drift, and error against coverage.

Legend: N audit images in the order of their hashes, which no answer decides: any part of that order that no answer
decides either is a random sample.

Intervals are Clopper and Pearson's ("The use of confidence or fiducial limits illustrated in the case of the binomial",
1934) at 95 %, each for itself: of twenty that are looked at, one may be wrong. Only ``winnow.risk`` promises anything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from winnow.risk import THRESHOLDS, upper_bound

CONFIDENCE = 0.95
"""Of every interval here."""

ALARM = 0.05
"""Without drift an alarm is at most this likely, look by look."""


@dataclass(frozen=True)
class Share:
    """A part of a sample, and what that says about all images.

    Attributes:
        num: images of the sample.
        num_hits: those counted.
        value: ``num_hits / num``; None of no images.
        low, high: 95 % interval of the share among all images.
    """

    num: int
    num_hits: int
    value: float | None
    low: float
    high: float

    @classmethod
    def of(cls, num_hits: int, num: int, confidence: float = CONFIDENCE) -> Self:
        """With Clopper and Pearson's two-sided interval, which is exact: it never covers too rarely."""
        beyond = (1.0 - confidence) / 2.0
        low, high = 1.0 - upper_bound(num - num_hits, num, beyond), upper_bound(num_hits, num, beyond)
        return cls(num, num_hits, num_hits / num if num else None, low, high)


@dataclass(frozen=True)
class CurvePoint:
    """All answers from some confidence on.

    Attributes:
        threshold: least confidence of an answer that is kept.
        coverage: share of the audit images whose answer is kept.
        error: share of wrong answers among those kept.
    """

    threshold: float
    coverage: float
    error: Share


@dataclass(frozen=True)
class Drift:
    """Audit images that the look before had not seen against those that it had, both as the model answers them now.

    Attributes:
        before, new: share of right answers.
        confidence_before, confidence_new: mean confidence of the answers; None of no images.
        p_value: of Fisher's exact test, two-sided: how likely a difference as large is without drift.
        alarm: ``p_value`` is at most ``ALARM``.
    """

    before: Share
    new: Share
    confidence_before: float | None
    confidence_new: float | None
    p_value: float
    alarm: bool


@dataclass(frozen=True)
class AuditStatistics:
    """What one look says.

    Attributes:
        accuracy: share of right answers: of the answers to all images like those of the reserve, had no person looked.
        drift: None when no look came before.
        curve: from the surest answers to all of them.
    """

    accuracy: Share
    drift: Drift | None
    curve: tuple[CurvePoint, ...]

    @classmethod
    def of(
        cls, confidence_N: NDArray[np.floating[Any]], wrong_N: NDArray[np.bool_], seen_N: NDArray[np.bool_] | None
    ) -> Self:
        """From the audit images.

        Args:
            confidence_N: of the model's answers.
            wrong_N: the answer is wrong.
            seen_N: the look before had seen the image; None when there was none.
        """
        accuracy = Share.of(int((~wrong_N).sum()), len(wrong_N))
        drift = None if seen_N is None else drift_between(confidence_N, wrong_N, seen_N)
        return cls(accuracy, drift, coverage_curve(confidence_N, wrong_N))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        values = json.loads(text)
        drift = values["drift"]
        if drift is not None:
            drift = Drift(**{**drift, "before": Share(**drift["before"]), "new": Share(**drift["new"])})
        points = (CurvePoint(**{**point, "error": Share(**point["error"])}) for point in values["curve"])
        return cls(Share(**values["accuracy"]), drift, tuple(points))


def drift_between(
    confidence_N: NDArray[np.floating[Any]], wrong_N: NDArray[np.bool_], seen_N: NDArray[np.bool_]
) -> Drift:
    """Whether images are answered better or worse than those seen before.

    Without drift, which images were seen before says nothing about their answers, so the right answers among them are
    hypergeometric: Fisher's exact test ("The Logic of Inductive Inference", 1935), which alarms too rarely rather than
    too often, however few images there are.

    Args:
        confidence_N: of the model's answers.
        wrong_N: the answer is wrong.
        seen_N: the image was seen before.
    """
    from scipy.stats import fisher_exact

    sides = [(int((~wrong_N[side]).sum()), int(side.sum())) for side in (seen_N, ~seen_N)]
    before, new = (Share.of(num_right, num) for num_right, num in sides)
    p_value = float(fisher_exact([[num_right, num - num_right] for num_right, num in sides]).pvalue)
    means = [float(confidence_N[side].mean()) if side.any() else None for side in (seen_N, ~seen_N)]
    return Drift(before, new, means[0], means[1], p_value, p_value <= ALARM)


def coverage_curve(
    confidence_N: NDArray[np.floating[Any]],
    wrong_N: NDArray[np.bool_],
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[CurvePoint, ...]:
    """Error rate of what is kept, threshold by threshold; of thresholds that keep the same images, the lowest.

    Each interval holds for its point alone. A threshold picked by its interval here promises nothing.
    """
    found: dict[int, CurvePoint] = {}
    for threshold in thresholds:
        kept_N = confidence_N >= threshold
        num = int(kept_N.sum())
        if num:
            found[num] = CurvePoint(threshold, num / len(wrong_N), Share.of(int(wrong_N[kept_N].sum()), num))
    return tuple(found.values())
