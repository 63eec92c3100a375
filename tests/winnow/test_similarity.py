"""Nearest vectors, near-duplicate pairs and groups, against brute force."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.similarity import Block, Nearest, NearRule, Strip, compare_strip, components, reduce_links

RULE = NearRule()


def normalised(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def few_values(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Scores with many ties, both signs and no neighbour at all."""
    return rng.choice(np.array([-np.inf, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0], dtype=np.float32), shape)


def best_of(scores: np.ndarray, k: int) -> tuple[list[float], list[int]]:
    """The k highest scores of one query; of equal ones the smaller index."""
    found = sorted((-score, index) for index, score in enumerate(scores.tolist()) if score > -np.inf)[:k]
    padding = k - len(found)
    return [-score for score, _ in found] + [-np.inf] * padding, [index for _, index in found] + [-1] * padding


@given(
    seed=st.integers(0, 2**32), num=st.integers(1, 300), queries=st.integers(1, 7), k=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 300), max_size=5), transposed=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_nearest_is_brute_force_however_the_blocks_are_cut_and_ordered(
    seed: int, num: int, queries: int, k: int, cuts: list[int], transposed: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = few_values(rng, (queries, num))
    edges = sorted({0, num, *(cut for cut in cuts if cut < num)})
    spans = list(itertools.pairwise(edges))
    rng.shuffle(spans)
    nearest, whole = Nearest(queries, k), Nearest(queries + 2, k)
    for start, stop in spans:
        indices = np.arange(start, stop)
        if transposed:
            nearest.update_transposed(np.ascontiguousarray(scores[:, start:stop].T), indices)
        else:
            nearest.update(scores[:, start:stop], indices)
        part = Nearest(queries, k)
        part.update(scores[:, start:stop], indices)
        whole.merge(np.arange(2, 2 + queries), part.keys)
    for found in (nearest, whole):
        values, indices = (array[-queries:] for array in found.best())
        assert values.dtype == np.float32
        for query in range(queries):
            assert (values[query].tolist(), indices[query].tolist()) == best_of(scores[query], k)


@given(seed=st.integers(0, 2**32), num=st.integers(1, 60), num_edges=st.integers(0, 80))
@settings(max_examples=150, deadline=None)
def test_components_are_those_of_a_walk_and_links_keep_them(seed: int, num: int, num_edges: int) -> None:
    rng = np.random.default_rng(seed)
    us, vs = rng.integers(0, num, (2, num_edges))
    neighbours: dict[int, set[int]] = {node: set() for node in range(num)}
    for u, v in zip(us.tolist(), vs.tolist(), strict=True):
        neighbours[u].add(v)
        neighbours[v].add(u)
    expected = [-1] * num
    for node in range(num):
        stack = [node] if expected[node] < 0 else []
        while stack:
            here = stack.pop()
            if expected[here] < 0:
                expected[here] = node
                stack += neighbours[here]
    assert components(num, us, vs).tolist() == expected
    fewer = reduce_links(us, vs)
    assert len(fewer[0]) < max(num, 1)
    assert components(num, *fewer).tolist() == expected


def test_a_long_chain_is_one_component_in_no_time() -> None:
    order = np.random.default_rng(0).permutation(200_000)
    assert not components(200_000, order[:-1], order[1:]).any()


def made_blocks(num: int, dimensions: int, rows: int, seed: int) -> tuple[list[Block], np.ndarray, np.ndarray]:
    """Vectors around a few centres, some equal, and hashes of which some are close, flat or unknown."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, num // 4), dimensions))
    vectors = normalised(centres[rng.integers(0, len(centres), num)] + 0.3 * rng.standard_normal((num, dimensions)))
    vectors[rng.random(num) < 0.2] = vectors[0]
    hashes = rng.choice(np.array([0, 1 << 63, 0x0F0F0F0F0F0F0F0F, 0x0F0F0F0F0F0F0F0C, 2**64 - 1], np.uint64), num)
    order = rng.permutation(num)
    blocks = [
        Block(order[at : at + rows], vectors[order[at : at + rows]], hashes[order[at : at + rows]])
        for at in range(0, num, rows)
    ]
    return blocks, vectors, hashes


def compare_all(blocks: list[Block], num: int, k: int, rule: NearRule) -> tuple[Nearest, np.ndarray]:
    nearest, us, vs = Nearest(num, k), [], []
    for number in reversed(range(len(blocks))):
        strip: Strip = compare_strip([lambda b=block: b for block in blocks[number:]], k, rule)
        for indices, keys in strip.nearest:
            nearest.merge(indices, keys)
        us.append(strip.links[0])
        vs.append(strip.links[1])
    return nearest, components(num, np.concatenate(us), np.concatenate(vs))


@given(seed=st.integers(0, 2**32), num=st.integers(1, 90), rows=st.integers(1, 100), k=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_strips_find_every_neighbour_and_every_group(seed: int, num: int, rows: int, k: int) -> None:
    blocks, vectors, hashes = made_blocks(num, 8, rows, seed)
    nearest, labels = compare_all(blocks, num, k, RULE)
    scores = vectors @ vectors.T
    bits = np.array([[(int(a) ^ int(b)).bit_count() for b in hashes] for a in hashes])
    telling = np.array([int(h).bit_count() >= 8 for h in hashes])
    near = (scores >= RULE.threshold) | (
        (bits <= RULE.max_hamming) & (scores >= RULE.min_similarity) & telling[:, None] & telling[None, :]
    )
    margin = np.abs(scores[..., None] - np.array([RULE.threshold, RULE.min_similarity])).min()
    if margin > 1e-5:  # products of another shape round differently
        assert labels.tolist() == components(num, *np.nonzero(near)).tolist()
    np.fill_diagonal(scores, -np.inf)
    values, indices = nearest.best()
    expected = -np.sort(-scores, axis=1)[:, :k]
    np.testing.assert_allclose(
        values[:, : expected.shape[1]], np.where(expected == -np.inf, -np.inf, expected), atol=1e-5
    )
    for row in range(num):
        kept = indices[row][indices[row] >= 0]
        assert len(kept) == min(k, num - 1)
        assert len(set(kept.tolist())) == len(kept)
        np.testing.assert_allclose(scores[row, kept], values[row, : len(kept)], atol=1e-5)


def test_equal_vectors_cost_no_more_memory_than_others() -> None:
    rng = np.random.default_rng(0)
    peaks = []
    for vectors in (normalised(rng.standard_normal((3_000, 16))), np.tile(np.eye(1, 16, dtype=np.float32), (3_000, 1))):
        blocks = [
            Block(np.arange(at, at + 500), vectors[at : at + 500], np.zeros(500, np.uint64))
            for at in range(0, 3_000, 500)
        ]
        tracemalloc.start()
        _, labels = compare_all(blocks, 3_000, 3, RULE)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert not labels.any()
    assert peaks[1] < 35e6  # the indices of all 4.5 million pairs would be 72 MB
