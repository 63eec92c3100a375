"""SQL over the tables and views, by DuckDB: read-only, one consistent snapshot of each table, flat memory.

Views show finished runs only. ``runs`` is therefore opened before any other table: what is opened later holds at least
the rows of the runs that it names.
"""

from __future__ import annotations

import difflib
import logging
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import pyarrow as pa

from winnow.errors import QueryError, StorageError
from winnow.schemas import TABLES
from winnow_connectors.views import VIEWS

if TYPE_CHECKING:
    import duckdb
    import pyarrow.dataset as ds

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OPENING_ORDER = ("runs", *(name for name in TABLES if name != "runs"))
_BATCH_ROWS = 65_536
_LOCKS = (
    "SET TimeZone = 'UTC'",
    "SET enable_progress_bar = false",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)
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
_NO_SUCH_TABLE = re.compile(r"Table with name \"?(.*?)\"? does not exist!?(?:\s+Did you mean[^\n]*)?", re.DOTALL)
_STORAGE_FAULT = re.compile(r"^(IO|HTTP) Error|Python exception|reading the stream registered", re.IGNORECASE)


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
        memory_limit: what DuckDB may use, such as ``4GB``, before it spills to disk; half of what the machine or
            container has without it.
        spill: folder for what does not fit into memory, removed after each statement; the system's temporary folder
            without it.
    """

    def __init__(self, source: TableSource, *, memory_limit: str | None = None, spill: Path | None = None) -> None:
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

    def reader(self, statement: str, *, batch_rows: int = _BATCH_ROWS) -> pa.RecordBatchReader:
        """The result in batches, computed while they are read. Interruptible; close it when you stop early.

        Args:
            statement: what to ask.
            batch_rows: rows per batch, about; fewer for rows that are large.

        Raises:
            QueryError: the statement is wrong or not read-only; reading on can raise it too (a failed cast, memory).
            StorageError: a table cannot be read.
        """
        import duckdb

        start = time.monotonic()
        connection = self._connect()
        thread = ThreadPoolExecutor(1, thread_name_prefix="winnow-query")
        opened: list[str] = []

        def close() -> None:
            connection.close()
            thread.shutdown(wait=False)

        try:
            _check_read_only(connection, statement)
            opened = self._open_tables(connection, statement)
            for setting in _LOCKS:
                connection.execute(setting)
            batches = _interruptible(thread, connection, lambda: connection.sql(statement).to_arrow_reader(batch_rows))
        except duckdb.Error as error:
            failure = _explain(error, connection, statement, opened)
            close()
            raise failure from None
        except BaseException:
            close()
            raise
        logger.debug("query over %s begun in %.2f s", ", ".join(opened) or "no table", time.monotonic() - start)

        def stream() -> Iterator[pa.RecordBatch]:
            try:
                while (batch := _interruptible(thread, connection, lambda: next(batches, None))) is not None:
                    yield batch
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                raise _explain(error, connection, statement, opened) from None
            finally:
                close()

        return pa.RecordBatchReader.from_batches(batches.schema, stream())

    def _connect(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        spill = Path(self._spill or tempfile.gettempdir()) / f"winnow-query-{uuid.uuid4().hex}"
        connection = duckdb.connect(
            ":memory:",
            config={
                "allow_community_extensions": "false",
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
                "preserve_insertion_order": "false",
                "python_enable_replacements": "false",
                "temp_directory": str(spill),  # DuckDB makes it when it spills, and removes it
            },
        )
        limit = self._memory_limit
        if limit is None:
            # The engine's own choice is four fifths of what the machine or container has: leave room for others.
            size, unit = connection.execute("SELECT current_setting('memory_limit')").fetchall()[0][0].split()
            limit = f"{float(size) * 0.625:.1f}{unit}"
        connection.execute("SET memory_limit = ?", [limit])
        return connection

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


def _interruptible(thread: ThreadPoolExecutor, connection: duckdb.DuckDBPyConnection, call: Callable[[], T]) -> T:
    """What ``call`` returns. The engine sees no Ctrl-C while it streams; waiting for a thread does."""
    future: Future[T] = thread.submit(call)
    try:
        return future.result()
    finally:
        if not future.done():
            connection.interrupt()
            wait([future])


def _explain(
    error: Exception, connection: duckdb.DuckDBPyConnection, statement: str, opened: list[str]
) -> QueryError | StorageError:
    """The engine's message, and what helps to mend the statement."""
    import duckdb

    message = str(error).strip()
    if _STORAGE_FAULT.search(message):
        return StorageError(f"the tables {', '.join(opened)} cannot be read: {message}")
    unknown = _NO_SUCH_TABLE.search(message)
    if unknown:  # the engine's own suggestion knows only the tables that were opened
        close = difflib.get_close_matches(unknown[1].lower(), [*TABLES, *VIEWS], n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        message = message.replace(unknown[0], f"Table with name {unknown[1]} does not exist{hint}")
    lines = [message, ""]
    if isinstance(error, duckdb.OutOfMemoryException):
        lines += ["Select fewer columns or rows, or free memory and disk space."]
    elif isinstance(error, duckdb.PermissionException):
        lines += ["Queries read the tables and views only, no files and no network."]
    elif not opened or unknown:
        lines += [f"Tables: {', '.join(sorted(TABLES))}", f"Views: {', '.join(VIEWS)}"]
    else:
        named = set(_WORD.findall(statement.lower()))
        lines += ["Columns:"]
        lines += [f"  {name}: {', '.join(connection.table(name).columns)}" for name in opened if name in named]
    if isinstance(error, duckdb.ParserException) and (word := _RESERVED.search(statement)):
        lines += [f'The column {word[1]} has the name of an SQL word: write "{word[1].lower()}" in double quotes.']
    return QueryError("\n".join(lines))
