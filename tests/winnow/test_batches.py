"""Selection of written batches: properties over random histories, without Ray."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.batches import Fragment, Marker, add_up, deal_out, num_positions, select, split_ranges, to_ranges

NUM_PLANNED = 40


@st.composite
def markers(draw: st.DrawFn) -> list[Marker]:
    """What drivers, retries and zombies may leave behind: overlapping batches of several attempts and generations."""
    found = []
    for number in range(draw(st.integers(0, 12))):
        positions = draw(st.sets(st.integers(0, NUM_PLANNED - 1), min_size=1, max_size=12))
        found.append(
            Marker(
                ranges=to_ranges(positions),
                fragments=(Fragment("outcomes", f"run/{number}.parquet", len(positions), 100),),
                attempt=draw(st.sampled_from("abc")),
                generation=draw(st.integers(0, 1)),
                num_systemic=draw(st.integers(0, 2)),
            )
        )
    return found


def positions_of(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {position for start, stop in ranges for position in range(start, stop)}


@given(st.sets(st.integers(0, 500)))
def test_ranges_hold_exactly_the_positions(positions: set[int]) -> None:
    ranges = to_ranges(positions)
    assert positions_of(ranges) == positions
    assert num_positions(ranges) == len(positions)
    assert all(stop < following for (_, stop), (following, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("positions", [[1, 1], [-1, 0]])
def test_ranges_refuse_doubled_and_negative_positions(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        to_ranges(np.array(positions))


@given(markers(), st.integers(0, 1))
def test_every_position_is_answered_once_or_missing(found: list[Marker], num_stops: int) -> None:
    selection = select(found, num_planned=NUM_PLANNED, num_stops=num_stops)
    answered = [position for marker in selection.markers for position in positions_of(marker.ranges)]
    assert len(answered) == len(set(answered))
    assert set(answered) | positions_of(selection.missing) == set(range(NUM_PLANNED))
    assert not set(answered) & positions_of(selection.missing)


@given(markers(), st.randoms())
def test_selection_does_not_depend_on_the_order_of_listing(found: list[Marker], random: object) -> None:
    shuffled = found.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    names = [{marker.name for marker in select(order, num_planned=NUM_PLANNED).markers} for order in (found, shuffled)]
    assert names[0] == names[1]


@given(markers(), st.data())
def test_asking_the_missing_again_always_makes_progress(found: list[Marker], data: st.DataObject) -> None:
    before = select(found, num_planned=NUM_PLANNED)
    missing = sorted(positions_of(before.missing))
    if not missing:
        return
    batch = data.draw(st.sets(st.sampled_from(missing), min_size=1))
    new = Marker(to_ranges(batch), (), attempt=data.draw(st.sampled_from("abcz")))
    after = select([*found, new], num_planned=NUM_PLANNED)
    assert num_positions(after.missing) <= num_positions(before.missing) - len(batch)


@given(markers())
def test_a_finished_attempt_is_enough_whatever_others_left(found: list[Marker]) -> None:
    complete = [Marker(((start, start + 8),), (), attempt="whole") for start in range(0, NUM_PLANNED, 8)]
    assert select([*found, *complete], num_planned=NUM_PLANNED).is_complete


@given(markers())
def test_after_a_stop_batches_with_storage_failures_no_longer_count(found: list[Marker]) -> None:
    kept = select(found, num_planned=NUM_PLANNED, num_stops=1).markers
    assert all(marker.generation >= 1 or not marker.num_systemic for marker in kept)


def test_the_same_batch_has_the_same_name_in_every_attempt_but_not_after_a_stop() -> None:
    first = Marker(((0, 3),), (Fragment("outcomes", "a.parquet", 3, 10),), attempt="a")
    second = Marker(((0, 3),), (Fragment("outcomes", "b.parquet", 3, 12),), attempt="b")
    assert first.name == second.name
    assert first.name != Marker(((0, 3),), (), generation=1).name


def test_marker_survives_json() -> None:
    marker = Marker(
        ((0, 3), (7, 9)), (Fragment("outcomes", "a", 5, 10),), "a", 1, {"answered.objects": 5}, 2, {"fetching": 0.5}
    )
    assert Marker.from_dict(json.loads(json.dumps(marker.to_dict()))) == marker


def test_marker_outside_the_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the plan of 40 images"):
        select([Marker(((38, 41),), ())], num_planned=NUM_PLANNED)


@given(st.sets(st.integers(0, 300)), st.integers(1, 50))
def test_split_ranges_touch_one_chunk_each_and_lose_nothing(positions: set[int], chunk: int) -> None:
    parts = split_ranges(to_ranges(positions), chunk=chunk)
    assert {position for part in parts for position in positions_of(part)} == positions
    assert all(len({position // chunk for position in positions_of(part)}) == 1 for part in parts)


@given(st.sets(st.integers(0, 600)), st.integers(1, 90), st.integers(1, 9), st.integers(1, 100))
def test_pieces_touch_one_chunk_each_and_lose_nothing(
    positions: set[int], chunk: int, num_workers: int, least: int
) -> None:
    pieces = deal_out(to_ranges(positions), chunk=chunk, num_workers=num_workers, least=least)
    dealt = [position for piece in pieces for position in positions_of(piece)]
    assert sorted(dealt) == sorted(positions)
    assert all(piece for piece in pieces)
    assert all(len({position // chunk for position in positions_of(piece)}) == 1 for piece in pieces)


def test_pieces_become_smaller_towards_the_end_but_not_tiny() -> None:
    sizes = [num_positions(piece) for piece in deal_out(((0, 100_000),), chunk=2048, num_workers=4, least=16)]
    assert sizes[0] == 2048
    assert sizes[-4:] == [16] * 4
    assert min(sizes) == 16
    assert len(sizes) < 250
    assert [num_positions(piece) for piece in deal_out(((0, 31),), chunk=256, num_workers=4, least=16)] == [31]


@pytest.mark.parametrize("num_workers", [2, 4, 16])
def test_workers_of_any_speed_that_hold_pieces_in_advance_end_together(num_workers: int) -> None:
    speeds = np.random.default_rng(num_workers).uniform(0.7, 1.3, num_workers)
    num = 2_560 * num_workers
    pieces = [num_positions(piece) for piece in deal_out(((0, num),), chunk=256, num_workers=num_workers, least=16)]
    ends = np.zeros(num_workers)
    held: list[list[float]] = [[] for _ in range(num_workers)]  # when each piece handed to a worker will be done
    now = 0.0
    for size in pieces:
        if all(len(each) == 4 for each in held):
            now = min(each[0] for each in held)
            held = [[end for end in each if end > now] for each in held]
        worker = min(range(num_workers), key=lambda index: len(held[index]))
        ends[worker] = max(now, ends[worker]) + size / speeds[worker]
        held[worker].append(ends[worker])
    assert ends.max() < 1.06 * num / speeds.sum()


def test_add_up_sums_key_by_key() -> None:
    assert add_up([{"a": 1}, {"a": 2, "b": 0.5}]) == {"a": 3, "b": 0.5}
