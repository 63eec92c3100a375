"""All vectors compared with all others: blocks in Ray's object store, one task for each block and those after it.

A set of one block is compared in the calling process. Both ways run the same code of ``winnow.similarity``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from winnow.errors import JobError
from winnow.similarity import BLOCK_ROWS, Block, Floats, Integers, Nearest, NearRule, Strip, compare_strip, components
from winnow_jobs.cluster import ray_cluster

_TASKS_PER_CPU = 2


class Comparison:
    """Blocks that can be compared, wherever they are.

    Args:
        blocks: give the blocks, in order.
        run_strips: yields, in any order, what ``compare_strip`` finds for each block and those after it.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[], Block]],
        run_strips: Callable[[int, NearRule], Iterator[Strip]],
    ) -> None:
        self._blocks = blocks
        self._run_strips = run_strips

    def compare(
        self, num_vectors: int, k: int, rule: NearRule, on_progress: Callable[[int], None]
    ) -> tuple[Nearest, Integers]:
        """The nearest of each vector, and for each the smallest index of its group of near-duplicates, int64 (N,).

        Args:
            num_vectors: all indices of the blocks are below it.
            k: neighbours to keep.
            rule: what a near-duplicate is.
            on_progress: told how many pairs of blocks were compared so far.
        """
        nearest = Nearest(num_vectors, k)
        labels: Integers = np.arange(num_vectors, dtype=np.int64)
        num_pairs = 0
        for strip in self._run_strips(k, rule):
            for indices, keys in strip.nearest:
                nearest.merge(indices, keys)
            # Joined at once, so that no more links are held than there are vectors.
            old = np.flatnonzero(labels != np.arange(num_vectors))
            us, vs = strip.links
            labels = components(num_vectors, np.concatenate((old, us)), np.concatenate((labels[old], vs)))
            num_pairs += len(strip.nearest)
            on_progress(num_pairs)
        return nearest, labels

    def cosines(self, ones: Integers, others: Integers, num_vectors: int) -> Floats:
        """Cosine of each pair of indices, float32; two blocks are in memory at a time."""
        number_of, row_of = np.full(num_vectors, -1, dtype=np.int32), np.zeros(num_vectors, dtype=np.int32)
        for number, give in enumerate(self._blocks):
            indices = give().indices_N
            number_of[indices], row_of[indices] = number, np.arange(len(indices))
        found = np.zeros(len(ones), dtype=np.float32)
        pairs, inverse = np.unique(np.stack((number_of[ones], number_of[others]), axis=1), axis=0, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        edges = np.searchsorted(inverse[order], np.arange(len(pairs) + 1))
        for (one, other), start, stop in zip(pairs.tolist(), edges[:-1], edges[1:], strict=True):
            chosen = order[start:stop]
            left = self._blocks[one]().vectors_ND[row_of[ones[chosen]]]
            right = self._blocks[other]().vectors_ND[row_of[others[chosen]]]
            found[chosen] = np.einsum("nd,nd->n", left, right)
        return found


@contextlib.contextmanager
def held(blocks: Iterable[Block], num_vectors: int, *, num_cpus: int | None) -> Iterator[Comparison]:
    """Blocks of ``BLOCK_ROWS`` vectors, ready to be compared while the context lasts.

    Args:
        blocks: each is let go once it is stored.
        num_vectors: in all of them.
        num_cpus: of a Ray that is started for it; all by default.
    """
    if num_vectors <= BLOCK_ROWS:
        stored = list(blocks)
        here = [partial(stored.__getitem__, number) for number in range(len(stored))]
        yield Comparison(here, lambda k, rule: (compare_strip(here[n:], k, rule) for n in range(len(here))))
        return
    with ray_cluster(num_cpus=num_cpus) as nodes:
        import ray
        from ray.exceptions import RayError

        from winnow_jobs.pipeline import root_cause

        references = [ray.put(block) for block in blocks]
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_strip)
        room = max(1, int(_TASKS_PER_CPU * sum(node.num_cpus for node in nodes)))

        def run_strips(k: int, rule: NearRule) -> Iterator[Strip]:
            waiting = list(range(len(references)))[::-1]  # the longest strips are begun first
            running: list[Any] = []
            while waiting or running:
                while waiting and len(running) < room:
                    running.append(task.remote(references[waiting.pop() :], k, rule))
                (done, *_), running = ray.wait(running)
                try:
                    yield ray.get(done)
                except RayError as error:
                    raise JobError(f"a worker failed for good: {root_cause(error)}") from error

        yield Comparison(_getters(references), run_strips)


def blocks_of(
    batches: Iterable[tuple[Integers, Floats]], hashes: NDArray[np.uint64], num_rows: int = BLOCK_ROWS
) -> Iterator[Block]:
    """Indices and vectors in batches of any size, as blocks of ``num_rows``; ``hashes`` are those of all indices."""
    held_indices: list[Integers] = []
    held_vectors: list[Floats] = []
    num_held = 0

    def cut(stop: int) -> Block:
        indices, vectors = np.concatenate(held_indices), np.concatenate(held_vectors)
        held_indices[:], held_vectors[:] = [indices[stop:]], [vectors[stop:]]
        # Copied, so that a block does not keep alive what it was cut from.
        return Block(indices[:stop].copy(), vectors[:stop].copy(), hashes[indices[:stop]])

    for indices, vectors in batches:
        held_indices.append(indices)
        held_vectors.append(vectors)
        num_held += len(indices)
        while num_held >= num_rows:
            yield cut(num_rows)
            num_held -= num_rows
    if num_held:
        yield cut(num_held)


def _strip(references: list[Any], k: int, rule: NearRule) -> Strip:
    """Runs in a Ray worker."""
    return compare_strip(_getters(references), k, rule)


def _getters(references: list[Any]) -> list[Callable[[], Block]]:
    """What fetches each block when it is asked for."""
    import ray

    return [cast("Callable[[], Block]", partial(ray.get, reference)) for reference in references]
