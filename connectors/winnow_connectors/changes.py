"""What a listing changes: compared with the images that are known, by DuckDB, on disk.

Everything passes through Parquet files in a scratch folder, so memory holds a few batches and what DuckDB is allowed.

An image is known by its uri. Its latest event says whether it is current, and which split and which side of the audit
reserve it has; these never change. Of a listing that names a uri twice, the first row counts.

Augmented copies are known in the same way and keep their parent. Copies that no finished run has made known yet are
left out: as images of their own they would get splits of their own.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from winnow import uris
from winnow.augment import COPY_NAME
from winnow.config import SplitsConfig
from winnow.errors import CallError, StorageError
from winnow.schemas import TABLES
from winnow.splits import assign_audit, assign_splits
from winnow_connectors.manifests import LISTING
from winnow_connectors.tables import Tables

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

SPOOL = pa.schema(
    [
        pa.field("number", pa.int64()),
        pa.field("source", pa.string()),
        *(LISTING.field(name) for name in LISTING.names if name not in ("path", "row")),
    ]
)
"""Listed rows as they are compared: ``number`` counts over all sources of a call."""

_BATCH_ROWS = 32_768
_MEMORY_LIMIT = "512MB"
_MAX_THREADS = 4
_NUM_SHOWN = 10

_KNOWN_SCHEMA = pa.schema(
    [
        (name, TABLES["images"].field(name).type)
        for name in ("image_id", "event", "uri", "version", "source", "split", "group", "audit", "parent")
    ]
    + [("seen_us", pa.int64())]
)
_IMPORTED_SCHEMA = pa.schema([("image_id", pa.string()), ("value", pa.string()), ("updated_us", pa.int64())])
_IMAGES_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int64()),
        *(field for field in TABLES["images"] if field.name not in ("seen_at", "run")),
    ]
)

_COMPARE = f"""
CREATE TABLE unpublished AS
WITH named AS (
    SELECT number, uri, regexp_extract(uri, '{COPY_NAME}', 1) AS image_id
    FROM spooled WHERE regexp_matches(uri, '{COPY_NAME}')
)
SELECT number FROM named SEMI JOIN events USING (image_id) ANTI JOIN (SELECT uri FROM events) USING (uri);

CREATE VIEW listing AS SELECT * FROM spooled ANTI JOIN unpublished USING (number);

CREATE TABLE firsts AS SELECT uri, min(number) AS number FROM listing GROUP BY uri;

CREATE TABLE listed AS
SELECT number, uri, version, label, mask, split, "group" FROM listing SEMI JOIN firsts USING (number);

CREATE TABLE known AS
WITH newest AS (SELECT uri, max(seen_us) AS seen_us FROM events GROUP BY uri)
SELECT events.* FROM events JOIN newest USING (uri, seen_us);

CREATE TABLE compared AS
SELECT l.number, l.uri, coalesce(l.version, k.version, '{uris.UNVERSIONED}') AS version, k.image_id AS known_id,
    CASE WHEN k.uri IS NULL OR k.event = 'vanished' THEN 'added'
         WHEN l.version IS NULL OR l.version = k.version THEN 'unchanged'
         ELSE 'changed' END AS event
FROM listed AS l LEFT JOIN known AS k USING (uri);

-- A group that is known keeps its side. A group that is new takes the split that is listed for any of its images.
CREATE TABLE known_groups AS
SELECT "group", arg_min(split, seen_us) AS split, arg_min(audit, seen_us) AS audit
FROM events WHERE "group" IN (SELECT "group" FROM listed) GROUP BY "group";

CREATE TABLE listed_groups AS
SELECT "group", min(split) AS split, max(split) AS other_split, min(number) AS number
FROM listed SEMI JOIN (SELECT number FROM compared WHERE known_id IS NULL) USING (number)
WHERE split IS NOT NULL AND "group" IS NOT NULL AND "group" NOT IN (SELECT "group" FROM known_groups)
GROUP BY "group";
"""

_FRESH = """
SELECT c.number, c.event, c.uri, c.version, w.source, w.size, w.last_modified, w.metadata,
    coalesce(w."group", k."group", c.uri) AS "group",
    coalesce(k.split, g.split, x.split, w.split) AS split, coalesce(k.audit, g.audit) AS audit, k.parent
FROM compared AS c
JOIN listing AS w USING (number)
LEFT JOIN known AS k ON k.uri = c.uri
LEFT JOIN known_groups AS g ON g."group" = w."group"
LEFT JOIN listed_groups AS x ON x."group" = w."group"
WHERE c.event <> 'unchanged'
"""

_GONE = """
SELECT k.image_id, 'replaced' AS event, k.uri, k.version, k.source, k.split, k."group", k.audit, k.parent
FROM known AS k JOIN compared AS c USING (uri) WHERE c.event = 'changed'
UNION ALL
SELECT k.image_id, 'vanished', k.uri, k.version, k.source, k.split, k."group", k.audit, k.parent
FROM known AS k ANTI JOIN firsts USING (uri)
WHERE $vanish AND k.event <> 'vanished' AND k.source IN (SELECT unnest($sources))
    AND (k.parent IS NULL OR k.seen_us < $listed_us)  -- a copy made since could not be listed
"""

_IMPORTED = """
WITH newest AS (SELECT image_id, max(updated_us) AS updated_us FROM imported_{column} GROUP BY image_id),
former AS (SELECT imported.* FROM imported_{column} AS imported JOIN newest USING (image_id, updated_us)),
found AS (
    SELECT coalesce(f.image_id, c.known_id) AS image_id, l.{column} AS value, coalesce(f.audit, k.audit) AS audit
    FROM listed AS l JOIN compared AS c USING (number)
    LEFT JOIN fresh AS f USING (number)
    LEFT JOIN known AS k ON k.uri = l.uri
    WHERE l.{column} IS NOT NULL
)
SELECT found.image_id, found.value AS {column}, found.audit FROM found ANTI JOIN former USING (image_id, value)
"""


@dataclass(frozen=True)
class Changes:
    """The rows that an ingest would write, waiting in Parquet files.

    Attributes:
        seen_at: time of all of them; later than every event that is known.
        num_images, num_unchanged, num_twice: distinct listed uris; of these already known as they are; further rows
            with a uri that was listed before.
        num_added, num_changed, num_vanished: events to write; each changed image also gets a ``replaced`` row.
        num_labels, num_masks: labels to write, of whole images and of their pixels.
        num_splits_kept: images whose listed split differs from the one that they have and keep.
        num_unpublished: listed objects left out: augmented copies of known images, of a run that is not finished.
    """

    folder: Path
    seen_at: datetime
    num_images: int
    num_twice: int
    num_added: int
    num_changed: int
    num_vanished: int
    num_unchanged: int
    num_labels: int
    num_masks: int
    num_splits_kept: int
    num_unpublished: int

    @property
    def is_empty(self) -> bool:
        """Nothing to write."""
        return not (self.num_added or self.num_changed or self.num_vanished or self.num_labels or self.num_masks)

    def images(self, run_id: str, *, chunk_rows: int) -> Iterator[pa.Table]:
        """Rows of the table ``images``, at most ``chunk_rows`` at a time."""
        for name in ("fresh", "gone"):
            for rows in _chunks(self.folder / f"{name}.parquet", chunk_rows):
                kept = rows.drop_columns(["number"]) if "number" in rows.column_names else rows
                yield self._stamped(kept, seen_at=self.seen_at, run=run_id)

    def labels(self, run_id: str, task: str | None, mask_task: str | None, *, chunk_rows: int) -> Iterator[pa.Table]:
        """Rows of the table ``labels``, at most ``chunk_rows`` at a time."""
        fixed = {"event": "imported", "origin": "imported", "updated_at": self.seen_at, "run": run_id}
        if self.num_labels:
            for rows in _chunks(self.folder / "label.parquet", chunk_rows):
                yield self._stamped(rows, task=task, **fixed)
        if self.num_masks:
            for rows in _chunks(self.folder / "mask.parquet", chunk_rows):
                values = [json.dumps({"mask": uri}) for uri in rows.column("mask").to_pylist()]
                rows = rows.drop_columns(["mask"]).append_column("value", pa.array(values, pa.string()))
                yield self._stamped(rows, task=mask_task, **fixed)

    @staticmethod
    def _stamped(rows: pa.Table, **values: Any) -> pa.Table:
        for name, value in values.items():
            kind = pa.timestamp("us", tz="UTC") if isinstance(value, datetime) else pa.string()
            rows = rows.append_column(name, pa.repeat(pa.scalar(value, kind), rows.num_rows))
        return rows


def compare(
    listing: Path,
    tables: Tables,
    scratch: Path,
    *,
    listed_at: datetime,
    sources: Sequence[str],
    vanish: bool,
    task: str | None,
    classes: Sequence[str] | None,
    mask_task: str | None,
    shares: SplitsConfig,
) -> Changes:
    """Compare a listing with the images and labels that are known. Writes to ``scratch`` only.

    Args:
        listing: Parquet file of the schema ``SPOOL``.
        tables: the warehouse's tables; all former ingests must be closed.
        scratch: empty folder on this machine.
        listed_at: when the listing began.
        sources: whose images vanish when they are listed no more.
        vanish: whether they do.
        task: whose labels the listing holds; None when it holds none.
        classes: the labels that the task knows; None when any label is valid.
        mask_task: whose masks the listing holds; None when it holds none.
        shares: of the splits and of the audit reserve.

    Raises:
        CallError: a label is not among the classes, or the images of one group are given to different splits.
    """
    num_events, newest_us = _copy_events(tables, scratch / "events.parquet")
    seen_at = max(datetime.now(UTC), datetime.fromtimestamp(0, UTC) + timedelta(microseconds=newest_us + 1))
    logger.debug("%d events of images are known", num_events)
    with _connect(scratch) as connection:
        pa.default_memory_pool().release_unused()
        _view(connection, "spooled", listing)
        _view(connection, "events", scratch / "events.parquet")
        connection.execute(_COMPARE)
        _check_groups(connection)
        if task is not None:
            _check_labels(connection, task, classes)
        _copy(connection, _FRESH, scratch / "listed_fresh.parquet")
        _identify(scratch / "listed_fresh.parquet", scratch / "fresh.parquet", shares)
        listed_us = (listed_at - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)
        values = {"vanish": vanish, "sources": list(sources), "listed_us": listed_us}
        _copy(connection, _GONE, scratch / "gone.parquet", values)
        _view(connection, "fresh", scratch / "fresh.parquet")
        num_imported = {}
        for column, of_task in (("label", task), ("mask", mask_task)):
            num_imported[column] = 0
            if of_task is not None:
                _copy_imported(tables, of_task, column, scratch / f"imported_{column}.parquet")
                _view(connection, f"imported_{column}", scratch / f"imported_{column}.parquet")
                _copy(connection, _IMPORTED.format(column=column), scratch / f"{column}.parquet")
                num_imported[column] = pq.read_metadata(scratch / f"{column}.parquet").num_rows
        events = dict(connection.execute("SELECT event, count(*) FROM compared GROUP BY event").fetchall())
        num_rows = int(_one(connection, "SELECT count(*) FROM listing"))
        num_unpublished = int(_one(connection, "SELECT count(*) FROM unpublished"))
        kept = int(
            _one(
                connection,
                "SELECT count(*) FROM listed AS l LEFT JOIN known AS k USING (uri) "
                'LEFT JOIN known_groups AS g ON g."group" = l."group" WHERE l.split <> coalesce(k.split, g.split)',
            )
        )
    num_images = sum(events.values())
    num_changed = events.get("changed", 0)
    return Changes(
        folder=scratch,
        seen_at=seen_at,
        num_images=num_images,
        num_twice=num_rows - num_images,
        num_added=events.get("added", 0),
        num_changed=num_changed,
        num_vanished=pq.read_metadata(scratch / "gone.parquet").num_rows - num_changed,
        num_unchanged=events.get("unchanged", 0),
        num_labels=num_imported["label"],
        num_masks=num_imported["mask"],
        num_splits_kept=kept,
        num_unpublished=num_unpublished,
    )


@contextlib.contextmanager
def _connect(scratch: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB with its tables on disk and bounded memory."""
    import duckdb

    settings: dict[str, Any] = {
        "memory_limit": _MEMORY_LIMIT,
        "temp_directory": str(scratch / "spill"),
        "preserve_insertion_order": "false",
        "autoinstall_known_extensions": "false",
    }
    connection = duckdb.connect(str(scratch / "compare.duckdb"), config=settings)
    try:
        threads = min(_MAX_THREADS, int(_one(connection, "SELECT current_setting('threads')")))
        connection.execute(f"SET threads = {threads}")
        connection.execute("SET enable_progress_bar = false")  # it would write to standard output
        yield connection
    except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
        raise StorageError(
            f"comparing the listing with what is known needs more disk: {error}; free space in {scratch.parent}, or "
            "name another folder in the environment variable TMPDIR"
        ) from None
    except RuntimeError as error:
        if "interrupted" in str(error).lower():  # DuckDB's answer to Ctrl-C
            raise KeyboardInterrupt from None
        raise
    finally:
        connection.close()


def _check_groups(connection: duckdb.DuckDBPyConnection) -> None:
    found = connection.execute(
        'SELECT "group", split, other_split FROM listed_groups WHERE split <> other_split ORDER BY number LIMIT 1'
    ).fetchone()
    if found is not None:
        group, one, other = found
        raise CallError(
            f"group {group!r} has images with split {one!r} and with split {other!r}; a group stays on one side: give "
            "all its images the same split, or leave the split of some empty"
        )


def _check_labels(connection: duckdb.DuckDBPyConnection, task: str, classes: Sequence[str] | None) -> None:
    """A label outside the task's classes is refused: nothing could ever answer or learn it, and most are typos."""
    if classes is None:
        return
    unknown = connection.execute(
        "SELECT label, count(*) FROM listed WHERE label IS NOT NULL AND label NOT IN (SELECT unnest($classes)) "
        f"GROUP BY label ORDER BY count(*) DESC, label LIMIT {_NUM_SHOWN + 1}",
        {"classes": list(classes)},
    ).fetchall()
    if unknown:
        shown = ", ".join(f"{label!r} ({count:,} images)" for label, count in unknown[:_NUM_SHOWN])
        more = " and more" if len(unknown) > _NUM_SHOWN else ""
        known = ", ".join(map(repr, classes[:_NUM_SHOWN])) + (
            f" and {len(classes) - _NUM_SHOWN} more" if len(classes) > _NUM_SHOWN else ""
        )
        raise CallError(
            f"labels unknown to task {task!r}: {shown}{more}; its classes are {known}. Mend the labels, add them to "
            f"tasks.{task}.classes, or leave them empty"
        )


def _copy_events(tables: Tables, path: Path) -> tuple[int, int]:
    """Events of images into a local file, without ``replaced`` ones; how many, and the newest time in µs."""
    condition = pc.field("event") != "replaced"
    num_rows, newest = 0, 0
    columns = {name: pc.field(name) for name in _KNOWN_SCHEMA.names[:-1]} | {
        "seen_us": pc.field("seen_at").cast(pa.int64())
    }
    with pq.ParquetWriter(path, _KNOWN_SCHEMA) as writer:
        for batch in _scan(tables, "images", columns, condition):
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=_KNOWN_SCHEMA))
            num_rows += batch.num_rows
            newest = max(newest, pc.max(batch.column("seen_us")).as_py())
    return num_rows, newest


def _copy_imported(tables: Tables, task: str, column: str, path: Path) -> None:
    """What was imported before for a task, into a local file: labels, or the URIs of masks."""
    columns = {
        "image_id": pc.field("image_id"),
        "value": pc.field("value" if column == "mask" else "label"),
        "updated_us": pc.field("updated_at").cast(pa.int64()),
    }
    with pq.ParquetWriter(path, _IMPORTED_SCHEMA) as writer:
        for batch in _scan(tables, "labels", columns, (pc.field("origin") == "imported") & (pc.field("task") == task)):
            image_ids, values, times = batch.columns
            if column == "mask":
                values = pa.array([_mask_of(value) for value in values.to_pylist()], pa.string())
            writer.write_batch(pa.RecordBatch.from_arrays([image_ids, values, times], schema=_IMPORTED_SCHEMA))


def _mask_of(value: str | None) -> str | None:
    """The URI in a label of pixels; None where it names none."""
    try:
        content = json.loads(value or "null")
    except ValueError:
        return None
    mask = content.get("mask") if isinstance(content, dict) else None
    return mask if isinstance(mask, str) else None


def _scan(
    tables: Tables, name: str, columns: dict[str, pc.Expression], condition: pc.Expression
) -> Iterator[pa.RecordBatch]:
    scanner = tables.dataset(name).scanner(
        columns=columns, filter=condition, batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=1
    )
    return (batch for batch in scanner.to_batches() if batch.num_rows)


def _identify(listed: Path, identified: Path, shares: SplitsConfig) -> None:
    """Give each new row its image_id, and its split and audit side where they are not given yet."""
    with pq.ParquetFile(listed) as file, pq.ParquetWriter(identified, _IMAGES_SCHEMA) as writer:
        for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
            pairs = zip(batch.column("uri").to_pylist(), batch.column("version").to_pylist(), strict=True)
            groups = batch.column("group")
            found: dict[str, pa.Array] = {name: batch.column(name) for name in batch.schema.names}
            found["image_id"] = pa.array([uris.image_id(uri, version) for uri, version in pairs], pa.string())
            for name, assign, kind in (("split", assign_splits, pa.string()), ("audit", assign_audit, pa.bool_())):
                open_rows = pc.is_null(found[name])
                indices = np.flatnonzero(open_rows.to_numpy(zero_copy_only=False))
                if indices.size:
                    values = assign(groups.take(pa.array(indices)).to_pylist(), shares)
                    found[name] = pc.replace_with_mask(found[name], open_rows, pa.array(values, kind))
            columns = [found[field.name].cast(field.type) for field in _IMAGES_SCHEMA]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_IMAGES_SCHEMA))


def _chunks(path: Path, chunk_rows: int) -> Iterator[pa.Table]:
    """A Parquet file as tables of at most ``chunk_rows`` rows."""
    with pq.ParquetFile(path) as file:
        pending: list[pa.RecordBatch] = []
        for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
            if pending and sum(part.num_rows for part in pending) + batch.num_rows > chunk_rows:
                yield pa.Table.from_batches(pending)
                pending = []
            pending.append(batch)
        if pending and any(part.num_rows for part in pending):
            yield pa.Table.from_batches(pending)


def _view(connection: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
    connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet({_quoted(path)})")


def _copy(connection: duckdb.DuckDBPyConnection, query: str, path: Path, values: dict[str, Any] | None = None) -> None:
    connection.execute(f"COPY ({query}) TO {_quoted(path)} (FORMAT parquet, ROW_GROUP_SIZE {_BATCH_ROWS})", values)


def _quoted(path: Path) -> str:
    text = str(path).replace("'", "''")
    return f"'{text}'"


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]
