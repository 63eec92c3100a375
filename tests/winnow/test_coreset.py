"""Greedy k-center: what the shortcut picks is what looking at everything picks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.coreset import MAX_DISTANCE, Coverage
from winnow.similarity import NearRule

ANYTHING = NearRule(threshold=2.0, max_hamming=0)  # nothing is a near-duplicate


def unit(vectors_ND: Any) -> np.ndarray:
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


def made(num: int, dimensions: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((num, dimensions)))


def coverage(vectors_MD: np.ndarray, num: int, rule: NearRule = ANYTHING, start: int = 0) -> Coverage:
    return Coverage(vectors_MD, np.zeros(len(vectors_MD), np.uint64), rule, num=num, start=start)


def refer(covered: Coverage, vectors_RD: np.ndarray, is_center_R: Any = None) -> None:
    covered.refer(vectors_RD, np.zeros(len(vectors_RD), np.uint64), is_center_R)


def distances_to(vectors_MD: np.ndarray, centers_KD: np.ndarray) -> np.ndarray:
    """Distance of each vector to the nearest center, by the definition."""
    if not len(centers_KD):
        return np.full(len(vectors_MD), MAX_DISTANCE)
    cosines = vectors_MD.astype(np.float64) @ centers_KD.astype(np.float64).T
    return np.asarray(1.0 - cosines.max(axis=1))


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 1200),
    dimensions=st.integers(2, 24),
    num_references=st.integers(0, 40),
    others=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_pick_is_the_furthest_there_is(
    num: int, dimensions: int, num_references: int, others: int, seed: int
) -> None:
    vectors, references = made(num, dimensions, seed), made(num_references + 1, dimensions, seed + 1)[1:]
    steps = min(num, 25)
    covered = coverage(vectors, num)
    refer(covered, references)
    rng = np.random.default_rng(seed)
    centers, left = [*references], np.ones(num, dtype=bool)
    for _ in range(steps):
        found = covered.furthest()
        if not left.any():
            assert found is None
            return
        assert found is not None
        row, distance = found
        expected = distances_to(vectors, np.reshape(centers, (-1, dimensions)))
        assert left[row]
        assert distance == pytest.approx(expected[row], abs=1e-5)
        assert expected[row] >= expected[left].max() - 1e-5
        # What other strategies choose in between counts as covered as well.
        for chosen in {row, *rng.choice(np.flatnonzero(left), min(others, int(left.sum())), replace=False)}:
            covered.add(int(chosen))
            centers.append(vectors[chosen])
            left[chosen] = False


def test_it_covers_within_twice_the_best_that_can_be() -> None:
    import itertools

    vectors = made(9, 3, 0)
    euclidean = np.linalg.norm(vectors[:, None].astype(np.float64) - vectors[None], axis=2)
    best = min(euclidean[:, list(centers)].min(axis=1).max() for centers in itertools.combinations(range(9), 3))
    covered = coverage(vectors, 3)
    picks = []
    for _ in range(3):
        found = covered.furthest()
        assert found is not None
        picks.append(found[0])
        covered.add(found[0])
    assert euclidean[:, picks].min(axis=1).max() <= 2 * best + 1e-6


def test_without_a_center_it_begins_where_it_is_told() -> None:
    covered = coverage(made(500, 8, 3), 5, start=321)
    assert covered.furthest() == (321, MAX_DISTANCE)


def test_references_that_are_no_centers_repel_nothing_but_forbid_near_duplicates() -> None:
    vectors = made(50, 16, 4)
    covered = coverage(vectors, 5, NearRule(), start=7)
    refer(covered, vectors[7:8], np.array([False]))
    assert covered.furthest() == (7, MAX_DISTANCE)
    assert covered.is_near(7)
    assert np.flatnonzero(covered.near_M).tolist() == [7]


def test_near_duplicates_by_vector_and_by_hash_of_what_is_chosen_or_known() -> None:
    vectors = made(6, 64, 5)
    vectors[1] = vectors[0]
    vectors[3] = unit((0.8 * vectors[2] + 0.6 * made(1, 64, 9)[0])[None])[0]
    phashes = np.array([0, 0, 0xC3A5C3A5, 0xC3A5C3A4, 0, 0], dtype=np.uint64)
    covered = Coverage(vectors, phashes, NearRule(), num=6)
    assert not covered.is_near(1)
    covered.add(0)
    covered.add(2)
    assert [covered.is_near(row) for row in (1, 3, 4, 5)] == [True, True, False, False]
    covered.refer(vectors[4:5], np.zeros(1, np.uint64))
    assert [covered.is_near(row) for row in (4, 5)] == [True, False]


def test_when_all_that_is_left_is_a_near_duplicate_there_is_nothing_left() -> None:
    base = made(3, 32, 6)
    vectors = unit(np.repeat(base, 200, axis=0) + 0.01 * made(600, 32, 7))
    covered = coverage(vectors, 600, NearRule())
    picked = 0
    while (found := covered.furthest()) is not None:
        covered.add(found[0])
        picked += 1
    assert picked == 3


def test_blocks_of_references_give_what_one_gives() -> None:
    vectors, references = made(2500, 8, 8), made(2300, 8, 9)
    whole, parts = coverage(vectors, 3), coverage(vectors, 3)
    refer(whole, references)
    for first in range(0, 2300, 700):
        refer(parts, references[first : first + 700])
    one, other = whole.furthest(), parts.furthest()
    assert one is not None
    assert other is not None
    assert (one[0], one[1]) == (other[0], pytest.approx(other[1], abs=1e-6))
    assert one[1] == pytest.approx(distances_to(vectors, references).max(), abs=1e-5)
