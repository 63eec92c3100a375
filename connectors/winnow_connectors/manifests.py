"""Manifests: files that list objects, read as a stream of Arrow batches.

Parquet, CSV (also ``.gz``), text with one URI per line, and the ``manifest.json`` of an S3 Inventory. Column names are
compared without case, ``_``, ``-`` and spaces, so that ``e_tag``, ``ETag`` and ``etag`` are one:

=====================================  ==========================================================================
``uri``                                or ``bucket`` and ``key`` (S3 Inventory)
``etag``                               the object's version
``size``                               bytes
``last_modified``                      or ``last_modified_date``; ISO 8601, UTC where no zone is given
``label``, ``split``, ``group``        what is known of the image
``mask``                               URI of a PNG of class ids: what is known of its pixels
``is_latest``, ``is_delete_marker``    S3 Inventory: former versions and deleted objects are left out
every other column                     becomes metadata of the image, as text
=====================================  ==========================================================================

URIs without a scheme, masks' too, start at the manifest's folder. CSV inventories of S3 hold URL-encoded keys; they
are decoded when the file comes from an inventory's ``manifest.json`` or has the columns ``bucket``, ``key`` and one of
``e_tag``, ``last_modified_date``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus, unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from winnow import uris
from winnow.errors import CallError
from winnow_connectors.columns import as_map, as_text, filled, mapped

SUFFIXES = (".parquet", ".pq", ".csv", ".csv.gz", ".txt")
"""Endings that make a file a manifest."""

LISTING = pa.schema(
    {
        "uri": pa.string(),
        "version": pa.string(),
        "size": pa.int64(),
        "last_modified": pa.timestamp("us", tz="UTC"),
        "path": pa.string(),
        "row": pa.int64(),
        "label": pa.string(),
        "split": pa.string(),
        "group": pa.string(),
        "mask": pa.string(),
        "metadata": pa.map_(pa.string(), pa.string()),
    }
)
"""What is known of listed objects. ``version`` is null where nobody told it, ``path`` is relative to the source,
``row`` counts from 1 in each file, without a header."""

_BATCH_ROWS = 32_768
_CSV_BLOCK_BYTES = 4 << 20
_NUM_SHOWN = 5
_ROLES = {
    "uri": "uri",
    "bucket": "bucket",
    "key": "key",
    "etag": "etag",
    "size": "size",
    "lastmodified": "last_modified",
    "lastmodifieddate": "last_modified",
    "label": "label",
    "split": "split",
    "group": "group",
    "mask": "mask",
    "islatest": "is_latest",
    "isdeletemarker": "is_delete_marker",
}
# Spelled as ``uris.canonical`` spells them, by far most URIs of a manifest; the rest is spelled one by one.
_CANONICAL = (
    r"^(?:(?:s3|gs)://[^/?@\x00]+/[^?\x00]+|https?://[a-z0-9.-]+/[A-Za-z0-9._~/-]*|"
    r"file://(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+)$"
)
_PLAIN_PATH = r"^(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+$"


@dataclass(frozen=True)
class Manifest:
    """One file that lists objects.

    Attributes:
        path: where it lies on this machine.
        name: what messages call it.
        base: canonical URI of the folder that URIs without a scheme start at.
        columns: names of the columns of a CSV file without header.
        inventory: it is known to come from an S3 Inventory.
    """

    path: Path
    name: str
    base: str
    columns: tuple[str, ...] | None = None
    inventory: bool = False

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Rows as batches of the schema ``LISTING``. Memory holds a few batches.

        Raises:
            CallError: the file cannot be read, lacks the columns, or has malformed rows; the message names the rows.
        """
        name = self.name.lower()
        try:
            if name.endswith((".parquet", ".pq")):
                yield from self._parse(_parquet_batches(self.path), is_csv=False)
            elif name.endswith((".csv", ".csv.gz")):
                yield from self._parse(_csv_batches(self.path, self.name, self.columns), is_csv=True)
            else:
                yield from self._parse(_text_batches(self.path, self.name), is_csv=False)
        except (OSError, pa.ArrowException, EOFError) as error:
            raise CallError(f"{self.name} cannot be read as a manifest: {error}") from None

    def _parse(self, batches: Iterator[pa.RecordBatch], *, is_csv: bool) -> Iterator[pa.RecordBatch]:
        first = next(batches, None)
        if first is None:
            return
        roles = self._roles(first.schema.names)
        decode_keys = is_csv and (self.inventory or _is_inventory(first.schema.names))
        row = 1
        for batch in itertools.chain([first], batches):
            rows = np.arange(row, row + batch.num_rows, dtype=np.int64)
            row += batch.num_rows
            if batch.num_rows:
                yield self._convert(batch, roles, pa.array(rows), decode_keys=decode_keys)

    def _roles(self, names: Sequence[str]) -> dict[str, int]:
        """Column number of every role."""
        roles: dict[str, int] = {}
        for index, name in enumerate(names):
            role = _ROLES.get(_squash(name))
            if role is None:
                continue
            if role in roles:
                raise CallError(
                    f"{self.name}: columns {names[roles[role]]!r} and {name!r} both mean {role!r}; leave one"
                )
            roles[role] = index
        if "uri" not in roles and not {"bucket", "key"} <= roles.keys():
            shown = ", ".join(map(repr, names)) or "none"
            raise CallError(f"{self.name} has no column 'uri' (nor 'bucket' and 'key'); its columns: {shown}")
        return roles

    def _convert(
        self, batch: pa.RecordBatch, roles: dict[str, int], rows: pa.Array, *, decode_keys: bool
    ) -> pa.RecordBatch:
        batch, rows = _latest(batch, roles, rows)
        column = {role: batch.column(index) for role, index in roles.items()}
        missing = pa.nulls(batch.num_rows, pa.string())
        found: dict[str, pa.Array] = {"row": rows}
        found["uri"] = self._uris(column, rows, decode_keys=decode_keys)
        found["path"] = self._paths(found["uri"])
        for role in ("label", "split", "group"):
            found[role] = filled(as_text(column[role])) if role in column else missing
        found["mask"] = self._canonical_uris(filled(as_text(column["mask"])), rows) if "mask" in column else missing
        found["size"] = (
            self._checked(column["size"], rows, pa.int64(), r"^\d{1,18}$", "size", "a whole number of bytes")
            if "size" in column
            else missing.cast(pa.int64())
        )
        found["last_modified"] = (
            self._times(column["last_modified"], rows)
            if "last_modified" in column
            else missing.cast(LISTING.field("last_modified").type)
        )
        found["version"] = _versions(found["uri"], as_text(column["etag"]) if "etag" in column else missing)
        used = set(roles.values())
        found["metadata"] = as_map(
            {name: batch.column(index) for index, name in enumerate(batch.schema.names) if index not in used},
            batch.num_rows,
        )
        return pa.RecordBatch.from_arrays([found[name] for name in LISTING.names], schema=LISTING)

    def _uris(self, column: dict[str, pa.Array], rows: pa.Array, *, decode_keys: bool) -> pa.Array:
        if "uri" in column:
            given = filled(as_text(column["uri"]))
        else:
            key = filled(as_text(column["key"]))
            if decode_keys:
                key = mapped(key, pc.match_substring_regex(key, "[%+]"), unquote_plus)
            bucket = filled(as_text(column["bucket"]))
            given = pc.binary_join_element_wise("s3://", bucket, "/", key, "")  # the last argument stands between them
        self._refuse(pc.is_null(given), rows, lambda index: "no URI" if "uri" in column else "no bucket or no key")
        return self._canonical_uris(given, rows)

    def _canonical_uris(self, given: pa.Array, rows: pa.Array) -> pa.Array:
        """In the one spelling, by the manifest's folder where they are relative; null stays null."""
        given = pc.if_else(
            pc.match_substring_regex(given, _PLAIN_PATH), pc.binary_join_element_wise("file://", given, ""), given
        )
        odd = pc.fill_null(pc.invert(pc.match_substring_regex(given, _CANONICAL)), False).to_numpy(zero_copy_only=False)
        if not odd.any():
            return given
        values = given.to_pylist()
        faults: list[str] = []
        base = Path(uris.local_path(self.base)) if uris.scheme_of(self.base) == "file" else None
        for index in np.flatnonzero(odd):
            try:
                values[index] = self._canonical(values[index], base)
            except CallError as error:
                faults.append(f"row {rows[index].as_py():,}: {error}")
                if len(faults) == _NUM_SHOWN:
                    break
        if faults:
            raise CallError("\n  ".join([f"{self.name} has malformed rows:", *faults]))
        return pa.array(values, pa.string())

    def _canonical(self, text: str, base: Path | None) -> str:
        if base is None and "://" not in text and not text.startswith("/"):
            return uris.canonical(uris.join(self.base, text))
        return uris.canonical(text, base)

    def _paths(self, listed: pa.Array) -> pa.Array:
        """Below the manifest's folder where the object lies there, else the whole key."""
        below = pc.starts_with(listed, self.base.rstrip("/") + "/")
        rest = pc.utf8_slice_codeunits(listed, len(self.base.rstrip("/")) + 1)
        whole = pc.replace_substring_regex(listed, r"(?s)^[^:]+://[^/]*/", "")
        paths = pc.if_else(below, rest, whole)
        web = pc.match_substring_regex(listed, "^https?:")
        paths = pc.if_else(web, pc.replace_substring_regex(paths, r"(?s)\?.*$", ""), paths)
        encoded = pc.and_(pc.match_substring_regex(listed, "^(?:https?|file):"), pc.match_substring(paths, "%"))
        return mapped(paths, encoded, decode_path)

    def _times(self, column: pa.Array, rows: pa.Array) -> pa.Array:
        kind = LISTING.field("last_modified").type
        if pa.types.is_timestamp(column.type):
            return column.cast(pa.timestamp("us", tz=column.type.tz or "UTC"), safe=False).cast(kind)
        if pa.types.is_date(column.type):
            return column.cast(pa.timestamp("us")).cast(kind)
        text = as_text(column)
        naive = pc.match_substring_regex(text, r"[0-9]$")
        offset = pc.match_substring_regex(text, r"[T ].*[+-]\d\d:?(?:\d\d)?$")
        text = pc.if_else(pc.and_(naive, pc.invert(offset)), pc.binary_join_element_wise(text, "Z", ""), text)
        pattern = r"^\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?)?(?:Z|[+-]\d\d:?(?:\d\d)?)$"
        # Arrow reads up to nine decimals, but no finer than the unit it is asked for.
        nanoseconds = self._checked(
            text, rows, pa.timestamp("ns", tz="UTC"), pattern, "last_modified", "an ISO 8601 time"
        )
        return nanoseconds.cast(kind, safe=False)

    def _checked(
        self, column: pa.Array, rows: pa.Array, kind: pa.DataType, pattern: str, name: str, valid: str
    ) -> pa.Array:
        """Cast, or name the rows that cannot be."""
        if not pa.types.is_string(column.type):
            try:
                return column.cast(kind)
            except pa.ArrowInvalid:
                column = as_text(column)
        text = filled(column)
        wrong = pc.fill_null(pc.invert(pc.match_substring_regex(text, pattern)), False)
        self._refuse(wrong, rows, lambda index: f"{name} {text[index].as_py()!r} is not {valid}")
        try:
            return text.cast(kind)
        except pa.ArrowInvalid as error:
            raise CallError(f"{self.name}, rows {rows[0]} to {rows[-1]}: column {name!r}: {error}") from None

    def _refuse(self, wrong: pa.Array, rows: pa.Array, describe: Callable[[int], str]) -> None:
        indices = np.flatnonzero(wrong.to_numpy(zero_copy_only=False))
        if indices.size:
            faults = [f"row {rows[int(index)].as_py():,}: {describe(int(index))}" for index in indices[:_NUM_SHOWN]]
            raise CallError("\n  ".join([f"{self.name} has malformed rows:", *faults]))


def inventory_files(data: bytes, name: str) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The files that the ``manifest.json`` of an S3 Inventory lists: their URIs, and for CSV the columns' names.

    Raises:
        CallError: it is no such file, or its format is not read (ORC).
    """
    try:
        content = json.loads(data)
        bucket = content["destinationBucket"].rpartition(":")[2]
        files = tuple(uris.canonical(f"s3://{bucket}/{entry['key']}") for entry in content["files"])
        kind = content["fileFormat"].upper()
        columns = tuple(part.strip() for part in content["fileSchema"].split(",")) if kind == "CSV" else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CallError(f"{name} is no manifest.json of an S3 Inventory ({type(error).__name__}: {error})") from None
    if kind not in ("CSV", "PARQUET"):
        raise CallError(
            f"{name}: inventories in {kind} are not read; choose Parquet or CSV in the bucket's inventory settings"
        )
    return files, columns


def decode_path(text: str) -> str:
    """Percent-escapes decoded; bytes that are not UTF-8 become U+FFFD."""
    return unquote_to_bytes(text).decode("utf-8", "replace")


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise pa.ArrowInvalid("two columns have the same name")
        batches = file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)
        first = next(batches, None)
        yield first if first is not None else pa.RecordBatch.from_pylist([], schema=file.schema_arrow)
        yield from batches


def _csv_batches(path: Path, name: str, columns: tuple[str, ...] | None) -> Iterator[pa.RecordBatch]:
    bad: list[str] = []

    def note(row: Any) -> str:
        where = f"row {row.number - (0 if columns else 1):,}" if row.number is not None else "a row"
        bad.append(
            f"{where}: {row.actual_columns} values for {row.expected_columns} columns: {uris.redact(row.text)[:200]!r}"
        )
        return "error" if len(bad) == _NUM_SHOWN else "skip"

    def check() -> None:
        if bad:
            raise CallError("\n  ".join([f"{name} has malformed rows:", *bad]))

    read = pcsv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES, column_names=columns)
    parse = pcsv.ParseOptions(newlines_in_values=True, invalid_row_handler=note)
    with pa.input_stream(path) as stream:  # decompresses .gz by its name
        names = columns
        if names is None:
            head = pa.BufferReader(stream.read(_CSV_BLOCK_BYTES))
            if head.size() == 0:
                raise CallError(f"{name} is empty; a manifest has a header with the column 'uri'")
            names = tuple(
                pcsv.open_csv(
                    head, read, pcsv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda _: "skip")
                ).schema.names
            )
    if len(set(names)) < len(names):
        raise pa.ArrowInvalid("two columns have the same name")
    convert = pcsv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    with pa.input_stream(path) as stream:
        try:
            with pcsv.open_csv(stream, read, parse, convert) as reader:
                for batch in reader:
                    check()
                    yield batch
        except pa.ArrowInvalid:
            check()
            raise
        check()


def _text_batches(path: Path, name: str) -> Iterator[pa.RecordBatch]:
    """Lines; empty ones stay as null, so that row numbers are line numbers, and are dropped by the caller."""
    with path.open("rb") as file:
        number = 0
        while lines := list(itertools.islice(file, _BATCH_ROWS)):
            if number == 0:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            values = []
            for line in lines:
                number += 1
                try:
                    values.append(line.rstrip(b"\r\n").decode())
                except UnicodeDecodeError as error:
                    raise CallError(f"{name}, line {number:,} is not UTF-8: {error}") from None
            yield pa.RecordBatch.from_pydict({"uri": pa.array(values, pa.string())})


def _latest(batch: pa.RecordBatch, roles: dict[str, int], rows: pa.Array) -> tuple[pa.RecordBatch, pa.Array]:
    """Without former versions, delete markers, and the empty lines of a text file."""
    keep: pa.Array | None = None
    for role, dropped in (("is_latest", "false"), ("is_delete_marker", "true")):
        if role in roles:
            text = pc.utf8_lower(as_text(batch.column(roles[role])))
            kept = pc.fill_null(pc.not_equal(text, dropped), True)
            keep = kept if keep is None else pc.and_(keep, kept)
    if batch.schema.names == ["uri"]:
        text = as_text(batch.column(0))
        keep = pc.fill_null(pc.not_equal(text, ""), True)
    return (batch, rows) if keep is None else (batch.filter(keep), rows.filter(keep))


def _versions(listed: pa.Array, etags: pa.Array) -> pa.Array:
    """As ``uris.version_of``. Null without ETag: a size and a time are no version where the store compares ETags."""
    strong = pc.replace_substring_regex(etags, r'^(W/)?"*(.*?)"*$', r"\1\2")
    empty = pc.is_in(strong, pa.array(["", "W/"]))
    local = pc.starts_with(listed, "file:")
    return pc.if_else(pc.or_(pc.fill_null(empty, False), local), pa.scalar(None, pa.string()), strong)


def _is_inventory(names: Sequence[str]) -> bool:
    squashed = {_squash(name) for name in names}
    return {"bucket", "key"} <= squashed and bool(
        {"lastmodifieddate"} & squashed or "e_tag" in names or "ETag" in names
    )


def _squash(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
