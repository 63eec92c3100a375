"""How far people agree who answered the same images, and what they say together.

Legend: N images, C answers that can be given; ``counts_NC`` int (N, C): how many people gave which answer.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from winnow.masks import LabelMap, unlabelled

Vote = TypeVar("Vote", bound=Hashable)


def majority(votes: Sequence[Vote]) -> Vote | None:
    """What more people said than anything else; None when nobody voted or several answers are ahead together."""
    ahead = Counter(votes).most_common(2)
    if not ahead or (len(ahead) == 2 and ahead[0][1] == ahead[1][1]):
        return None
    return ahead[0][0]


def percent_agreement(counts_NC: NDArray[Any]) -> float | None:
    """Share of pairs of people, mean over images, who gave the same answer; None without an image that two answered.

    The observed agreement of Fleiss, "Measuring nominal scale agreement among many raters" (1971), equation 3, which
    for two people is the share of images on which they agree.
    """
    counts_NC = _by_two(counts_NC)
    return float(_agreeing_N(counts_NC).mean()) if len(counts_NC) else None


def cohen_kappa(first: Sequence[Vote], second: Sequence[Vote]) -> float | None:
    """Agreement of two people beyond chance, from each one's own habits; 1 is perfect, 0 is chance.

    Cohen, "A coefficient of agreement for nominal scales" (1960). None without images, or when both always gave the
    same one answer, of which chance alone would make as much.

    Args:
        first: the answers of one person.
        second: those of the other, to the same images in the same order.
    """
    if len(first) != len(second):
        raise ValueError(f"both must have answered the same images: {len(first)} and {len(second)} answers")
    if not first:
        return None
    answers = {answer: number for number, answer in enumerate(dict.fromkeys([*first, *second]))}
    shares = [
        np.bincount([answers[vote] for vote in votes], minlength=len(answers)) / len(votes) for votes in (first, second)
    ]
    observed = sum(one == other for one, other in zip(first, second, strict=True)) / len(first)
    return _beyond_chance(observed, float(shares[0] @ shares[1]))


def fleiss_kappa(counts_NC: NDArray[Any]) -> float | None:
    """Agreement of any number of people beyond chance, from everybody's habits together; 1 is perfect, 0 is chance.

    Fleiss (1971), equations 2 to 7. Where images were answered by different numbers of people, each image's agreement
    is that of its own pairs, and answers count with all people; images of one person alone do not count. None when no
    image was answered by two, or all gave the same one answer.
    """
    counts_NC = _by_two(counts_NC)
    if not len(counts_NC):
        return None
    shares_C = counts_NC.sum(axis=0) / counts_NC.sum()
    return _beyond_chance(float(_agreeing_N(counts_NC).mean()), float(np.square(shares_C).sum()))


def mask_agreement(maps: Sequence[LabelMap]) -> float | None:
    """Mean IoU of every two of several label maps of one image: mean over the classes in either, then over the pairs.

    Pixels that one of the two left without a label do not count. None with fewer than two maps, or when no two have
    labelled a pixel in common.
    """
    found = [iou for one, other in itertools.combinations(maps, 2) if (iou := _mean_iou(one, other)) is not None]
    return float(np.mean(found)) if found else None


def majority_map(maps: Sequence[LabelMap]) -> LabelMap:
    """The class that more people gave to a pixel than any other; where several are ahead together, not labelled.

    A pixel that a person left without a label is no vote of that person.

    Args:
        maps: at least one, all of one shape and type, with the same meaning of their values.
    """
    void = unlabelled(maps[0])
    maps_KHW = np.stack(maps)
    best_HW = np.full(maps[0].shape, void, dtype=maps[0].dtype)
    most_HW = np.zeros(maps[0].shape, dtype=np.int32)
    for value in np.unique(maps_KHW):
        if value == void:
            continue
        votes_HW = (maps_KHW == value).sum(axis=0)
        best_HW[votes_HW == most_HW] = void
        ahead_HW = votes_HW > most_HW
        best_HW[ahead_HW] = value
        most_HW[ahead_HW] = votes_HW[ahead_HW]
    return best_HW


# --------------------------------------------------------------------------------------------------------------- inside


def _by_two(counts_NC: NDArray[Any]) -> NDArray[Any]:
    """Rows of images that at least two people answered."""
    return np.asarray(counts_NC[counts_NC.sum(axis=1) > 1])


def _agreeing_N(counts_NC: NDArray[Any]) -> NDArray[np.float64]:
    """Share of the pairs of people who agree, by image."""
    people_N = counts_NC.sum(axis=1)
    return np.asarray((counts_NC * (counts_NC - 1)).sum(axis=1) / (people_N * (people_N - 1)))


def _beyond_chance(observed: float, by_chance: float) -> float | None:
    return None if by_chance >= 1.0 else (observed - by_chance) / (1.0 - by_chance)


def _mean_iou(one_HW: LabelMap, other_HW: LabelMap) -> float | None:
    known = (one_HW != unlabelled(one_HW)) & (other_HW != unlabelled(other_HW))
    one, other = one_HW[known], other_HW[known]
    ious = [
        ((one == value) & (other == value)).sum() / ((one == value) | (other == value)).sum()
        for value in np.union1d(one, other)
    ]
    return float(np.mean(ious)) if ious else None
