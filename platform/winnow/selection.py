"""Which images people should see: strategies that rank candidates, and a policy that mixes them by shares.

A strategy knows one reason to ask about an image. ``choose`` takes from each in turn, whichever is furthest behind its
share, so that every beginning of the queue has the policy's mixture and the most useful images come first.

Legend: N candidates, sorted by image_id; C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from winnow.coreset import Coverage

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


# ------------------------------------------------------------------------------------------------------ how useful


def least_confidence(confidence_N: Floats) -> Floats:
    """1 minus the probability of the likeliest class, (N,), in [0, 1) (Lewis & Gale 1994; Settles 2009, equation 1).

    Of masks: of the mean over the pixels.
    """
    return 1.0 - confidence_N


def margin(margin_N: Floats) -> Floats:
    """1 minus the margin between the two likeliest classes, (N,), in [0, 1] (Scheffer et al. 2001; Settles 2009)."""
    return 1.0 - margin_N


def entropy(entropy_N: Floats) -> Floats:
    """Entropy of the classes in nats, (N,) (Shannon 1948; Settles 2009, equation 3).

    Of masks: the mean of the pixels' entropies, Σ area_share · entropy over the segments, as image-wise uncertainty in
    Mackowiak et al., "CEREALS – Cost-Effective REgion-based Active Learning for Semantic Segmentation" (2018).
    """
    return entropy_N


def disagreement(disagreement_N: Floats) -> Floats:
    """How much augmented views of an image disagree, in nats, (N,): ``winnow.uncertainty.disagreement``.

    The mutual information of Houlsby et al. (2011), equation 2, with views in the place of models. Unlike entropy it is
    low where an image is truly ambiguous and every view says so. Of masks: the mean over the pixels.
    """
    return disagreement_N


SCORES: dict[str, Callable[[Floats], Floats]] = {
    "least_confidence": least_confidence,
    "margin": margin,
    "entropy": entropy,
    "disagreement": disagreement,
}
"""Strategies that look at one number of the model's answer, by name."""

COLUMNS = {"least_confidence": "confidence", "margin": "margin", "entropy": "entropy", "disagreement": "disagreement"}
"""The number that each of them looks at: a column of ``predictions``, or the mean over ``segments``."""


# ------------------------------------------------------------------------------------------------------ strategies


class Strategy(Protocol):
    """One reason to ask people about an image."""

    def best(self, taken_N: Bools) -> tuple[int, float] | None:
        """The most useful candidate that is not taken, and how useful it is; None when there is none."""
        ...

    def learn(self, index: int) -> None:
        """A candidate was chosen, by this strategy or another."""
        ...


class Ranking:
    """Candidates by score, the highest first; equal ones by ``ties_N``. Random choice is a ranking without scores.

    Args:
        scores_N: NaN for candidates that are not eligible.
        ties_N: distinct numbers, such as a random permutation.
    """

    def __init__(self, scores_N: Floats, ties_N: Integers) -> None:
        eligible = np.flatnonzero(~np.isnan(scores_N))
        self._order = eligible[np.lexsort((ties_N[eligible], -scores_N[eligible]))]
        self._scores_N = scores_N
        self._next = 0

    def best(self, taken_N: Bools) -> tuple[int, float] | None:
        while self._next < len(self._order):
            index = int(self._order[self._next])
            if not taken_N[index]:
                return index, float(self._scores_N[index])
            self._next += 1
        return None

    def learn(self, index: int) -> None:
        """A ranking does not change."""


class Balance:
    """A candidate of the class of which fewest images are labelled, waiting or chosen; within a class at random.

    After the aim of Bengar et al., "Class-Balanced Active Learning for Image Classification" (2022): a labelled set
    with as many images of each class. They solve for a whole batch; this takes the rarest class greedily. The class of
    an image nobody labelled is the predicted one. The score is 1 / (1 + images of the class).

    Args:
        classes_N: class of each candidate, from 0 on.
        counts_C: images of each class so far.
        ties_N: distinct numbers, such as a random permutation; of equally rare classes the first is taken.
    """

    def __init__(self, classes_N: Integers, counts_C: Integers, ties_N: Integers) -> None:
        self._classes_N = classes_N
        self._counts_C = counts_C.astype(np.float64)
        self._order = np.lexsort((ties_N, classes_N))
        self._next_C = np.searchsorted(classes_N[self._order], np.arange(len(counts_C)))
        self._ends_C = np.append(self._next_C[1:], len(classes_N))

    def best(self, taken_N: Bools) -> tuple[int, float] | None:
        counts_C = np.where(self._next_C < self._ends_C, self._counts_C, np.inf)
        for rarest in np.argsort(counts_C, kind="stable"):
            while self._next_C[rarest] < self._ends_C[rarest]:
                index = int(self._order[self._next_C[rarest]])
                if not taken_N[index]:
                    return index, 1.0 / (1.0 + float(self._counts_C[rarest]))
                self._next_C[rarest] += 1
        return None

    def learn(self, index: int) -> None:
        self._counts_C[self._classes_N[index]] += 1.0


class Spread:
    """The candidate that lies furthest from all that is labelled, waiting or chosen; see ``winnow.coreset``.

    The score is the cosine distance to the nearest of those, at most 2.

    Args:
        coverage: vectors of the candidates that have one; the caller adds to it what is chosen.
        indices_M: candidate of each vector.
    """

    def __init__(self, coverage: Coverage, indices_M: Integers) -> None:
        self._coverage = coverage
        self._indices_M = indices_M

    def best(self, taken_N: Bools) -> tuple[int, float] | None:
        while (found := self._coverage.furthest()) is not None:
            row, distance = found
            index = int(self._indices_M[row])
            if not taken_N[index]:
                return index, distance
            self._coverage.drop(row)
        return None

    def learn(self, index: int) -> None:
        """What is chosen is added to the coverage once, for all strategies."""


# ------------------------------------------------------------------------------------------------------ repetitions


class Repeats:
    """What shows the same as an image that was chosen: the same bytes, the same pixels, or a near-duplicate.

    Args:
        hashes: of each candidate, uint64 (N,), such as of its bytes and of its pixels; 0 where unknown.
        coverage: vectors of the candidates that have one, or None.
        rows_N: of each candidate in ``coverage``; -1 without a vector.
    """

    def __init__(
        self, hashes: tuple[NDArray[np.uint64], ...], coverage: Coverage | None = None, rows_N: Integers | None = None
    ) -> None:
        self._hashes = hashes
        self._seen: tuple[set[int], ...] = tuple(set() for _ in hashes)
        self._coverage = coverage
        self._rows_N = rows_N

    def holds(self, index: int) -> bool:
        """True when the candidate shows what was chosen before."""
        if any(int(hashes_N[index]) in seen for hashes_N, seen in zip(self._hashes, self._seen, strict=True)):
            return True
        row = self._row(index)
        return self._coverage is not None and row >= 0 and self._coverage.is_near(row)

    def add(self, index: int) -> None:
        """Remember a chosen candidate."""
        for hashes_N, seen in zip(self._hashes, self._seen, strict=True):
            if hashes_N[index]:
                seen.add(int(hashes_N[index]))
        if self._coverage is not None and (row := self._row(index)) >= 0:
            self._coverage.add(row)

    def _row(self, index: int) -> int:
        return -1 if self._rows_N is None else int(self._rows_N[index])


# ------------------------------------------------------------------------------------------------------ a policy


@dataclass(frozen=True)
class Choice:
    """One chosen image.

    Attributes:
        index: of the candidate.
        strategy: why it was chosen.
        score: how useful that strategy finds it; higher is more useful.
    """

    index: int
    strategy: str
    score: float


def choose(
    strategies: Mapping[str, Strategy], shares: Mapping[str, float], num: int, taken_N: Bools, repeats: Repeats
) -> tuple[list[Choice], int]:
    """Choose up to ``num`` candidates, the most useful first.

    The next one comes from the strategy that is furthest behind its share of all that were chosen so far (of equal
    ones, the first). What a strategy has no candidates left for goes to the others, by their shares.

    Args:
        strategies: by name.
        shares: of each strategy, above 0.
        num: how many.
        taken_N: candidates that must not be chosen. Left as it is.
        repeats: what was chosen; candidates that it holds are passed over.

    Returns:
        The choices, and how many candidates were passed over because they show what was chosen before them.
    """
    taken_N = taken_N.copy()
    live = {name: shares[name] for name in strategies}
    given = dict.fromkeys(strategies, 0.0)
    choices: list[Choice] = []
    num_repeats = 0
    while live and len(choices) < num:
        total = sum(live.values())
        due = sum(given[name] for name in live) + 1.0
        name = max(live, key=lambda each: due * live[each] / total - given[each])
        found = strategies[name].best(taken_N)
        if found is None:
            del live[name]
            continue
        index, score = found
        taken_N[index] = True
        if repeats.holds(index):
            num_repeats += 1
            continue
        repeats.add(index)
        for strategy in strategies.values():
            strategy.learn(index)
        given[name] += 1.0
        choices.append(Choice(index, name, score))
    return choices, num_repeats
