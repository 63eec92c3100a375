"""Two models on the same images: which is better, by how much, for which classes, and whether it may be promoted.

Legend: N images, C classes, B draws of a bootstrap. Of classification the score of a model is its accuracy and that of
a class its recall; of segmentation the mean IoU and the IoU (formulas: ``winnow.metrics``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from winnow.config import PromotionConfig
from winnow.intervals import CONFIDENCE, LEAST_TO_DRAW, Interval, between, bootstrap, paired_difference, wilson

Measure = Literal["accuracy", "mean_iou"]

MEASURES: dict[Measure, str] = {"accuracy": "accuracy", "mean_iou": "mean IoU"}
"""Names for people."""

LEAST_SLICE = 20
"""Images below which a slice is not looked at on its own: its interval would span almost everything."""

_NUM_BINS = 4


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, interval: Interval) -> Self:
        return cls(value, *interval)


@dataclass(frozen=True)
class ClassFigures:
    """A model on one class.

    Attributes:
        n: images with the class.
        score: recall, or IoU.
        precision, f1: of classification; None where nothing can be said.
    """

    n: int
    score: float
    precision: float | None = None
    f1: float | None = None


@dataclass(frozen=True)
class Measured:
    """A model on all images, and on each class that is a label of one."""

    score: Estimate
    classes: dict[str, ClassFigures]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        measure: what the scores are.
        n: images.
        candidate, baseline: each model; the baseline is None where there is none to compare with.
        difference: of the scores, candidate minus baseline.
        classes: the same of each class; these intervals hold all together at 95 %, and are wider than one alone.
    """

    measure: Measure
    n: int
    candidate: Measured
    baseline: Measured | None
    difference: Estimate | None
    classes: dict[str, Estimate]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What ``dataclasses.asdict`` made of one."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_python(data)


def _joint(num_classes: int) -> float:
    """Confidence of each of so many intervals that hold all together (Bonferroni)."""
    return 1.0 - (1.0 - CONFIDENCE) / max(1, num_classes)


# ----------------------------------------------------------------------------------------------------------- classes


def compare_labels(
    labels: Sequence[AbstractSet[str]],
    candidate: Sequence[AbstractSet[str] | None],
    baseline: Sequence[AbstractSet[str] | None] | None,
) -> Comparison:
    """Compare what two classifiers answered. An image is right when its classes are exactly those of its label.

    A class counts by itself: its score is the share of its images where it was answered, whatever else was.

    Args:
        labels: names of the true classes of each of N images, at least one image: one class, or any number of them.
        candidate: answers, N; None where the model could give none, which is wrong.
        baseline: likewise; None without a model to compare with.
    """
    names = sorted(set().union(*labels))
    of_class_NC = _membership(labels, names)
    found_NC = _membership(candidate, names)
    right_N = right_sets(labels, candidate)
    measured = _measure_labels(right_N, of_class_NC, found_NC, names)
    if baseline is None:
        return Comparison("accuracy", len(labels), measured, None, None, {})
    was_found_NC = _membership(baseline, names)
    was_right_N = right_sets(labels, baseline)
    return Comparison(
        "accuracy",
        len(labels),
        measured,
        _measure_labels(was_right_N, of_class_NC, was_found_NC, names),
        _difference(right_N, was_right_N, CONFIDENCE),
        {
            name: _difference(found_NC[of_N, place], was_found_NC[of_N, place], _joint(len(names)))
            for place, (name, of_N) in enumerate(zip(names, of_class_NC.T, strict=True))
        },
    )


def right_sets(labels: Sequence[AbstractSet[str]], answers: Sequence[AbstractSet[str] | None]) -> NDArray[np.bool_]:
    """Which answers are exactly the label, bool (N,)."""
    return np.array([label == answer for label, answer in zip(labels, answers, strict=True)], dtype=np.bool_)


def share_right(right_N: NDArray[np.bool_]) -> Estimate:
    """Accuracy on at least one image."""
    return Estimate.of(float(right_N.mean()), wilson(int(right_N.sum()), len(right_N)))


def _difference(right_N: NDArray[np.bool_], was_right_N: NDArray[np.bool_], confidence: float) -> Estimate:
    gained, lost = int((right_N & ~was_right_N).sum()), int((was_right_N & ~right_N).sum())
    return Estimate.of((gained - lost) / len(right_N), paired_difference(gained, lost, len(right_N), confidence))


def _membership(answers: Sequence[AbstractSet[str] | None], names: Sequence[str]) -> NDArray[np.bool_]:
    """Which of the named classes each answer has, bool (N, C)."""
    places = {name: place for place, name in enumerate(names)}
    found_NC = np.zeros((len(answers), len(names)), dtype=np.bool_)
    for number, answer in enumerate(answers):
        found_NC[number, [places[name] for name in answer or () if name in places]] = True
    return found_NC


def _measure_labels(
    right_N: NDArray[np.bool_], of_class_NC: NDArray[np.bool_], found_NC: NDArray[np.bool_], names: Sequence[str]
) -> Measured:
    labelled, answered = of_class_NC.sum(axis=0), found_NC.sum(axis=0)
    right = (of_class_NC & found_NC).sum(axis=0)
    return Measured(
        share_right(right_N),
        {
            name: ClassFigures(
                n=int(labelled[place]),
                score=float(right[place] / labelled[place]),
                precision=float(right[place] / answered[place]) if answered[place] else None,
                f1=float(2 * right[place] / (labelled[place] + answered[place])),
            )
            for place, name in enumerate(names)
        },
    )


# ------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Pixels:
    """Labelled pixels of each image, int64 (N, C): answered rightly, labelled, and answered as each class."""

    right_NC: NDArray[np.int64]
    labelled_NC: NDArray[np.int64]
    answered_NC: NDArray[np.int64]

    def of(self, inside_N: NDArray[np.bool_]) -> Pixels:
        """Those of some images."""
        return Pixels(self.right_NC[inside_N], self.labelled_NC[inside_N], self.answered_NC[inside_N])

    def iou(self, weights_BN: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean IoU and IoU of each class, float64 (B, 1 + C), of images that count so often; NaN without a pixel."""
        right_BC = weights_BN @ self.right_NC
        below_BC = weights_BN @ (self.labelled_NC + self.answered_NC) - right_BC
        iou_BC = np.divide(right_BC, below_BC, out=np.full(right_BC.shape, np.nan), where=below_BC > 0)
        known_B = (below_BC > 0).sum(axis=1)
        mean_B = np.divide(np.nansum(iou_BC, axis=1), known_B, out=np.full(len(known_B), np.nan), where=known_B > 0)
        return np.concatenate([mean_B[:, None], iou_BC], axis=1)


def compare_masks(candidate: Pixels, baseline: Pixels | None, classes: Sequence[str]) -> Comparison:
    """Compare the masks of two models on images of which at least one pixel is labelled.

    Args:
        candidate: pixels of one model.
        baseline: of the other, of the same images; None without a model to compare with.
        classes: C names.
    """
    n = len(candidate.right_NC)
    has_class_NC = candidate.labelled_NC > 0
    places = [place for place in range(len(classes)) if has_class_NC[:, place].any()]
    whole = np.ones((1, n))

    def measured(pixels: Pixels, draws: NDArray[np.floating[Any]]) -> Measured:
        found = pixels.iou(whole)[0]
        return Measured(
            Estimate.of(float(found[0]), _between(draws[:, 0], n, Interval(0.0, 1.0))),
            {
                classes[place]: ClassFigures(int(has_class_NC[:, place].sum()), float(found[1 + place]))
                for place in places
            },
        )

    if baseline is None:
        return Comparison("mean_iou", n, measured(candidate, _draws(candidate.iou, n)), None, None, {})
    draws = _draws(lambda weights: np.concatenate([candidate.iou(weights), baseline.iou(weights)], axis=1), n)
    of_candidate, of_baseline = np.split(draws, 2, axis=1)
    change = (candidate.iou(whole) - baseline.iou(whole))[0]
    changes = of_candidate - of_baseline
    free = Interval(-1.0, 1.0)
    return Comparison(
        "mean_iou",
        n,
        measured(candidate, of_candidate),
        measured(baseline, of_baseline),
        Estimate.of(float(change[0]), _between(changes[:, 0], n, free)),
        {
            classes[place]: Estimate.of(
                float(change[1 + place]),
                _between(changes[:, 1 + place], int(has_class_NC[:, place].sum()), free, _joint(len(places))),
            )
            for place in places
        },
    )


def mean_iou(pixels: Pixels) -> Estimate:
    """Mean IoU on images of which at least one pixel is labelled."""
    n = len(pixels.right_NC)
    draws = _draws(lambda weights: pixels.iou(weights)[:, :1], n)
    return Estimate.of(float(pixels.iou(np.ones((1, n)))[0, 0]), _between(draws[:, 0], n, Interval(0.0, 1.0)))


def _draws(figures: Callable[[NDArray[np.float64]], NDArray[np.floating[Any]]], n: int) -> NDArray[np.floating[Any]]:
    return bootstrap(figures, n) if n >= LEAST_TO_DRAW else figures(np.ones((1, n)))


def _between(
    draws_B: NDArray[np.floating[Any]], n: int, otherwise: Interval, confidence: float = CONFIDENCE
) -> Interval:
    """The interval of draws; of too few images everything is possible."""
    return between(draws_B, confidence) if n >= LEAST_TO_DRAW else otherwise


# ----------------------------------------------------------------------------------------------------------- promotion


@dataclass(frozen=True)
class Decision:
    """Whether a comparison is enough to promote the candidate.

    Attributes:
        promote: it is.
        reasons: why not, one sentence each; with ``promote``, why.
        worse: classes that got worse than allowed.
        doubtful: classes that fell by more than is allowed, on too few images to tell it from chance.
    """

    promote: bool
    reasons: tuple[str, ...]
    worse: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


def decide(comparison: Comparison, rule: PromotionConfig) -> Decision:
    """Promote if the score rises, its difference's 95 % interval begins above minus the margin, and no class falls.

    A class falls when its recall (or IoU) goes down by more than ``max_class_drop`` and its interval, which holds
    together with those of all other classes, lies below zero: two equal models are refused for their classes in at most
    one of twenty comparisons, however many classes there are. Without a baseline it is enough to be measured.
    """
    name, found = MEASURES[comparison.measure], comparison.difference
    if found is None:
        score = comparison.candidate.score
        return Decision(
            True, (f"there is nothing to compare with; {name} {score.value:.4f} on {comparison.n:,} test images",)
        )
    refused = []
    if found.value <= 0.0:
        refused.append(f"the {name} did not rise: the difference is {found.value:+.4f}")
    if found.low <= -rule.margin:
        refused.append(
            f"the {name} may fall by more than the margin of {rule.margin:g}: the 95 % interval of the difference goes "
            f"from {found.low:+.4f} to {found.high:+.4f}"
        )
    fallen = {name: each for name, each in comparison.classes.items() if each.value < -rule.max_class_drop}
    worse = tuple(name for name, each in fallen.items() if each.high < 0.0)
    figure = "recall" if comparison.measure == "accuracy" else "IoU"
    for label in worse:
        each, before, after = fallen[label], (comparison.baseline or comparison.candidate), comparison.candidate
        refused.append(
            f"{label} got worse by more than {rule.max_class_drop:g}: {figure} {before.classes[label].score:.4f} → "
            f"{after.classes[label].score:.4f} on {after.classes[label].n:,} images, difference {each.value:+.4f} "
            f"({each.low:+.4f} to {each.high:+.4f})"
        )
    doubtful = tuple(name for name in fallen if name not in worse)
    if refused:
        return Decision(False, tuple(refused), worse, doubtful)
    return Decision(
        True,
        (
            f"{name} {found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}) on {comparison.n:,} test images, and "
            f"no class is shown to have got worse by more than {rule.max_class_drop:g}",
        ),
        doubtful=doubtful,
    )


# -------------------------------------------------------------------------------------------------------------- slices


@dataclass(frozen=True)
class Slice:
    """A model on the images that share a value of a column.

    Attributes:
        column: of ``images`` or ``outcomes``, ``folder``, or a key of the images' metadata.
        value: what they share; of numbers a range.
        n: images.
        score: accuracy, or mean IoU.
        low, high: its 95 % interval.
        baseline: score of the model that was compared with.
    """

    column: str
    value: str
    n: int
    score: float
    low: float
    high: float
    baseline: float | None = None


def cut_slices(
    column: str,
    values_N: Sequence[Any],
    score: Callable[[NDArray[np.bool_]], Estimate],
    baseline: Callable[[NDArray[np.bool_]], Estimate] | None = None,
) -> list[Slice]:
    """The slices of a column; those of fewer than ``LEAST_SLICE`` images are one slice together.

    Args:
        column: its name.
        values_N: of each image; numbers are cut at their quartiles, None is a value of its own.
        score: of the images for which the mask (N,) is True.
        baseline: likewise, of the model that was compared with.
    """
    names_N = np.array(_named(values_N), dtype=object)
    counts = Counter(names_N.tolist())
    small = [name for name, n in counts.items() if n < LEAST_SLICE]
    if len(small) > 1:
        together = f"({len(small):,} small values)"
        names_N[np.isin(names_N, small)] = together
        counts = Counter(names_N.tolist())
    found = []
    for name, n in counts.items():
        inside_N = np.asarray(names_N == name, dtype=np.bool_)
        each = score(inside_N)
        before = None if baseline is None else baseline(inside_N).value
        found.append(Slice(column, name, n, each.value, each.low, each.high, before))
    return worst_first(found)


def worst_first(slices: Sequence[Slice]) -> list[Slice]:
    """Slices in the order of the upper ends of their intervals.

    So first comes what is bad for sure, and not what is small: a slice of few images has a wide interval, whose upper
    end stays high however few of them were right.
    """
    return sorted(slices, key=lambda each: (each.high, each.score, each.column, each.value))


def _named(values_N: Sequence[Any]) -> list[str]:
    """The slice of each image."""
    numbers = _numbers(values_N)
    if numbers is None:
        return ["(none)" if value is None else str(value) for value in values_N]
    known = numbers[~np.isnan(numbers)]
    edges = np.unique(np.quantile(known, np.arange(1, _NUM_BINS) / _NUM_BINS))
    bins = np.searchsorted(edges, numbers)  # up to and including the edge
    names = {}
    for number in np.unique(bins[~np.isnan(numbers)]):
        inside = numbers[(bins == number) & ~np.isnan(numbers)]
        names[number] = " – ".join(dict.fromkeys((_shown(inside.min()), _shown(inside.max()))))
    return ["(none)" if math.isnan(value) else names[place] for value, place in zip(numbers, bins, strict=True)]


def _numbers(values_N: Sequence[Any]) -> NDArray[np.float64] | None:
    """The values as numbers, NaN for None; None where they are something else, or too few to cut."""
    try:
        numbers = np.array([math.nan if value is None else float(value) for value in values_N])
    except (TypeError, ValueError):
        return None
    known = numbers[~np.isnan(numbers)]
    return numbers if np.isfinite(known).all() and len(np.unique(known)) > 2 * _NUM_BINS else None


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"
