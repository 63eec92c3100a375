"""Images that stand for all others: greedy k-center over vectors, with memory linear in their number.

The next center is always the point that lies furthest from all centers so far: Gonzalez, "Clustering to minimize the
maximum intercluster distance" (1985), within a factor of two of the best; as active learning in Sener & Savarese,
"Active Learning for Convolutional Neural Networks: A Core-Set Approach" (2018), algorithm 1.

A distance to the nearest center only ever shrinks as centers are added. So a distance that was right some centers ago
is an upper bound, and only the candidates with the largest bounds are looked at again: most steps cost a product of a
few hundred vectors instead of all.

Legend: D numbers in a vector of length 1; M candidates; K chosen ones; R references. Distance is 1 - cosine, which
orders pairs as the Euclidean distance does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from winnow.similarity import BLOCK_ROWS, Floats, NearRule

MAX_DISTANCE = 2.0
"""Cosine distance of opposite vectors; stands for the distance to the nearest center where there is none."""

_HEAD = 256
_GONE = np.float32(-1.0)


class Coverage:
    """How well candidates are covered by references and by what was chosen.

    Args:
        vectors_MD: float32, of length 1.
        phashes_M: perceptual hashes, uint64; 0 where unknown.
        rule: what a near-duplicate is.
        num: how many candidates may be chosen, at most.
        start: candidate to begin with when there is no center yet.
    """

    def __init__(
        self, vectors_MD: Floats, phashes_M: NDArray[np.uint64], rule: NearRule, *, num: int, start: int = 0
    ) -> None:
        num_candidates, num_dimensions = vectors_MD.shape
        self._vectors_MD = vectors_MD
        self._phashes_M = phashes_M
        self._rule = rule
        self._chosen_KD = np.empty((min(num, num_candidates), num_dimensions), dtype=np.float32)
        self._chosen_phashes_K = np.zeros(len(self._chosen_KD), dtype=np.uint64)
        self._num_chosen = 0
        self._bounds_M = np.full(num_candidates, MAX_DISTANCE, dtype=np.float32)
        self._bounds_M[start : start + 1] += np.float32(0.5)
        self._num_seen_M = np.zeros(num_candidates, dtype=np.int64)
        self.near_M: NDArray[np.bool_] = np.zeros(num_candidates, dtype=np.bool_)
        """Candidates that are near-duplicates of a reference."""

    def refer(
        self, vectors_RD: Floats, phashes_R: NDArray[np.uint64], is_center_R: NDArray[np.bool_] | None = None
    ) -> None:
        """Take in images that people know already.

        Args:
            vectors_RD: float32, of length 1.
            phashes_R: perceptual hashes, uint64; 0 where unknown.
            is_center_R: those that candidates should lie far from; all by default. The others only make candidates
                near-duplicates.
        """
        is_center_R = np.ones(len(vectors_RD), dtype=np.bool_) if is_center_R is None else is_center_R
        for first in range(0, len(vectors_RD), BLOCK_ROWS):
            references = slice(first, first + BLOCK_ROWS)
            centers = np.flatnonzero(is_center_R[references])
            for start in range(0, len(self._vectors_MD), BLOCK_ROWS):
                block = slice(start, start + BLOCK_ROWS)
                cosines = self._vectors_MD[block] @ vectors_RD[references].T
                near, _ = self._rule.pairs(cosines, self._phashes_M[block], phashes_R[references])
                self.near_M[block][near] = True
                if centers.size:
                    closest = (
                        cosines.max(axis=1) if centers.size == cosines.shape[1] else cosines[:, centers].max(axis=1)
                    )
                    np.minimum(self._bounds_M[block], 1.0 - closest, out=self._bounds_M[block])

    def add(self, row: int) -> None:
        """A candidate was chosen: it is a center from now on."""
        self._chosen_KD[self._num_chosen] = self._vectors_MD[row]
        self._chosen_phashes_K[self._num_chosen] = self._phashes_M[row]
        self._num_chosen += 1
        self.drop(row)

    def drop(self, row: int) -> None:
        """A candidate is none any more."""
        self._bounds_M[row] = _GONE

    def is_near(self, row: int) -> bool:
        """True when a candidate is a near-duplicate of a reference or of a chosen candidate."""
        if self.near_M[row]:
            return True
        cosines = self._chosen_KD[: self._num_chosen] @ self._vectors_MD[row]
        near, _ = self._rule.pairs(
            cosines[None], self._phashes_M[row : row + 1], self._chosen_phashes_K[: self._num_chosen]
        )
        return bool(near.size)

    def furthest(self) -> tuple[int, float] | None:
        """The candidate furthest from all centers, and its distance; None when all that are left are near-duplicates.

        Equally distant ones come in an order that is the same in every call on the same vectors.
        """
        num = len(self._bounds_M)
        while num:
            size = min(_HEAD, num)
            head = np.sort(np.argpartition(self._bounds_M, num - size)[num - size :])
            beyond = self._bounds_M[head].min()  # no candidate outside of the head lies further than this
            self._refresh(head[self._num_seen_M[head] < self._num_chosen])
            best = int(head[self._bounds_M[head].argmax()])
            bound = float(self._bounds_M[best])
            if size == num or bound >= beyond:
                is_covered = bound <= 1.0 - self._rule.threshold
                return None if is_covered else (best, min(bound, MAX_DISTANCE))
        return None

    def _refresh(self, rows: NDArray[np.int64]) -> None:
        """Make the distances of some candidates right."""
        rows = rows[self._bounds_M[rows] != _GONE]
        if not rows.size:
            return
        # Centers that some of the rows have seen already change nothing.
        unseen = self._chosen_KD[self._num_seen_M[rows].min() : self._num_chosen]
        closest = (self._vectors_MD[rows] @ unseen.T).max(axis=1)
        self._bounds_M[rows] = np.maximum(np.minimum(self._bounds_M[rows], 1.0 - closest), 0.0)
        self._num_seen_M[rows] = self._num_chosen
