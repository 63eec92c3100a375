"""SQL over the tables and views, by DuckDB: read-only, one consistent snapshot of each table, flat memory.

``VIEWS`` says what is current. Every view shows finished runs only: a row counts when its ``run`` stands in ``runs``
with the status ``finished``. ``runs`` is therefore opened before any other table; what is opened later holds at least
the rows of the runs that it names.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from winnow.errors import QueryError, StorageError
from winnow.schemas import TABLES

if TYPE_CHECKING:
    import duckdb
    import pyarrow.dataset as ds

logger = logging.getLogger(__name__)

_FINISHED = """
finished AS (
    SELECT run_id AS run, max(finished_at) AS run_finished_at FROM runs WHERE status = 'finished' GROUP BY run_id
)"""

_LAST_SEEN = """
seen AS (
    SELECT images.* FROM images SEMI JOIN finished USING (run)
    QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY seen_at DESC, event) = 1
)"""

_CURRENT = "event IN ('added', 'changed')"

_NEWEST_PREDICTION = """
newest AS (
    SELECT predictions.* FROM predictions JOIN finished USING (run)
    QUALIFY row_number() OVER (
        PARTITION BY image_id, task ORDER BY run_finished_at DESC, predictions."at" DESC, model
    ) = 1
)"""

VIEWS: dict[str, str] = {
    "current_images": f"""
WITH {_FINISHED}, {_LAST_SEEN}
SELECT * FROM seen WHERE {_CURRENT}
""",
    "latest_outcomes": f"""
WITH {_FINISHED}
SELECT outcomes.* FROM outcomes JOIN finished USING (run)
QUALIFY row_number() OVER (PARTITION BY image_id, task, model ORDER BY run_finished_at DESC, outcomes."at" DESC) = 1
""",
    "failures": f"""
WITH {_FINISHED},
failed AS (SELECT * FROM latest_outcomes WHERE status = 'failed'),
seen AS (
    SELECT images.* FROM images SEMI JOIN failed USING (image_id) SEMI JOIN finished USING (run)
    QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY seen_at DESC, event) = 1
)
SELECT f.image_id, s.uri, f.task, f.model, f.stage, f.error, f.message, f.retryable, f.sha256, f.num_bytes, f.format,
    f.width, f.height, f.run, f."at", coalesce(s.{_CURRENT}, false) AS current
FROM failed AS f LEFT JOIN seen AS s USING (image_id)
""",
    "latest_predictions": f"""
WITH {_FINISHED}, {_LAST_SEEN}, {_NEWEST_PREDICTION}
SELECT n.image_id, s.uri, n.task, n.model, n.label, n.confidence, n.margin, n.entropy, n.top5, n.probabilities, n.run,
    n."at", coalesce(s.{_CURRENT}, false) AS current
FROM newest AS n LEFT JOIN seen AS s USING (image_id)
""",
    # Of each annotation the last event counts (of two at one time: the deletion); then one label per image and task.
    "current_labels": f"""
WITH {_FINISHED},
events AS (SELECT labels.*, run_finished_at FROM labels JOIN finished USING (run)),
annotations AS (
    SELECT * FROM events WHERE origin = 'label_studio'
    QUALIFY row_number() OVER (
        PARTITION BY server, project, annotation_id
        ORDER BY updated_at DESC, event IN ('deleted', 'skipped') DESC, event = 'changed' DESC, run_finished_at DESC
    ) = 1
),
valid AS (
    SELECT * FROM annotations WHERE event NOT IN ('deleted', 'skipped')
    UNION ALL
    SELECT * FROM events WHERE origin = 'imported'
)
SELECT * EXCLUDE run_finished_at FROM valid
QUALIFY row_number() OVER (
    PARTITION BY image_id, task
    ORDER BY origin = 'label_studio' DESC, updated_at DESC, run_finished_at DESC, annotation_id DESC
) = 1
""",
    "results": f"""
WITH {_FINISHED}, {_LAST_SEEN}, {_NEWEST_PREDICTION},
chosen AS (
    SELECT accepted.*, run_finished_at FROM accepted JOIN finished USING (run)
    QUALIFY row_number() OVER (PARTITION BY image_id, task ORDER BY run_finished_at DESC, accepted."at" DESC) = 1
),
of_chosen AS (
    SELECT predictions.* FROM predictions SEMI JOIN chosen USING (image_id, task, model) JOIN finished USING (run)
    QUALIFY row_number() OVER (
        PARTITION BY image_id, task, model ORDER BY run_finished_at DESC, predictions."at" DESC
    ) = 1
),
decided AS (
    SELECT image_id, task, label, if(origin = 'label_studio', 'person', 'imported') AS source,
        NULL::FLOAT AS confidence, NULL::VARCHAR AS model, updated_at AS "at", 1 AS precedence
    FROM current_labels WHERE label IS NOT NULL
    UNION ALL
    SELECT c.image_id, c.task, coalesce(c.label, p.label), 'accepted', p.confidence, c.model, c."at", 2
    FROM chosen AS c LEFT JOIN of_chosen AS p USING (image_id, task, model)
    WHERE coalesce(c.label, p.label) IS NOT NULL
),
answers AS (
    SELECT * EXCLUDE precedence FROM decided
    QUALIFY row_number() OVER (PARTITION BY image_id, task ORDER BY precedence) = 1
    UNION ALL
    SELECT image_id, task, label, 'prediction', confidence, model, "at"
    FROM newest ANTI JOIN decided USING (image_id, task)
)
SELECT a.image_id, s.uri, s.split, a.task, a.label, a.source, a.confidence, a.model, a."at"
FROM answers AS a JOIN seen AS s USING (image_id) WHERE s.{_CURRENT}
""",
}
"""SQL of every view by name; a view may use tables and the views before it."""

_OPENING_ORDER = ("runs", *(name for name in TABLES if name != "runs"))
_WORD = re.compile(r"[a-z_]\w*")
_CATALOG = re.compile(
    # Statements that list tables, or that name one in a string: everything is opened for them.
    r"\bshow\b|\binformation_schema\b|\b(duckdb|pg|pragma|sqlite)_\w+|\bquery(_table)?\b|\bjson_execute_serialized_sql\b",
    re.IGNORECASE,
)
_BLANK = r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*"
_EXPLAIN = re.compile(rf"{_BLANK}explain\b{_BLANK}(?:\([^)]*\)|analyze\b)?", re.IGNORECASE | re.DOTALL)
_PIVOT = re.compile(rf"{_BLANK}(?:with|from|select|pivot)\b.*", re.IGNORECASE | re.DOTALL)
_RESERVED = re.compile(r"(?<![\w\"])(at(?!\s+time\b)|group(?!\s+by\b|\s*\())(?![\w\"])", re.IGNORECASE)
_NO_SUCH_TABLE = re.compile(r"Table with name .* does not exist", re.DOTALL)
_STORAGE_FAULT = re.compile(r"Python exception|reading the stream registered", re.IGNORECASE)


class TableSource(Protocol):
    """Where the tables are."""

    def dataset(self, name: str) -> ds.Dataset:
        """One consistent snapshot of a table."""
        ...


class QueryEngine:
    """Runs SQL statements over the tables of a source and the views.

    Every statement runs on a connection of its own, which opens only the tables that it names, reads nothing outside
    of them and cannot change anything.

    Args:
        source: the tables.
        memory_limit: what DuckDB may use, such as ``4GB``, before it spills to disk; half of the machine without it.
        spill: folder for what does not fit into memory, removed after each statement; the system's temporary folder
            without it.
    """

    def __init__(self, source: TableSource, *, memory_limit: str = "50%", spill: Path | None = None) -> None:
        self._source = source
        self._memory_limit = memory_limit
        self._spill = spill

    def sql(self, statement: str) -> pa.Table:
        """The whole result in memory.

        Raises:
            QueryError: the statement is wrong or not read-only.
            StorageError: a table cannot be read.
        """
        return self.reader(statement).read_all()

    def reader(self, statement: str) -> pa.RecordBatchReader:
        """The result in batches, computed while they are read. Interruptible; close it when you stop early.

        Raises:
            QueryError: the statement is wrong or not read-only; reading on can raise it too (a failed cast, memory).
            StorageError: a table cannot be read.
        """
        import duckdb

        start = time.monotonic()
        connection = self._connect()
        opened: list[str] = []
        try:
            _check_read_only(connection, statement)
            opened = self._open_tables(connection, statement)
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            batches = connection.sql(statement).to_arrow_reader(65_536)
        except duckdb.Error as error:
            raise _explain(error, connection, statement, opened) from None
        except BaseException:
            connection.close()
            raise
        logger.debug("query over %s planned in %.2f s", ", ".join(opened) or "no table", time.monotonic() - start)
        return pa.RecordBatchReader.from_batches(batches.schema, _stream(batches, connection, statement, opened))

    def _connect(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        spill = Path(self._spill or tempfile.gettempdir()) / f"winnow-query-{uuid.uuid4().hex}"
        return duckdb.connect(
            ":memory:",
            config={
                "allow_community_extensions": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
                "memory_limit": self._memory_limit,
                "preserve_insertion_order": "false",
                "python_enable_replacements": "false",
                "temp_directory": str(spill),  # DuckDB makes it when it spills, and removes it
            },
        )

    def _open_tables(self, connection: duckdb.DuckDBPyConnection, statement: str) -> list[str]:
        """Register what the statement needs; the names of tables and views, in order."""
        tables, views = _needed(statement)
        for name in tables:
            connection.register(name, self._source.dataset(name))
        for name in views:
            connection.execute(f"CREATE VIEW {name} AS {VIEWS[name]}")
        return tables + views


def _needed(statement: str) -> tuple[list[str], list[str]]:
    """Tables and views that a statement may use, in the order of opening; a few too many do no harm."""
    if _CATALOG.search(statement):
        return list(_OPENING_ORDER), list(VIEWS)
    words = set(_WORD.findall(statement.lower()))
    for name in reversed(VIEWS):
        if name in words:
            words.update(_WORD.findall(VIEWS[name].lower()))
    return [name for name in _OPENING_ORDER if name in words], [name for name in VIEWS if name in words]


def _check_read_only(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    """Refuse all but one statement that reads.

    Raises:
        QueryError: several statements, none, or one that is not a query.
    """
    import duckdb

    kinds = duckdb.StatementType
    statements = connection.extract_statements(statement)
    if len(statements) != 1:
        found = "no statement" if not statements else f"{len(statements)} statements"
        raise QueryError(
            f"found {found}; give one SELECT, for example: SELECT label, count(*) FROM results GROUP BY label"
        )
    kind, text = statements[0].type, statements[0].query
    if kind == kinds.EXPLAIN and (explain := _EXPLAIN.match(text)):
        inner = connection.extract_statements(text[explain.end() :])
        kind = inner[0].type if len(inner) == 1 else kinds.INVALID
    # A PIVOT that finds its columns in the data is several statements within.
    if kind == kinds.SELECT or (kind == kinds.MULTI and _PIVOT.fullmatch(text)):
        return
    name = str(kind).rpartition(".")[2]
    raise QueryError(
        f"{name} is refused: queries are read-only; "
        "use SELECT, WITH, FROM, VALUES, PIVOT, DESCRIBE, SUMMARIZE, SHOW TABLES or EXPLAIN of one of these"
    )


def _stream(
    batches: pa.RecordBatchReader, connection: duckdb.DuckDBPyConnection, statement: str, opened: list[str]
) -> Iterator[pa.RecordBatch]:
    import duckdb

    try:
        yield from batches
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise _explain(error, connection, statement, opened) from None
    finally:
        connection.close()


def _explain(
    error: Exception, connection: duckdb.DuckDBPyConnection, statement: str, opened: list[str]
) -> QueryError | StorageError:
    """The engine's message, and what helps to mend the statement; closes the connection."""
    import duckdb

    message = str(error).strip()
    if isinstance(error, duckdb.IOException | OSError) or _STORAGE_FAULT.search(message):
        connection.close()
        return StorageError(f"the tables {', '.join(opened)} cannot be read: {message}")
    lines = [message, ""]
    if isinstance(error, duckdb.OutOfMemoryException):
        lines += ["Select fewer columns or rows, or free memory and disk space."]
    elif isinstance(error, duckdb.PermissionException):
        lines += ["Queries read the tables and views only, no files and no network."]
    elif not opened or _NO_SUCH_TABLE.search(message):
        lines += [f"Tables: {', '.join(sorted(TABLES))}", f"Views: {', '.join(VIEWS)}"]
    else:
        named = set(_WORD.findall(statement.lower()))
        lines += ["Columns:"]
        lines += [f"  {name}: {', '.join(connection.table(name).columns)}" for name in opened if name in named]
    if isinstance(error, duckdb.ParserException) and (word := _RESERVED.search(statement)):
        lines += [f'The column {word[1]} has the name of an SQL word: write "{word[1].lower()}" in double quotes.']
    connection.close()
    return QueryError("\n".join(lines))
