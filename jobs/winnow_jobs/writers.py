"""Rows of any Arrow result as Parquet, CSV or JSON: streaming, and complete under their name or not there at all."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from winnow.errors import CallError, StorageError

_ROW_GROUP_ROWS = 131_072


@contextmanager
def atomic_file(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write that gets its name when the block ends without an error, and is gone otherwise.

    Raises:
        CallError: the file exists and ``overwrite`` is not set, or its folder does not exist.
        StorageError: it cannot be written.
    """
    if path.is_dir():
        raise CallError(f"{path} is a folder; name a file in it")
    if not overwrite and os.path.lexists(path):
        raise already_there(str(path))
    if not path.parent.is_dir():
        raise CallError(f"folder {path.parent} does not exist; create it or choose another")
    draft = path.with_name(f".winnow-{uuid.uuid4().hex}.part")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            draft.replace(path)
        else:
            _name(draft, path)
    except FileExistsError:
        raise already_there(str(path)) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def _name(draft: Path, path: Path) -> None:
    """Give a finished file its name unless the name is taken.

    Raises:
        FileExistsError: it is.
    """
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without hard links: two exports at the same moment may replace each other, whole files both.
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        draft.rename(path)


def already_there(name: str) -> CallError:
    """The error of writing where something is."""
    return CallError(f"{name} exists; choose another name, or replace it with --overwrite")


def write_parquet(reader: pa.RecordBatchReader, file: BinaryIO) -> int:
    """Write all rows as Parquet; the number of rows."""
    num_rows = 0
    with pq.ParquetWriter(file, reader.schema, compression="zstd") as writer:
        pending: list[pa.RecordBatch] = []
        num_pending = 0
        for batch in reader:
            pending.append(batch)
            num_pending += batch.num_rows
            num_rows += batch.num_rows
            if num_pending >= _ROW_GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(pending, reader.schema))
                pending, num_pending = [], 0
        if num_pending or not num_rows:
            writer.write_table(pa.Table.from_batches(pending, reader.schema))
    return num_rows


def write_csv(reader: pa.RecordBatchReader, file: IO[str]) -> int:
    """Write all rows as CSV (RFC 4180: CRLF, quotes where needed) with a header; the number of rows.

    Null is empty; lists, structs and maps are JSON; times are ISO 8601.
    """
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(reader.schema.names)
    num_rows = 0
    for row in iterate_rows(reader):
        writer.writerow([_csv_cell(value) for value in row])
        num_rows += 1
    return num_rows


def write_json(reader: pa.RecordBatchReader, file: IO[str]) -> int:
    """Write all rows as one JSON array of objects; the number of rows. NaN and infinity become null."""
    names = _distinct(reader.schema.names)
    num_rows = write_array(file, (dict(zip(names, row, strict=True)) for row in iterate_rows(reader)))
    file.write("\n")
    return num_rows


def iterate_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[Any, ...]]:
    """Rows as plain values: None, bool, int, finite float, str, list, dict; times as ISO 8601."""
    for batch in batches:
        if batch.num_columns:
            yield from zip(*(_plain_column(column) for column in batch.columns), strict=True)


@contextmanager
def text_of(file: BinaryIO) -> Iterator[IO[str]]:
    """UTF-8 text over a binary file, which stays open."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield text
        text.flush()
    finally:
        with suppress(OSError, ValueError):
            text.detach()


def write_array(file: IO[str], items: Iterator[dict[str, Any]]) -> int:
    """Write a JSON array, an item a line; the number of items."""
    count = 0
    for item in items:
        file.write(",\n" if count else "[\n")
        file.write(json.dumps(item, ensure_ascii=False, allow_nan=False))
        count += 1
    file.write("\n]" if count else "[]")
    return count


# --------------------------------------------------------------------------------------------------------- plain values


def _plain_column(column: pa.Array) -> list[Any]:
    """The values of a column; the common types in one go, the others value by value."""
    types = pa.types
    kind = column.type
    if types.is_string(kind) or types.is_integer(kind) or types.is_boolean(kind):
        plain = column
    elif types.is_floating(kind):
        # By way of its text, a float32 becomes 0.1, not 0.10000000149011612.
        double = (
            column.cast(pa.float64()) if not types.is_float32(kind) else column.cast(pa.string()).cast(pa.float64())
        )
        plain = pc.if_else(pc.is_finite(column), double, pa.scalar(None, pa.float64()))
    elif types.is_timestamp(kind):
        text = pc.replace_substring(column.cast(pa.timestamp(kind.unit)).cast(pa.string()), " ", "T")
        text = pc.replace_substring_regex(text, r"\.0+$", "")
        plain = pc.binary_join_element_wise(text, "Z", "") if kind.tz else text
    else:
        convert = _plainer(kind)
        return [convert(value) for value in column.to_pylist()]
    values: list[Any] = plain.to_pylist()
    return values


def _plainer(kind: pa.DataType) -> Callable[[Any], Any]:
    """A function that turns Python values of an Arrow type into values that JSON can hold."""
    types = pa.types
    if types.is_map(kind):
        key, item = _plainer(kind.key_type), _plainer(kind.item_type)
        return lambda value: None if value is None else {str(key(k)): item(v) for k, v in value}
    if types.is_struct(kind):
        fields = {field.name: _plainer(field.type) for field in kind}
        return lambda value: None if value is None else {name: fields[name](v) for name, v in value.items()}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        entry = _plainer(kind.value_type)
        return lambda value: None if value is None else [entry(v) for v in value]
    if types.is_float32(kind) or types.is_float16(kind):
        # The shortest decimal that names the same float32: 0.1, not 0.10000000149011612.
        return lambda value: None if value is None or not math.isfinite(value) else float(str(np.float32(value)))
    return _plain


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        if not value.is_finite():
            return None
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime | date):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _distinct(names: Sequence[str]) -> list[str]:
    """Names that a JSON object can hold side by side: the second ``id`` becomes ``id_2``."""
    found: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in found:
            number += 1
            candidate = f"{name}_{number}"
        found.append(candidate)
    return found
