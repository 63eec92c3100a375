"""The Delta tables of a warehouse: create, write fragments, commit them, read.

Every table is a folder ``tables/<name>`` with Parquet files and a commit log. Files are written first and mean
nothing until a commit names them.
"""

from __future__ import annotations

import io
import json
import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from winnow.batches import Fragment
from winnow.errors import StorageError
from winnow.schemas import TABLES
from winnow_connectors.object_store import ObjectStore

if TYPE_CHECKING:
    import pyarrow.dataset as ds
    from deltalake import DeltaTable

logger = logging.getLogger(__name__)

_COMMIT_ATTEMPTS = 10


class Tables:
    """The tables under one warehouse.

    Args:
        store: the warehouse's object store.
    """

    names: Sequence[str] = tuple(TABLES)

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self) -> None:
        """Create the tables that do not exist yet, empty."""
        from deltalake import DeltaTable

        for name, schema in TABLES.items():
            DeltaTable.create(
                self._uri(name), schema=schema, mode="ignore", name=name, storage_options=self._store.delta_options()
            )

    def open(self, name: str) -> DeltaTable:
        """The table as of now.

        Raises:
            StorageError: the table is missing or cannot be read.
        """
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        try:
            return DeltaTable(self._uri(name), storage_options=self._store.delta_options())
        except (DeltaError, OSError) as error:
            raise StorageError(
                f"table {name!r} of {self._store.uri} cannot be opened: {error}; check access, or run `winnow init`"
            ) from None

    def dataset(self, name: str) -> ds.Dataset:
        """One consistent snapshot of a table, readable by DuckDB, polars and pyarrow; nothing is read yet."""
        return self.open(name).to_pyarrow_dataset(schema=TABLES[name])

    def write(self, name: str, rows: pa.Table, *, folder: str) -> Fragment:
        """Write rows as a new file of the table; no reader sees it before ``commit``.

        Args:
            name: the table.
            rows: columns may be in any order; missing nullable columns become null.
            folder: groups the files of one run; part of their path.
        """
        table = _conform(name, rows)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue()
        path = f"{folder}/{uuid.uuid4().hex}.parquet"
        self._store.put(f"tables/{name}/{path}", data)
        return Fragment(name, path, table.num_rows, len(data))

    def commit(self, name: str, fragments: Iterable[Fragment], *, app_id: str) -> bool:
        """Make fragments visible, all at once and once only: one Delta commit, identified by ``app_id``.

        Returns:
            False when a commit of that ``app_id`` is there already; nothing is changed then.

        Raises:
            StorageError: a fragment's file does not exist or has another size (naming it in a commit would make
                the table unreadable), or the commit kept failing.
        """
        from deltalake import CommitProperties, Transaction
        from deltalake.exceptions import CommitFailedError, DeltaError
        from deltalake.transaction import AddAction, RemoveAction

        chosen = list(fragments)
        now_ms = int(time.time() * 1000)
        for attempt in range(_COMMIT_ATTEMPTS):
            table = self.open(name)
            if table.transaction_version(app_id) is not None:
                return False
            if attempt == 0:
                self.check_files(chosen)
            actions: list[AddAction | RemoveAction] = [
                AddAction(
                    quote(fragment.path),
                    fragment.num_bytes,
                    {},
                    now_ms,
                    True,
                    json.dumps({"numRecords": fragment.num_rows}),
                )
                for fragment in chosen
            ]
            properties = CommitProperties(app_transactions=[Transaction(app_id, 1)])
            try:
                table.create_write_transaction(actions, "append", table.schema(), commit_properties=properties)
            except CommitFailedError as error:
                # Another driver committed the same run, or many tables' writers collided: look again.
                logger.info("commit of %s to %s collided (attempt %d): %s", app_id, name, attempt + 1, error)
                time.sleep(0.05 * 2**attempt)
                continue
            except (DeltaError, OSError) as error:
                raise StorageError(
                    f"commit to table {name!r} failed: {error}; running the same command again is safe"
                ) from None
            logger.info("table %s: committed %d files, %d rows", name, len(chosen), sum(f.num_rows for f in chosen))
            return True
        raise StorageError(
            f"commit to table {name!r} collided {_COMMIT_ATTEMPTS} times with other writers; "
            "running the same command again is safe"
        )

    def is_committed(self, name: str, app_id: str) -> bool:
        """True when a commit with that ``app_id`` is in the table."""
        return self.open(name).transaction_version(app_id) is not None

    def check_files(self, fragments: Sequence[Fragment]) -> None:
        """Make sure that the fragments' files are there, whole.

        Raises:
            StorageError: one is missing or has another size.
        """
        folders = {f"tables/{fragment.table}/{fragment.path.rsplit('/', 1)[0]}/" for fragment in fragments}
        found = {info.key: info.size for folder in folders for info in self._store.list(folder)}
        for fragment in fragments:
            size = found.get(f"tables/{fragment.table}/{fragment.path}")
            if size != fragment.num_bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {fragment.num_bytes}"
                raise StorageError(
                    f"table {fragment.table!r}: file {fragment.path} {state}; nothing was published. Was the warehouse "
                    "cleaned by hand? Abandon this run with `winnow runs abandon` and run the job again"
                )

    def _uri(self, name: str) -> str | Path:
        return self._store.delta_uri(f"tables/{name}")


def _conform(name: str, rows: pa.Table) -> pa.Table:
    """Rows in the schema's columns, order and types."""
    schema = TABLES[name]
    unknown = set(rows.column_names) - set(schema.names)
    if unknown:
        raise ValueError(f"table {name!r} has no columns {sorted(unknown)}")
    columns = []
    for field in schema:
        if field.name in rows.column_names:
            columns.append(rows.column(field.name).cast(field.type))
        else:
            columns.append(pa.nulls(rows.num_rows, field.type))
    table = pa.Table.from_arrays(columns, schema=schema)
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise ValueError(f"table {name!r}: column {field.name!r} must not be null")
    return table
