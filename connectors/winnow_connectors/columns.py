"""Arrow columns of any type as text and maps of text."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def as_text(column: pa.Array) -> pa.Array:
    """Any column as string: whole floats without a fraction, nested values as JSON."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_text(column.dictionary_decode())
    if pa.types.is_floating(kind) and pc.all(pc.equal(column, pc.trunc(column)), skip_nulls=True).as_py():
        try:
            return column.cast(pa.int64()).cast(pa.string())
        except pa.ArrowInvalid:
            return column.cast(pa.string())
    if pa.types.is_nested(kind):
        return pa.array(
            [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()], pa.string()
        )
    return column.cast(pa.string())


def as_map(columns: dict[str, pa.Array], num_rows: int) -> pa.Array:
    """Columns as one ``map<string, string>`` column without null values; null where nothing is left."""
    kind = pa.map_(pa.string(), pa.string())
    if not columns:
        return pa.nulls(num_rows, kind)
    texts = [as_text(column) for column in columns.values()]
    valid_RC = np.stack([text.is_valid().to_numpy(zero_copy_only=False) for text in texts], axis=1)
    order = (np.arange(num_rows)[:, None] + np.arange(len(texts))[None, :] * num_rows)[valid_RC]
    values = pa.concat_arrays(texts).take(pa.array(order))
    keys = pa.array(list(columns), pa.string()).take(pa.array(np.nonzero(valid_RC)[1]))
    counts = valid_RC.sum(axis=1)
    offsets = pa.array(np.concatenate(([0], np.cumsum(counts))).astype(np.int32))
    maps = pa.MapArray.from_arrays(offsets, keys, values)
    return maps if counts.all() else pc.if_else(pa.array(counts > 0), maps, pa.scalar(None, kind))


def filled(text: pa.Array) -> pa.Array:
    """Null where there is only white space."""
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(text), ""), pa.scalar(None, pa.string()), text)


def mapped(text: pa.Array, where: pa.Array, function: Callable[[str], str]) -> pa.Array:
    """``function`` applied to the values where ``where`` holds."""
    indices = np.flatnonzero(pc.fill_null(where, False).to_numpy(zero_copy_only=False))
    if not indices.size:
        return text
    values = text.to_pylist()
    for index in indices:
        values[index] = function(values[index])
    return pa.array(values, pa.string())
