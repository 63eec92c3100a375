"""Runs without Ray: every history of crashes, retries and rivals ends with each image answered once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mortal_stores import Clock, Killed, open_ledger
from winnow.batches import Fragment, Marker, num_positions, to_ranges
from winnow.errors import CallError, OpenRunError, StorageError
from winnow_connectors.ledger import Ledger, Plan, Run, digest_of, new_run_id
from winnow_connectors.object_store import ObjectStores
from winnow_connectors.warehouse import Warehouse

NOW = datetime(2026, 1, 31, tzinfo=UTC)
NUM_PLANNED = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty warehouse on local disk."""
    make_warehouse(tmp_path)
    return tmp_path


def make_warehouse(folder: Path) -> None:
    Warehouse(folder.as_uri(), ObjectStores({}, folder)).create()


def plan(ledger: Ledger, works: Sequence[str] = ("w",), digest: str = "d", job: str = "made") -> Plan:
    return Plan(
        run_id=new_run_id(job),
        job=job,
        claims=ledger.next_numbers(works),
        digest=digest,
        config={},
        num_planned=NUM_PLANNED,
        started_at=NOW.isoformat(),
        code_version="0",
    )


def begin(ledger: Ledger, works: Sequence[str] = ("w",), digest: str = "d") -> Run:
    run = ledger.begin(plan(ledger, works, digest))
    assert run is not None
    return run


def outcomes(run: Run, positions: Sequence[int], *, failed: Sequence[int] = ()) -> pa.Table:
    num = len(positions)
    return pa.table(
        {
            "image_id": [f"image-{position}" for position in positions],
            "status": ["failed" if position in failed else "answered" for position in positions],
            **{name: [value] * num for name, value in (("task", "t"), ("model", "m"), ("run", run.run_id))},
            "at": pa.array([NOW] * num, type=pa.timestamp("us", tz="UTC")),
        }
    )


def predictions(run: Run, positions: Sequence[int]) -> pa.Table:
    num = len(positions)
    return (
        outcomes(run, positions)
        .drop_columns(["status"])
        .append_column("label", pa.array(["cat"] * num))
        .append_column("confidence", pa.array([0.5] * num))
        .append_column("margin", pa.array([0.1] * num))
        .append_column("entropy", pa.array([1.0] * num))
        .append_column("top5", pa.array([[{"label": "cat", "score": 0.5}]] * num))
    )


def write_batch(
    run: Run, positions: Sequence[int], *, failed: Sequence[int] = (), attempt: str = "a", systemic: int = 0
) -> bool:
    """What a worker does with a batch: every table, then the marker."""
    answered = [position for position in positions if position not in failed]
    fragments = [run.stage("outcomes", outcomes(run, positions, failed=failed))]
    if answered:
        fragments.append(run.stage("predictions", predictions(run, answered)))
    generation = run.num_stops()
    return run.mark(
        Marker(to_ranges(positions), tuple(fragments), attempt=attempt, generation=generation, num_systemic=systemic)
    )


def publish(run: Run) -> dict[str, Any]:
    selection = run.select()
    assert selection.is_complete
    run.decide("finished", [f for marker in selection.markers for f in marker.fragments], {"num_asked": NUM_PLANNED})
    return run.close()


def drive(ledger: Ledger, *, batch: int = 4, works: Sequence[str] = ("w",)) -> Run:
    """A whole driver: join or begin, ask what is missing, publish."""
    run = ledger.join(works, "d")
    while run is None:
        run = ledger.begin(plan(ledger, works))
    work_off(run, batch=batch)
    return run


def come_late(ledger: Ledger, batch: int) -> None:
    """A driver that comes to an open run; when the other one was done before, nothing is pending for it."""
    run = ledger.join(["w"], "d")
    if run is not None:
        work_off(run, batch=batch)


def work_off(run: Run, *, batch: int) -> None:
    missing = [position for start, stop in run.select().missing for position in range(start, stop)]
    attempt = new_run_id("x")
    for index in range(0, len(missing), batch):
        write_batch(run, missing[index : index + batch], failed=missing[index : index + 1], attempt=attempt)
    publish(run)


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = open_ledger(folder)._tables.open(table).to_pyarrow_table().to_pylist()
    return found


def check(folder: Path, *, num_runs: int = 1) -> None:
    """Every image has one outcome, predictions and outcomes agree, each finished run has one row."""
    answered = {row["image_id"] for row in rows(folder, "outcomes") if row["status"] == "answered"}
    ids = [row["image_id"] for row in rows(folder, "outcomes")]
    assert sorted(ids) == sorted(f"image-{position}" for position in range(NUM_PLANNED))
    assert sorted(row["image_id"] for row in rows(folder, "predictions")) == sorted(answered)
    runs = rows(folder, "runs")
    assert len({row["run_id"] for row in runs}) == len(runs)
    assert [row["status"] for row in runs].count("finished") == num_runs


KILL_POINTS = list(itertools.product(range(1, 25), (False, True)))


@pytest.mark.parametrize(("dies_at", "after"), KILL_POINTS)
def test_killed_at_any_operation_a_rerun_answers_everything_once(folder: Path, dies_at: int, after: bool) -> None:
    clock = Clock(dies_at, after=after)
    try:
        drive(open_ledger(folder, clock), works=("v", "w"))
    except Killed:
        first_visible = len(rows(folder, "outcomes"))
        assert first_visible in (0, NUM_PLANNED)
    finished = open_ledger(folder).open_run("w") is None and rows(folder, "runs") != []
    if not finished:
        drive(open_ledger(folder), works=("v", "w"))
    check(folder)
    assert open_ledger(folder).open_runs() == []


def test_the_kill_points_cover_the_whole_drive(folder: Path) -> None:
    clock = Clock()
    drive(open_ledger(folder, clock), works=("v", "w"))
    assert clock.count < 25


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_histories_of_two_drivers_end_exact(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Batches of any composition by several attempts, some without a marker, in any order; stops between them."""
    folder = tmp_path_factory.mktemp("history")
    make_warehouse(folder)
    run = begin(open_ledger(folder))
    for _ in range(data.draw(st.integers(0, 8))):
        positions = sorted(data.draw(st.sets(st.integers(0, NUM_PLANNED - 1), min_size=1)))
        failed = data.draw(st.sets(st.sampled_from(positions)))
        step = data.draw(st.sampled_from(["whole", "no marker", "stop"]))
        if step == "whole":
            attempt = data.draw(st.sampled_from("ab"))
            write_batch(run, positions, failed=sorted(failed), attempt=attempt, systemic=data.draw(st.integers(0, 1)))
        elif step == "no marker":
            run.stage("outcomes", outcomes(run, positions, failed=sorted(failed)))
        else:
            run.stop(run.num_stops(), "tested")
    rivals = [threading.Thread(target=come_late, args=(open_ledger(folder), size)) for size in (3, 5)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(60)
    if open_ledger(folder).open_runs():  # both may have stopped at an incomplete selection
        drive(open_ledger(folder))
    check(folder)


def test_a_batch_whose_first_attempt_died_midway_counts_as_the_second_attempt_wrote_it(folder: Path) -> None:
    run = begin(open_ledger(folder))
    everything = list(range(NUM_PLANNED))
    run.stage("outcomes", outcomes(run, everything, failed=[3]))  # an image timed out; then the worker died
    write_batch(run, everything)
    publish(run)
    check(folder)
    assert all(row["status"] == "answered" for row in rows(folder, "outcomes"))


def test_a_zombie_that_marks_the_same_batch_later_changes_nothing(folder: Path) -> None:
    run = begin(open_ledger(folder))
    assert write_batch(run, range(NUM_PLANNED))
    assert not write_batch(run, range(NUM_PLANNED), failed=[1, 2])
    publish(run)
    write_batch(run, [0, 1])
    run.close()
    check(folder)


def test_a_commit_whose_file_is_missing_publishes_nothing(folder: Path) -> None:
    run = begin(open_ledger(folder))
    write_batch(run, range(NUM_PLANNED))
    lost = next(run.markers()).fragments[1]
    assert lost.table == "predictions"
    (folder / "tables" / lost.table / lost.path).unlink()
    with pytest.raises(StorageError, match=r"is missing; nothing was published"):
        publish(run)
    assert run.outcome() is None
    with pytest.raises(StorageError, match=r"is missing; nothing was published"):
        run.tables.commit("predictions", [lost], app_id=run.run_id)
    assert run.tables.open("predictions").version() == 0
    open_ledger(folder).abandon(run, "its files are gone")
    drive(open_ledger(folder))
    check(folder)


def test_a_commit_whose_file_was_cut_short_publishes_nothing(folder: Path) -> None:
    ledger = open_ledger(folder)
    run = begin(ledger)
    fragment = run.stage("outcomes", outcomes(run, range(NUM_PLANNED)))
    file = folder / "tables" / "outcomes" / fragment.path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match="bytes instead of"):
        ledger._tables.commit("outcomes", [fragment], app_id="x")
    assert rows(folder, "outcomes") == []


def test_the_same_call_joins_and_another_is_refused(folder: Path) -> None:
    ledger = open_ledger(folder)
    run = begin(ledger, digest="d")
    joined = open_ledger(folder).join(["w"], "d")
    assert joined is not None
    assert joined.run_id == run.run_id
    with pytest.raises(OpenRunError, match=f"winnow runs resume {run.run_id}.*winnow runs abandon {run.run_id}"):
        ledger.join(["w"], "other")
    assert ledger.join(["elsewhere"], "other") is None
    ledger.abandon(run, "tested")
    assert ledger.join(["w"], "other") is None


def test_abandoning_and_publishing_compete_for_one_decision(folder: Path) -> None:
    ledger = open_ledger(folder)
    run = begin(ledger)
    write_batch(run, range(NUM_PLANNED))
    assert ledger.abandon(run, "tested")["status"] == "abandoned"
    assert publish(run)["status"] == "abandoned"
    assert rows(folder, "outcomes") == []
    again = begin(ledger)
    write_batch(again, range(NUM_PLANNED))
    publish(again)
    assert ledger.abandon(again, "too late")["status"] == "finished"
    check(folder)


def test_of_rivals_that_begin_at_once_one_gets_the_work(folder: Path) -> None:
    ledgers = [open_ledger(folder) for _ in range(6)]
    plans = [plan(ledger, ("a", "b", "c")) for ledger in ledgers]
    begun: list[Run] = []
    barrier = threading.Barrier(len(ledgers))

    def race(ledger: Ledger, own: Plan) -> None:
        barrier.wait(10)
        run = ledger.begin(own)
        if run is not None:
            begun.append(run)

    threads = [threading.Thread(target=race, args=pair) for pair in zip(ledgers, plans, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(begun) == 1
    assert [run.run_id for run in open_ledger(folder).open_runs()] == [begun[0].run_id]


def test_a_run_that_cannot_get_all_its_works_gives_up_those_it_has(folder: Path) -> None:
    ledger = open_ledger(folder)
    late = plan(ledger, ("a", "b"), digest="late")
    first = begin(ledger, ("b",))
    assert ledger.begin(late) is None
    assert ledger.open_run("a") is None
    assert [run.run_id for run in ledger.open_runs()] == [first.run_id]


def test_after_a_stop_only_batches_with_storage_failures_are_asked_again(folder: Path) -> None:
    run = begin(open_ledger(folder))
    write_batch(run, [0, 1, 2, 3])
    write_batch(run, [4, 5, 6, 7], failed=[4, 5], systemic=2)
    assert num_positions(run.select().missing) == 4
    run.stop(0, "tested")
    assert run.select().missing == ((4, 12),)
    assert write_batch(run, [4, 5, 6, 7])
    drive(open_ledger(folder))
    check(folder)


def test_tables_are_plain_delta_tables_with_one_commit_per_run(folder: Path) -> None:
    drive(open_ledger(folder))
    table = open_ledger(folder)._tables.open("outcomes")
    assert table.version() == 1
    assert {entry["operation"] for entry in table.history()} == {"CREATE TABLE", "WRITE"}


def test_rows_that_do_not_fit_the_table_are_refused_before_anything_is_written(folder: Path) -> None:
    tables = open_ledger(folder)._tables
    with pytest.raises(ValueError, match="has no columns \\['colour'\\]"):
        tables.write("outcomes", pa.table({"colour": ["red"]}), folder="x")
    with pytest.raises(ValueError, match="'image_id' must not be null"):
        tables.write("outcomes", pa.table({"status": ["answered"]}), folder="x")
    assert not (folder / "tables" / "outcomes" / "x").exists()


def test_unknown_run_is_named(folder: Path) -> None:
    with pytest.raises(CallError, match="run 'nonsense' is unknown; `winnow runs`"):
        open_ledger(folder).load("nonsense")


def test_digest_ignores_key_order_only() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_fragment_sizes_are_the_files_sizes(folder: Path) -> None:
    run = begin(open_ledger(folder))
    fragment = run.stage("outcomes", outcomes(run, [1, 2]))
    assert fragment == Fragment(
        "outcomes", fragment.path, 2, (folder / "tables/outcomes" / fragment.path).stat().st_size
    )
