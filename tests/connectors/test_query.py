from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from delta_tables import HandMade, at
from winnow.errors import QueryError, StorageError
from winnow.schemas import TABLES
from winnow_connectors.query import QueryEngine
from winnow_connectors.views import VIEWS


@pytest.fixture
def warehouse(tmp_path: Path) -> HandMade:
    return HandMade(tmp_path / "tables")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    """A warehouse with one prediction, for tests that write nothing."""
    warehouse = HandMade(tmp_path_factory.mktemp("warehouse") / "tables")
    warehouse.add("predictions", image_id="a", label="cat")
    return warehouse


# ---------------------------------------------------------------------------------------------------------------- views


def test_every_view_works_on_an_empty_warehouse(warehouse: HandMade) -> None:
    for name in VIEWS:
        assert warehouse.rows(f"FROM {name}") == []


@pytest.mark.parametrize(
    ("view", "table"),
    [
        ("current_images", "images"),
        ("latest_outcomes", "outcomes"),
        ("failures", "outcomes"),
        ("latest_predictions", "predictions"),
        ("current_labels", "labels"),
        ("results", "predictions"),
        ("results", "labels"),
    ],
)
@pytest.mark.parametrize("status", ["open", "abandoned", "stopped", "finished"])
def test_views_show_finished_runs_only(warehouse: HandMade, view: str, table: str, status: str) -> None:
    if status != "open":
        warehouse.run("r2", finished=2, status=status)
    if view == "results":
        warehouse.add("images", image_id="a")
    row = {"status": "failed"} if view == "failures" else {"label": "cat"} if table in ("predictions", "labels") else {}
    warehouse.add(table, image_id="a", run="r2", **row)
    assert len(warehouse.rows(f"SELECT image_id FROM {view}")) == (1 if status == "finished" else 0)


def test_a_run_that_is_recorded_twice_doubles_nothing(warehouse: HandMade) -> None:
    warehouse.run("r1", finished=2)
    warehouse.add("images", image_id="a")
    warehouse.add("predictions", image_id="a", label="cat")
    assert warehouse.rows("SELECT label FROM results") == [("cat",)]


def test_current_images_follow_the_last_event(warehouse: HandMade) -> None:
    for image_id, *events in [
        ("stays", "added"),
        ("gone", "added", "vanished"),
        ("back", "added", "vanished", "added"),
        ("old", "added", "replaced"),
        ("new", "changed"),
    ]:
        for minute, event in enumerate(events):
            warehouse.add("images", image_id=image_id, event=event, seen_at=at(minute))
    assert warehouse.rows("SELECT image_id, event FROM current_images ORDER BY 1") == [
        ("back", "added"),
        ("new", "changed"),
        ("stays", "added"),
    ]


def test_one_image_seen_twice_at_one_time_is_one_row(warehouse: HandMade) -> None:
    for _ in range(2):
        warehouse.add("images", image_id="a")
        warehouse.add("predictions", image_id="a", label="cat")
    assert warehouse.rows("SELECT count(*) FROM current_images") == [(1,)]
    assert warehouse.rows("SELECT count(*) FROM results") == [(1,)]


def test_a_failure_disappears_when_a_later_run_answers(warehouse: HandMade) -> None:
    warehouse.add("images", image_id="a")
    warehouse.add(
        "outcomes", image_id="a", status="failed", stage="fetch", error="unavailable", message="down", retryable=True
    )
    expected = [("file:///a.jpg", "unavailable", "down", True, True)]
    assert warehouse.rows("SELECT uri, error, message, retryable, current FROM failures") == expected
    # Of another model, or of a run that is not finished: the failure stays.
    warehouse.add("outcomes", image_id="a", model="kind@2", at=at(5))
    warehouse.add("outcomes", image_id="a", run="open", at=at(5))
    assert warehouse.rows("SELECT uri, error, message, retryable, current FROM failures") == expected
    warehouse.run("r2", finished=9)
    warehouse.add("outcomes", image_id="a", run="r2", at=at(8))
    assert warehouse.rows("FROM failures") == []


def test_a_later_failure_counts_again(warehouse: HandMade) -> None:
    warehouse.run("r2", finished=9)
    warehouse.add("outcomes", image_id="a", status="answered")
    warehouse.add("outcomes", image_id="a", status="failed", run="r2")
    assert warehouse.rows("SELECT image_id, run, current FROM failures") == [("a", "r2", False)]


def test_failures_of_vanished_images_are_marked(warehouse: HandMade) -> None:
    warehouse.add("images", image_id="a")
    warehouse.add("images", image_id="a", event="vanished", seen_at=at(5))
    warehouse.add("outcomes", image_id="a", status="failed")
    assert warehouse.rows("SELECT uri, current FROM failures") == [("file:///a.jpg", False)]


def test_latest_predictions_come_from_the_run_that_finished_last(warehouse: HandMade) -> None:
    warehouse.run("slow", finished=9)
    warehouse.run("quick", finished=5)
    warehouse.add("images", image_id="a")
    warehouse.add("predictions", image_id="a", label="dog", run="slow", model="kind@2", at=at(2))
    warehouse.add("predictions", image_id="a", label="cat", run="quick", at=at(4))
    warehouse.add("predictions", image_id="a", label="red", task="colour", run="quick", model="colour@1", at=at(4))
    warehouse.add("predictions", image_id="a", label="fox", run="open", at=at(99))
    assert warehouse.rows("SELECT uri, task, model, label, current FROM latest_predictions ORDER BY task") == [
        ("file:///a.jpg", "colour", "colour@1", "red", True),
        ("file:///a.jpg", "kind", "kind@2", "dog", True),
    ]


def label_of(warehouse: HandMade) -> list[tuple[Any, ...]]:
    return warehouse.rows("SELECT label, origin FROM current_labels")


def test_the_last_event_of_an_annotation_counts(warehouse: HandMade) -> None:
    warehouse.add("labels", image_id="a", label="dog", annotation_id=7, event="changed", updated_at=at(5))
    warehouse.add("labels", image_id="a", label="cat", annotation_id=7, event="created", updated_at=at(4))
    assert label_of(warehouse) == [("dog", "label_studio")]


@pytest.mark.parametrize("event", ["deleted", "skipped"])
@pytest.mark.parametrize("minute", [4, 5], ids=["same time", "later"])
def test_deleted_and_skipped_annotations_drop_out(warehouse: HandMade, event: str, minute: int) -> None:
    warehouse.add("labels", image_id="a", label="cat", annotation_id=7, event="created", updated_at=at(4))
    warehouse.add("labels", image_id="a", annotation_id=7, event=event, updated_at=at(minute))
    assert label_of(warehouse) == []
    # A new answer after that counts, and so does the same number in another project.
    warehouse.add("labels", image_id="a", label="dog", annotation_id=7, project=2, updated_at=at(1))
    assert label_of(warehouse) == [("dog", "label_studio")]


def test_the_last_imported_label_counts_and_people_beat_it(warehouse: HandMade) -> None:
    for minute, label in enumerate(["cat", "dog"]):
        warehouse.add(
            "labels", image_id="a", label=label, event="imported", origin="imported", server=None, project=None,
            updated_at=at(10 + minute),
        )  # fmt: skip
    assert label_of(warehouse) == [("dog", "imported")]
    warehouse.add("labels", image_id="a", label="fox", updated_at=at(1))
    assert label_of(warehouse) == [("fox", "label_studio")]


@pytest.mark.parametrize(
    ("production", "shown"),
    [([], "plain"), (["kind@1"], "one"), (["kind@1", "kind@2"], "two"), (["kind@1", "kind@base"], "plain")],
)
def test_what_is_shown_is_of_the_version_in_production(warehouse: HandMade, production: list[str], shown: str) -> None:
    warehouse.add("images", image_id="a")
    warehouse.add("images", image_id="b")
    answers = [("torchvision/net", "plain"), ("kind@1+mild.abcx4", "one"), ("kind@2", "two"), ("kind@12", "other")]
    for number, (model, label) in enumerate(answers, start=2):  # the last one to answer was never promoted
        warehouse.run(f"r{number}", finished=number)
        warehouse.add("predictions", image_id="a", model=model, label=label, run=f"r{number}")
        rle = {"size": [1, 1], "counts": "1"}
        warehouse.add("segments", image_id="a", task="kind", model=model, label=label, rle=rle, run=f"r{number}")
    warehouse.add("predictions", image_id="b", model="kind@12", label="other", run="r5")
    for minute, version in enumerate(production):
        warehouse.add("models", task="kind", version=version, event="promoted", at=at(minute))
    assert warehouse.rows("SELECT image_id, label FROM latest_predictions ORDER BY 1") == [("a", shown), ("b", "other")]
    assert warehouse.rows("SELECT label FROM latest_segments") == [(shown,)]
    assert warehouse.rows("SELECT label FROM results WHERE image_id = 'a' AND task = 'kind'")[0] == (shown,)


def test_of_one_annotator_the_newest_counts(warehouse: HandMade) -> None:
    for label, minute in (("cat", 5), ("dog", 6), ("fox", 4)):
        warehouse.add("labels", image_id="a", label=label, annotator="ann", updated_at=at(minute))
    assert label_of(warehouse) == [("dog", "label_studio")]


def test_of_several_annotators_the_majority_counts(warehouse: HandMade) -> None:
    def say(annotator: str, label: str | None, minute: int, **more: Any) -> None:
        warehouse.add("labels", image_id="a", label=label, annotator=annotator, updated_at=at(minute), **more)

    say("ann", "cat", 1)
    say("bob", "dog", 2)
    assert label_of(warehouse) == []  # nobody is ahead
    say("eve", "cat", 3)
    assert label_of(warehouse) == [("cat", "label_studio")]
    say("dan", None, 4, value='{"answer":"unsure"}')
    assert label_of(warehouse) == [("cat", "label_studio")]
    say("bob", None, 5, event="skipped")  # another annotation of his: a skip is no vote
    say("ann", "dog", 6)
    assert label_of(warehouse) == [("dog", "label_studio")]
    say("bob", "fox", 7)
    assert label_of(warehouse) == []
    warehouse.add("labels", image_id="a", label="owl", event="imported", origin="imported", server=None, project=None)
    assert label_of(warehouse) == [("owl", "imported")]  # as long as people disagree


def test_a_consensus_counts_among_masks_only(warehouse: HandMade) -> None:
    def say(annotator: str | None, value: str, minute: int, **more: Any) -> None:
        warehouse.add("labels", image_id="a", value=value, annotator=annotator, updated_at=at(minute), **more)

    def current() -> list[tuple[Any, ...]]:
        return warehouse.rows("SELECT origin, value FROM current_labels WHERE task = 'kind'")

    say("ann", '{"segments":[1]}', 1)
    say("bob", '{"segments":[2]}', 2)
    assert current() == [("label_studio", '{"segments":[2]}')]
    say(None, '{"segments":[3]}', 3, origin="consensus", server=None, project=None)
    assert current() == [("consensus", '{"segments":[3]}')]
    for annotator in ("ann", "bob"):
        say(annotator, '{"segments":[],"answer":"unsure"}', 4)
    assert current() == [("label_studio", '{"segments":[],"answer":"unsure"}')]


def waiting(warehouse: HandMade) -> list[tuple[Any, ...]]:
    return warehouse.rows("SELECT image_id, round FROM queue_waiting ORDER BY ALL")


def test_a_queue_row_waits_until_a_person_labels_or_skips_the_image(warehouse: HandMade) -> None:
    for image_id in "abcd":
        warehouse.add("images", image_id=image_id)
        warehouse.add("queue", image_id=image_id)
    warehouse.add("queue", image_id="a", task="other")
    warehouse.add("queue", image_id="e", run="unfinished")
    warehouse.add("labels", image_id="a", label="cat", round=1)
    warehouse.add("labels", image_id="b", event="skipped")
    warehouse.add("labels", image_id="c", label="cat", origin="imported", event="imported")
    assert waiting(warehouse) == [("a", 1), ("c", 1), ("d", 1)]
    assert warehouse.rows("SELECT task FROM queue_waiting WHERE image_id = 'a'") == [("other",)]


def test_a_deleted_annotation_and_a_new_round_wait_again(warehouse: HandMade) -> None:
    for image_id in "ab":
        warehouse.add("images", image_id=image_id)
        warehouse.add("queue", image_id=image_id)
    warehouse.add("labels", image_id="a", annotation_id=7, label="cat", round=1)
    warehouse.add("labels", image_id="a", annotation_id=7, event="deleted", round=1, updated_at=at(5))
    warehouse.add("labels", image_id="b", annotation_id=8, label="cat", round=1)
    assert waiting(warehouse) == [("a", 1)]
    warehouse.add("queue", image_id="b", round=2)
    assert waiting(warehouse) == [("a", 1), ("b", 2)]
    warehouse.add("labels", image_id="b", annotation_id=9, label="dog", round=2)
    assert waiting(warehouse) == [("a", 1)]


def test_the_queue_says_where_an_image_lies_and_that_it_is_gone(warehouse: HandMade) -> None:
    for image_id in "ab":
        warehouse.add("images", image_id=image_id)
        warehouse.add("queue", image_id=image_id)
    warehouse.add("images", image_id="b", event="vanished", seen_at=at(9))
    assert warehouse.rows("SELECT uri, current FROM queue_waiting ORDER BY 1") == [
        ("file:///a.jpg", True),
        ("file:///b.jpg", False),
    ]


def results_of(warehouse: HandMade) -> list[tuple[Any, ...]]:
    return warehouse.rows("SELECT label, source, confidence, model FROM results")


def test_results_prefer_people_then_imports_then_accepted_then_predictions(warehouse: HandMade) -> None:
    warehouse.add("images", image_id="a", split="test")
    assert results_of(warehouse) == []
    warehouse.run("r2", finished=9)
    warehouse.add("predictions", image_id="a", label="cat", confidence=0.75)
    warehouse.add("predictions", image_id="a", label="dog", model="kind@2", confidence=0.25, run="r2")
    assert results_of(warehouse) == [("dog", "prediction", 0.25, "kind@2")]
    warehouse.add("accepted", image_id="a", model="kind@1", run="look1")
    assert results_of(warehouse) == [("dog", "prediction", 0.25, "kind@2")]  # its run is not finished
    warehouse.add("runs", run_id="look1", job="accept", tasks=["kind"], finished_at=at(10))
    assert results_of(warehouse) == [("cat", "accepted", 0.75, "kind@1")]
    warehouse.add("accepted", image_id="a", model="kind@1", label="lynx", run="look2")
    warehouse.add("runs", run_id="look2", job="accept", tasks=["kind"], finished_at=at(11))
    assert results_of(warehouse) == [("lynx", "accepted", 0.75, "kind@1")]
    warehouse.add("labels", image_id="a", label="fox", event="imported", origin="imported", server=None, project=None)
    assert results_of(warehouse) == [("fox", "imported", None, None)]
    warehouse.add("labels", image_id="a", label="owl")
    assert results_of(warehouse) == [("owl", "person", None, None)]
    assert warehouse.rows("SELECT image_id, uri, split, task FROM results") == [("a", "file:///a.jpg", "test", "kind")]


def test_results_leave_out_images_without_answer_and_images_that_are_gone(warehouse: HandMade) -> None:
    warehouse.add("images", image_id="failed")
    warehouse.add("outcomes", image_id="failed", status="failed")
    warehouse.add("images", image_id="gone", event="vanished")
    warehouse.add("predictions", image_id="gone", label="cat")
    warehouse.add("labels", image_id="gone", label="cat")
    assert results_of(warehouse) == []


def test_a_person_who_is_unsure_leaves_the_prediction_standing(warehouse: HandMade) -> None:
    warehouse.add("images", image_id="a")
    warehouse.add("predictions", image_id="a", label="cat")
    warehouse.add("labels", image_id="a", label=None, reason="unsure")
    assert results_of(warehouse) == [("cat", "prediction", 0.5, "kind@1")]


# --------------------------------------------------------------------------------------------------------------- engine


def test_only_the_tables_of_the_statement_are_opened_and_runs_first(warehouse: HandMade) -> None:
    engine = QueryEngine(warehouse)
    engine.sql('SELECT label, count(*) FROM "Predictions" GROUP BY 1')
    assert warehouse.opened == ["predictions"]
    warehouse.opened.clear()
    engine.sql("SELECT 1")
    assert warehouse.opened == []
    engine.sql("SELECT (SELECT count(*) FROM results), (SELECT count(*) FROM queue)")
    assert warehouse.opened[0] == "runs"
    assert sorted(warehouse.opened) == ["accepted", "images", "labels", "models", "predictions", "queue", "runs"]


@pytest.mark.parametrize(
    "statement",
    ["FROM query_table('pre' || 'dictions')", "FROM query('FROM pre' || 'dictions')", "SUMMARIZE predictions"],
)
def test_a_table_named_in_a_roundabout_way_is_found(unchanged: HandMade, statement: str) -> None:
    assert unchanged.rows(statement)


def test_tables_and_columns_can_be_listed(unchanged: HandMade) -> None:
    assert {name for (name,) in unchanged.rows("SHOW TABLES")} == {*TABLES, *VIEWS}
    described = [row[0] for row in unchanged.rows("DESCRIBE predictions")]
    assert described == TABLES["predictions"].names
    listed = unchanged.rows("SELECT count(*) FROM information_schema.columns WHERE table_name = 'runs'")
    assert listed == [(len(TABLES["runs"]),)]


@pytest.mark.parametrize(
    "statement",
    [
        "WITH t AS (SELECT label FROM predictions) FROM t",
        "TABLE predictions",
        "VALUES (1)",
        "PIVOT predictions ON label USING count(*)",
        "PIVOT predictions ON label IN ('cat') USING count(*)",
        "WITH p AS (PIVOT predictions ON label USING count(*)) FROM p",
        "EXPLAIN SELECT * FROM results",
        "EXPLAIN ANALYZE SELECT * FROM predictions",
        "EXPLAIN (FORMAT json) SELECT * FROM predictions",
        "/* a */ -- b\n EXPLAIN /* c */ FROM predictions -- d",
        "-- which labels; how many?\nSELECT label FROM predictions;",
    ],
)
def test_statements_that_read_are_allowed(unchanged: HandMade, statement: str) -> None:
    assert unchanged.rows(statement)


def test_times_are_utc_and_types_survive(warehouse: HandMade) -> None:
    warehouse.add("images", image_id="a", metadata=[("camera", "north")])
    table = QueryEngine(warehouse).sql("SELECT seen_at, metadata, metadata['camera'] AS camera FROM images")
    assert table.schema.field("seen_at").type == pa.timestamp("us", tz="UTC")
    assert table.to_pylist() == [{"seen_at": at(0), "metadata": [("camera", "north")], "camera": "north"}]


def test_a_reader_streams_and_can_be_left_early(warehouse: HandMade) -> None:
    reader = QueryEngine(warehouse, memory_limit="200MB").reader(
        "SELECT i, repeat('x', 100) AS x FROM range(50_000_000) t(i)"
    )
    first = next(iter(reader))
    assert 0 < first.num_rows < 1_000_000
    reader.close()


def test_what_does_not_fit_into_memory_spills_to_the_given_folder_and_is_removed(
    warehouse: HandMade, tmp_path: Path
) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    engine = QueryEngine(warehouse, memory_limit="80MB", spill=spill)
    reader = engine.reader("SELECT i, repeat(md5(i::VARCHAR), 4) AS x FROM range(1_000_000) t(i) ORDER BY x")
    next(iter(reader))
    assert list(spill.rglob("*")), "the sort of 128 MB did not spill"
    del reader
    assert list(spill.rglob("*")) == []


# --------------------------------------------------------------------------------------------------------------- errors


def message_of(warehouse: HandMade, statement: str) -> str:
    with pytest.raises(QueryError) as caught:
        QueryEngine(warehouse).sql(statement)
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message
    return caught.value.message


def test_an_unknown_column_lists_the_columns_of_that_table_only(unchanged: HandMade) -> None:
    message = message_of(unchanged, "SELECT lable FROM predictions")
    assert '"lable" not found' in message
    assert f"predictions: {', '.join(TABLES['predictions'].names)}" in message
    assert "runs" not in message
    message = message_of(unchanged, "SELECT lable FROM results")
    assert "results: image_id, uri, split, task, label, source, confidence, model, at" in message
    assert "predictions:" not in message


def test_an_unknown_table_lists_the_tables_and_views(unchanged: HandMade) -> None:
    message = message_of(unchanged, "FROM images JOIN result USING (image_id)")
    assert "result does not exist" in message
    assert 'did you mean "results"?' in message
    for name in (*TABLES, *VIEWS):
        assert name in message


@pytest.mark.parametrize(("statement", "word"), [("SELECT at FROM runs", "at"), ("SELECT group FROM images", "group")])
def test_columns_named_like_sql_words_are_explained(unchanged: HandMade, statement: str, word: str) -> None:
    assert f'write "{word}" in double quotes' in message_of(unchanged, statement)


def test_a_syntax_error_names_the_place(unchanged: HandMade) -> None:
    assert 'syntax error at or near "results"' in message_of(unchanged, "SELECT * FORM results")


def test_a_failure_while_reading_is_a_query_error(unchanged: HandMade) -> None:
    reader = QueryEngine(unchanged).reader("SELECT if(i < 1_000_000, i::VARCHAR, 'x')::INT FROM range(1_000_001) t(i)")
    with pytest.raises(QueryError, match="Could not convert"):
        reader.read_all()


def test_a_lost_file_is_a_storage_error(warehouse: HandMade) -> None:
    warehouse.add("predictions", image_id="a", label="cat")
    for file in (warehouse.folder / "predictions").glob("*.parquet"):
        file.unlink()
    with pytest.raises(StorageError, match="predictions cannot be read"):
        QueryEngine(warehouse).sql("SELECT label FROM predictions")


# -------------------------------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize(
    "statement",
    [
        "COPY predictions TO '{out}'",
        "COPY (SELECT 1) TO '{out}' (FORMAT parquet)",
        "EXPLAIN COPY (SELECT 1) TO '{out}'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
        "EXPLAIN ANALYZE/**/COPY (SELECT 1) TO '{out}'",
        "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{out}'",
        "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
        "WITH t AS (COPY (SELECT 1) TO '{out}') FROM t",
        "WITH t AS (INSERT INTO runs DEFAULT VALUES RETURNING *) FROM t",
        "WITH t AS (DELETE FROM predictions RETURNING *) FROM t",
        "EXPORT DATABASE '{out}'",
        "ATTACH '{out}'",
        "CREATE TABLE t AS SELECT 1",
        "CREATE TABLE t AS PIVOT predictions ON label USING count(*)",
        "CREATE OR REPLACE VIEW results AS SELECT 1",
        "CREATE MACRO f() AS 1",
        "INSERT INTO predictions SELECT * FROM predictions",
        "DELETE FROM predictions",
        "UPDATE predictions SET label = 'x'",
        "DROP VIEW results",
        "PRAGMA database_list",
        "PRAGMA enable_profiling",
        "CALL pragma_version()",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "SET memory_limit = '1TB'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "LOAD '{out}'",
        "CREATE SECRET s (TYPE s3)",
        "PREPARE p AS SELECT 1",
        "CHECKPOINT",
        "VACUUM",
        "BEGIN",
        "USE memory",
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{out}'",
        "",
        "-- nothing",
        "FROM '{secret}'",
        'FROM "{secret}"',
        "FROM read_csv('{secret}')",
        "FROM read_csv_auto('{secret}')",
        "FROM read_text('{secret}')",
        "FROM read_blob('{secret}')",
        "FROM read_json('{secret}')",
        "FROM read_parquet('{secret}')",
        "FROM read_duckdb('{secret}')",
        "FROM parquet_metadata('{secret}')",
        "FROM sniff_csv('{secret}')",
        "FROM glob('/etc/*')",
        "FROM read_text('http://127.0.0.1:9/')",
        "FROM query('FROM read_text(''{secret}'')')",
        "FROM query('COPY (SELECT 1) TO ''{out}''')",
        "FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{secret}'')'))",
        "SELECT getenv('WINNOW_TEST_SECRET')",
        "FROM enable_profiling(save_location := '{out}')",
        "FROM enable_logging(storage := 'file', storage_path := '{out}')",
        "FROM frame",
        "FROM warehouse",
        "FROM python_map_function((SELECT 1))",
        "FROM arrow_scan(1, 2, 3)",
        "FROM pandas_scan()",
    ],
)
def test_statements_that_write_or_reach_outside_are_refused(
    unchanged: HandMade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    frame = pa.table({"x": [1]})  # what Python replacement scans would find
    monkeypatch.setenv("WINNOW_TEST_SECRET", "s3cr3t")
    secret, out = tmp_path / "secret.txt", tmp_path / "out"
    secret.write_text("s3cr3t")
    before = sorted(unchanged.folder.rglob("*"))
    message = message_of(unchanged, statement.format(out=out, secret=secret))
    assert "s3cr3t" not in message
    assert not out.exists()
    assert sorted(unchanged.folder.rglob("*")) == before
    assert frame.num_rows == 1


def test_settings_cannot_be_changed_by_a_statement_that_reads(unchanged: HandMade) -> None:
    names = "'enable_external_access', 'lock_configuration', 'autoload_known_extensions', 'python_enable_replacements'"
    rows = unchanged.rows(f"SELECT name, value FROM duckdb_settings() WHERE name IN ({names}) ORDER BY name")
    assert [value for _, value in rows] == ["false", "false", "true", "false"]
    message_of(unchanged, "SELECT set_config('enable_external_access', 'true')")


def test_engines_share_nothing_with_duckdbs_default_connection(unchanged: HandMade) -> None:
    duckdb.sql("CREATE OR REPLACE TABLE stray AS SELECT 1 AS x")
    message_of(unchanged, "FROM stray")


def test_ctrl_c_stops_a_long_query(tmp_path: Path) -> None:
    code = """
        from winnow_connectors.query import QueryEngine
        print("ready", flush=True)
        try:
            QueryEngine(None).sql("SELECT sum(i * j % 7) FROM range(10_000_000) a(i), range(10_000_000) b(j)")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[0] == "interrupted\n"
    finally:
        process.kill()
        process.communicate(timeout=20)
