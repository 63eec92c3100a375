"""Which vectors are alike: the most similar ones, near-duplicate pairs, and the groups they form. Exact, by blocks.

Everything rests on products of two blocks of vectors, so that memory depends on the size of a block and grows with
the number of vectors only by what is kept of each: its k best, and the group that it is in.

Legend: D numbers in a vector of length 1, so that a product is a cosine; M queries; N vectors of a block; K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from winnow.perceptual_hash import hamming, is_telling

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

BLOCK_ROWS = 2048
"""Vectors of a block: the scores of two blocks are 16 MB."""

MAX_VECTORS = 2**32
_LOWEST = np.finfo(np.float32).min
_EMPTY = np.iinfo(np.int64).min
_GROUPS = 64


class Nearest:
    """The K most similar vectors for each of M queries; blocks may come in any order.

    Of equally similar vectors the one with the smaller index counts as nearer, so the answer does not depend on how
    the vectors were cut into blocks.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        # One integer per neighbour that sorts as it should: the score's bits above, the index reversed below.
        self.keys: Integers = np.full((num_queries, k), _EMPTY, dtype=np.int64)

    def update(self, scores_MN: Floats, indices_N: Integers) -> None:
        """Take in the scores of a block. A score of -inf stands for no neighbour."""
        cut_M = np.maximum(self._limits(), _LOWEST)
        if (cut_M == _LOWEST).any():
            cut_M = np.maximum(cut_M, _k_th_largest(scores_MN, self.keys.shape[1]))
        rows, columns = _where(scores_MN >= cut_M[:, None])
        self._insert(rows, scores_MN[rows, columns], indices_N[columns])

    def update_transposed(self, scores_NM: Floats, indices_N: Integers) -> None:
        """As ``update``, where each column holds the scores of a query: no copy is turned."""
        cut_M = np.maximum(self._limits(), _LOWEST)
        if (cut_M == _LOWEST).any():
            cut_M = np.maximum(cut_M, _below_k_th_largest_of_columns(scores_NM, self.keys.shape[1]))
        rows, columns = _where(scores_NM >= cut_M[None, :])
        order = np.argsort(columns, kind="stable")
        rows, columns = rows[order], columns[order]
        self._insert(columns, scores_NM[rows, columns], indices_N[rows])

    def merge(self, queries: Integers, keys: Integers) -> None:
        """Take in what another ``Nearest`` has found for some of the queries: its ``keys``, (len(queries), K)."""
        better = keys.max(axis=1) > self.keys[queries].min(axis=1)
        queries, keys = queries[better], keys[better]
        self.keys[queries] = _largest(np.concatenate((self.keys[queries], keys), axis=1), self.keys.shape[1])

    def best(self) -> tuple[Floats, Integers]:
        """Scores and indices of the nearest, best first: float32 and int64 (M, K); -inf and -1 where there is none."""
        keys = np.sort(self.keys, axis=1)[:, ::-1]
        scores = np.where(keys == _EMPTY, -np.inf, _score_of(keys)).astype(np.float32)
        return scores, np.where(keys == _EMPTY, -1, MAX_VECTORS - 1 - (keys & (MAX_VECTORS - 1)))

    def _limits(self) -> Floats:
        """Score of the worst that each query keeps; -inf where it does not have K yet."""
        worst = self.keys.min(axis=1)
        return np.where(worst == _EMPTY, -np.inf, _score_of(worst)).astype(np.float32)

    def _insert(self, rows: Integers, scores: Floats, indices: Integers) -> None:
        """Add neighbours; ``rows`` is sorted."""
        if not rows.size:
            return
        touched, starts, counts = np.unique(rows, return_index=True, return_counts=True)
        found = np.full((len(touched), counts.max()), _EMPTY, dtype=np.int64)
        found[np.repeat(np.arange(len(touched)), counts), np.arange(len(rows)) - np.repeat(starts, counts)] = _key_of(
            scores, indices
        )
        self.keys[touched] = _largest(np.concatenate((self.keys[touched], found), axis=1), self.keys.shape[1])


def _largest(keys: Integers, k: int) -> Integers:
    return np.partition(keys, keys.shape[1] - k, axis=1)[:, -k:]


def _key_of(scores: Floats, indices: Integers) -> Integers:
    # IEEE 754: the bits of floats are ordered as integers, those of negative floats the other way round.
    bits = (scores + np.float32(0.0)).view(np.int32)  # -0.0 becomes 0.0
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
    return (ordered << 32) | (MAX_VECTORS - 1 - indices)


def _score_of(keys: Integers) -> Floats:
    ordered = (keys >> 32).astype(np.int32)
    return np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32).view(np.float32)


def _k_th_largest(scores_MN: Floats, k: int) -> Floats | np.float32:
    num = scores_MN.shape[1]
    return np.partition(scores_MN, num - k, axis=1)[:, num - k] if num > k else _LOWEST


def _below_k_th_largest_of_columns(scores_NM: Floats, k: int) -> Floats | np.float32:
    """At most the k-th largest of each column, and hardly less: the k-th largest of the maxima of groups of rows."""
    num_groups = min(len(scores_NM), max(_GROUPS, 4 * k))
    if num_groups <= k:
        return _LOWEST
    size = len(scores_NM) // num_groups
    maxima = scores_NM[: size * num_groups].reshape(size, num_groups, -1).max(axis=0)
    return np.asarray(np.partition(maxima, num_groups - k, axis=0)[num_groups - k])


def _where(mask: NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """Rows and columns where a matrix is true; ``np.nonzero`` takes ten times as long."""
    rows, columns = np.divmod(np.flatnonzero(mask), mask.shape[1])
    return rows, columns


# ------------------------------------------------------------------------------------------------------ near-duplicates


@dataclass(frozen=True)
class NearRule:
    """When two pictures are near-duplicates: their vectors are very similar, or their perceptual hashes are.

    The two see different things. An embedding does not mind mirroring, rotation and a bar of text, a perceptual hash
    does not mind size, compression and colour. Found on real near-duplicates: docs/similarity.md.

    Attributes:
        threshold: cosine from which on vectors alone decide.
        max_hamming: bits in which perceptual hashes may differ.
        min_similarity: cosine that the vectors need where the hashes decide.
    """

    threshold: float = 0.94
    max_hamming: int = 2
    min_similarity: float = 0.6

    def pairs(
        self, scores_MN: Floats, hashes_M: NDArray[np.uint64], hashes_N: NDArray[np.uint64]
    ) -> tuple[Integers, Integers]:
        """Rows and columns of the pairs that are near-duplicates.

        Args:
            scores_MN: cosines.
            hashes_M: perceptual hashes of the rows, uint64; 0 where unknown.
            hashes_N: of the columns.
        """
        rows, columns = _where(scores_MN >= self.threshold)
        telling_M, telling_N = np.flatnonzero(is_telling(hashes_M)), np.flatnonzero(is_telling(hashes_N))
        if not telling_M.size or not telling_N.size:
            return rows, columns
        bits = hamming(hashes_M[telling_M][:, None], hashes_N[telling_N][None, :])
        more_rows, more_columns = _where(bits <= self.max_hamming)
        more_rows, more_columns = telling_M[more_rows], telling_N[more_columns]
        scores = scores_MN[more_rows, more_columns]
        new = (scores >= self.min_similarity) & (scores < self.threshold)
        return np.concatenate((rows, more_rows[new])), np.concatenate((columns, more_columns[new]))


@dataclass(frozen=True)
class Block:
    """Some of the vectors that are compared.

    Attributes:
        indices_N: their numbers among all vectors, int64.
        vectors_ND: float32, of length 1.
        hashes_N: perceptual hashes, uint64; 0 where unknown.
    """

    indices_N: Integers
    vectors_ND: Floats
    hashes_N: NDArray[np.uint64]


@dataclass(frozen=True)
class Strip:
    """What the comparison of one block with itself and all blocks after it found.

    Attributes:
        nearest: for the vectors of each block their indices, and the keys of a ``Nearest``.
        links: two index arrays: pairs that join the same groups as all near-duplicate pairs of the strip would, but
            no more pairs than there are vectors.
    """

    nearest: Sequence[tuple[Integers, Integers]]
    links: tuple[Integers, Integers]


def compare_strip(blocks: Sequence[Callable[[], Block]], k: int, rule: NearRule) -> Strip:
    """Compare the first block with itself and with all others: each pair of vectors is looked at once.

    Args:
        blocks: give the blocks, in order; each is asked for once and let go.
        k: neighbours to keep.
        rule: what a near-duplicate is.
    """
    first = blocks[0]()
    rows = Nearest(len(first.vectors_ND), k)
    nearest = [(first.indices_N, rows.keys)]
    links: list[tuple[Integers, Integers]] = []
    for number, give in enumerate(blocks):
        block = first if number == 0 else give()
        scores = first.vectors_ND @ block.vectors_ND.T
        near, others = rule.pairs(scores, first.hashes_N, block.hashes_N)
        if number == 0:
            upper = near < others
            near, others = near[upper], others[upper]
            np.fill_diagonal(scores, -np.inf)
        else:
            columns = Nearest(len(block.vectors_ND), k)
            columns.update_transposed(scores, first.indices_N)
            nearest.append((block.indices_N, columns.keys))
        rows.update(scores, block.indices_N)
        links.append(reduce_links(first.indices_N[near], block.indices_N[others]))
    us, vs = zip(*links, strict=True)
    return Strip(nearest, reduce_links(np.concatenate(us), np.concatenate(vs)))


def reduce_links(us: Integers, vs: Integers) -> tuple[Integers, Integers]:
    """Fewer pairs that connect the same: each node but the smallest of its group, with the smallest."""
    nodes, inverse = np.unique(np.concatenate((us, vs)), return_inverse=True)
    labels = components(len(nodes), inverse[: len(us)], inverse[len(us) :])
    linked = np.flatnonzero(labels != np.arange(len(nodes)))
    return nodes[linked], nodes[labels[linked]]


def components(num: int, us: Integers, vs: Integers) -> Integers:
    """Connected components of ``num`` nodes: for each node the smallest node that it is connected with, int64.

    Every tree hooks onto the smallest tree that an edge leads to, then all paths are halved until they are flat:
    Shiloach and Vishkin, "An O(log n) parallel connectivity algorithm", 1982.
    """
    labels: Integers = np.arange(num, dtype=np.int64)
    while True:
        a, b = labels[us], labels[vs]
        active = np.flatnonzero(a != b)
        if not active.size:
            return labels
        us, vs, a, b = us[active], vs[active], a[active], b[active]
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
        while True:
            shorter: Integers = labels[labels]
            if np.array_equal(shorter, labels):
                break
            labels = shorter
