"""Which written batches of a run count: pure logic over the positions of a plan.

A plan numbers its images 0 … N-1. A worker that has written the answers of some of them records one *marker* with
exactly these positions. Retries, zombies and concurrent drivers may record overlapping markers; ``select`` picks
disjoint ones, always the same for the same markers, and what they leave open is asked again.

After a *stop* (access or storage failed for too many images) the markers written so far that hold such failures
no longer count: every marker carries the number of stops that preceded it, its ``generation``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Ranges = tuple[tuple[int, int], ...]
"""Sorted, disjoint, half-open position ranges ``(start, stop)``."""

_PIECES_AHEAD = 8
"""Into so many pieces per worker is divided what is left; Ray hands up to four of them to a worker in advance."""


def to_ranges(positions: Iterable[int] | NDArray[np.int64]) -> Ranges:
    """Positions in any order, each once, as half-open ranges.

    Raises:
        ValueError: a position is negative or given twice.
    """
    array = np.sort(np.asarray(positions if isinstance(positions, np.ndarray) else list(positions), dtype=np.int64))
    if array.size == 0:
        return ()
    steps = np.diff(array)
    if array[0] < 0 or (steps == 0).any():
        raise ValueError("positions must be non-negative and distinct")
    breaks = np.flatnonzero(steps > 1)
    starts = array[np.concatenate(([0], breaks + 1))]
    stops = array[np.concatenate((breaks, [array.size - 1]))] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def num_positions(ranges: Ranges) -> int:
    """How many positions the ranges hold."""
    return sum(stop - start for start, stop in ranges)


@dataclass(frozen=True)
class Fragment:
    """One Parquet file written for one table. ``path`` is relative to the table's folder."""

    table: str
    path: str
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class Marker:
    """A batch whose rows are safely written: its positions and the files of every table.

    Attributes:
        ranges: the plan positions that the files answer.
        fragments: every file of the batch, over all tables.
        attempt: which execution wrote it; the markers of one execution hardly ever overlap.
        generation: number of stops of the run before the batch was written.
        counts: outcomes by task and status, and failures, such as ``{"objects.answered": 62}``.
        num_systemic: outcomes that failed for reasons of access or storage.
        seconds: work done for the batch by stage, summed over workers.
    """

    ranges: Ranges
    fragments: tuple[Fragment, ...]
    attempt: str = ""
    generation: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    num_systemic: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Hash of positions and generation: the same batch always has the same name, so the first writer wins."""
        text = f"{self.generation}:" + ",".join(f"{start}-{stop}" for start, stop in self.ranges)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def num_images(self) -> int:
        return num_positions(self.ranges)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            ranges=tuple((int(start), int(stop)) for start, stop in data["ranges"]),
            fragments=tuple(Fragment(**fragment) for fragment in data["fragments"]),
            attempt=data["attempt"],
            generation=data["generation"],
            counts=data["counts"],
            num_systemic=data["num_systemic"],
            seconds=data["seconds"],
        )


@dataclass(frozen=True)
class Selection:
    """The markers that count, and the positions that no such marker answers."""

    markers: tuple[Marker, ...]
    missing: Ranges

    @property
    def is_complete(self) -> bool:
        return not self.missing


def select(markers: Iterable[Marker], *, num_planned: int, num_stops: int = 0) -> Selection:
    """Disjoint markers that cover as much of the plan as a few fixed orders of choosing find, and what they leave open.

    Tried are: largest first; and for each attempt, its markers first. So the markers of an execution that finished
    are enough, whatever else is there. In a fixed order, a new marker that is disjoint from the selection never
    removes a selected one: asking the missing positions again always makes progress.

    Raises:
        ValueError: a marker names a position outside the plan.
    """
    counting = []
    for marker in sorted(markers, key=lambda marker: (-marker.num_images, marker.name)):
        if marker.ranges and (marker.ranges[0][0] < 0 or marker.ranges[-1][1] > num_planned):
            raise ValueError(f"marker {marker.name} names positions outside the plan of {num_planned:,} images")
        if not (marker.num_systemic and marker.generation < num_stops):
            counting.append(marker)
    best, best_taken = _choose(counting, num_planned)
    for attempt in sorted({marker.attempt for marker in counting}):
        if best_taken.all():
            break
        # sorted() is stable: largest first within the attempt and within the rest.
        chosen, taken = _choose(sorted(counting, key=lambda marker: marker.attempt != attempt), num_planned)
        if taken.sum() > best_taken.sum():
            best, best_taken = chosen, taken
    return Selection(tuple(best), to_ranges(np.flatnonzero(~best_taken)))


def _choose(markers: Iterable[Marker], num_planned: int) -> tuple[list[Marker], NDArray[np.bool_]]:
    """Greedily keep the markers that overlap none kept before; with a mask of the positions they hold."""
    taken = np.zeros(num_planned, dtype=bool)
    chosen: list[Marker] = []
    for marker in markers:
        if not any(taken[start:stop].any() for start, stop in marker.ranges):
            for start, stop in marker.ranges:
                taken[start:stop] = True
            chosen.append(marker)
    return chosen, taken


def split_ranges(ranges: Ranges, *, chunk: int) -> list[Ranges]:
    """Cut ranges where they cross a multiple of ``chunk``: one entry per touched chunk, in order.

    A plan file keeps one chunk per Parquet row group, so that each entry is read from exactly one of them.
    """
    chunks: dict[int, list[tuple[int, int]]] = {}
    for start, stop in ranges:
        while start < stop:
            end = min(stop, (start // chunk + 1) * chunk)
            chunks.setdefault(start // chunk, []).append((start, end))
            start = end
    return [tuple(chunks[index]) for index in sorted(chunks)]


def deal_out(ranges: Ranges, *, chunk: int, num_workers: int, least: int) -> list[Ranges]:
    """Pieces of work that become smaller towards the end, so that workers of any speed end at nearly the same time.

    Each piece is a share of what is left for all workers: guided self-scheduling (Polychronopoulos & Kuck 1987), with
    pieces small enough that a worker may hold some in advance. None crosses a multiple of ``chunk``.

    Args:
        ranges: positions to deal out.
        chunk: positions per plan file, and the most per piece.
        num_workers: that take pieces, in order, whenever they have time.
        least: positions that are worth a call. Pieces are multiples of it, but for the last ones of a chunk.

    Returns:
        The pieces, in the order of ``ranges``: each position in exactly one of them.
    """
    left = num_positions(ranges)
    pieces: list[Ranges] = []
    for part in split_ranges(ranges, chunk=chunk):
        while part:
            share = math.ceil(left / (_PIECES_AHEAD * num_workers) / least) * least
            size = num_positions(part)
            if size - share < least:
                share = size
            piece, part = _cut(part, share)
            pieces.append(piece)
            left -= share
    return pieces


def _cut(ranges: Ranges, num: int) -> tuple[Ranges, Ranges]:
    """The first ``num`` positions, and the others."""
    for index, (start, stop) in enumerate(ranges):
        if num < stop - start:
            first = ((start, start + num),) if num else ()
            return ranges[:index] + first, ((start + num, stop), *ranges[index + 1 :])
        num -= stop - start
    return ranges, ()


def add_up(mappings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sum of mappings, key by key."""
    total: dict[str, float] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            total[key] = total.get(key, 0) + value
    return total
