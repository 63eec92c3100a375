"""``winnow export results``: the view ``results`` as one file, for engines that see no views.

Parquet and CSV hold the rows of the view. COCO JSON (https://cocodataset.org/#format-data) holds ``images``,
``categories`` and ``annotations``; a label of a whole image has no box and no mask, so those annotations have neither.
The newest segments come beside the view's rows, with their masks in the size of the image.

A file appears under its name when it is complete, or not at all. Memory stays flat whatever the number of rows.
"""

from __future__ import annotations

import logging
import mmap
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from winnow import uris
from winnow.errors import CallError, MaskError, StorageError
from winnow.masks import BACKGROUNDS, encode_classes, label_map, resize_to_source
from winnow_jobs.writers import already_there, atomic_file, iterate_rows, text_of, write_array, write_csv, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

    from winnow_connectors.object_store import ObjectStores
    from winnow_connectors.query import QueryEngine

logger = logging.getLogger(__name__)

_RESULTS = "SELECT * FROM results"
_RESULTS_BY_IMAGE = """
WITH sizes AS (
    SELECT image_id, max(width) AS width, max(height) AS height FROM latest_outcomes
    WHERE width IS NOT NULL GROUP BY image_id
),
answers AS (
    SELECT image_id, uri, split, task, label, source, confidence, model, false AS is_segment, NULL AS rle FROM results
    UNION ALL
    SELECT s.image_id, i.uri, i.split, s.task, s.label, 'prediction', s.confidence, s.model, true, s.rle
    FROM latest_segments AS s JOIN (SELECT image_id, uri, split FROM current_images) AS i USING (image_id)
)
SELECT image_id, uri, width, height, split, task, label, source, confidence, model, is_segment, rle
FROM answers LEFT JOIN sizes USING (image_id) ORDER BY image_id, task, is_segment, label
"""
_COCO_BATCH_ROWS = 2048  # encoded masks are large


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Attributes:
        uri: the file, as a canonical URI.
        format: ``parquet``, ``csv`` or ``coco``.
        num_rows: rows of ``results`` in it; of COCO its annotations.
        num_bytes: its size.
    """

    uri: str
    format: str
    num_rows: int
    num_bytes: int


def export_results(
    engine: QueryEngine, to: str, format: str = "parquet", *, stores: ObjectStores, overwrite: bool = False
) -> ExportResult:
    """Write the view ``results`` to one file.

    Args:
        engine: SQL over the warehouse.
        to: local path or object-store URI (s3://, gs://, az://) of the file.
        format: ``parquet``, ``csv`` or ``coco``.
        stores: access to where the file goes; relative paths start at its base folder.
        overwrite: replace a file of that name.

    Raises:
        CallError: unknown format, or the file exists and ``overwrite`` is not set.
        StorageError: the tables cannot be read, or the file cannot be written.
    """
    if format not in FORMATS:
        raise CallError(f"format {format!r} is unknown; choose {', '.join(FORMATS)}")
    write = FORMATS[format]
    uri = stores.canonical(to)
    start = time.monotonic()
    if uris.scheme_of(uri) == "file":
        path = Path(uris.local_path(uri))
        with atomic_file(path, overwrite=overwrite) as file:
            num_rows = write(engine, file)
        num_bytes = path.stat().st_size
    else:
        num_rows, num_bytes = _upload(engine, uri, format, stores, overwrite=overwrite)
    logger.info("exported %d rows to %s in %.1f s", num_rows, uris.redact(uri), time.monotonic() - start)
    return ExportResult(uri, format, num_rows, num_bytes)


def _upload(engine: QueryEngine, uri: str, format: str, stores: ObjectStores, *, overwrite: bool) -> tuple[int, int]:
    """Write to a temporary file and send it as one object; rows and bytes."""
    folder, _, name = uri.rpartition("/")
    if not name or folder.endswith(":/"):
        raise CallError(f"{uris.redact(uri)} names no file; add one, such as {uris.join(uri, 'results.' + format)}")
    store = stores.at(folder)
    if not overwrite and store.exists(name):
        raise already_there(uris.redact(uri))
    with tempfile.TemporaryFile(prefix="winnow-export-") as file:
        num_rows = FORMATS[format](engine, file)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # Mapped, a file of any size is sent without being in memory at once; storage takes any buffer.
            store.put(name, cast("bytes", data))
            return num_rows, len(data)


def _write_parquet(engine: QueryEngine, file: BinaryIO) -> int:
    return write_parquet(engine.reader(_RESULTS), file)


def _write_csv(engine: QueryEngine, file: BinaryIO) -> int:
    with text_of(file) as text:
        return write_csv(engine.reader(_RESULTS), text)


def _write_coco(engine: QueryEngine, file: BinaryIO) -> int:
    """COCO wants images before annotations: the results are asked once, kept in a temporary file and read twice."""
    with tempfile.TemporaryFile(prefix="winnow-export-") as spool, text_of(file) as text:
        _spool(engine.reader(_RESULTS_BY_IMAGE, batch_rows=_COCO_BATCH_ROWS), spool)
        labels: set[tuple[str, str]] = set()
        text.write('{"info": {"description": "Winnow results"},\n"images": ')
        write_array(text, _coco_images(spool, labels))
        categories = {key: number for number, key in enumerate(sorted(labels), start=1)}
        text.write(',\n"categories": ')
        write_array(text, ({"id": n, "name": label, "supercategory": task} for (task, label), n in categories.items()))
        text.write(',\n"annotations": ')
        num_annotations = write_array(text, _coco_annotations(spool, categories))
        text.write("}\n")
    return num_annotations


def _spool(reader: pa.RecordBatchReader, file: BinaryIO) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(file, reader.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in reader:
            writer.write_batch(batch)


def _numbered(spool: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the number of their image, from 1 on, in the order of image_id."""
    import pyarrow as pa

    number, last = 0, None
    spool.seek(0)
    with pa.ipc.open_stream(spool) as reader:
        for batch in reader:
            for values in iterate_rows([batch]):
                row = dict(zip(batch.schema.names, values, strict=True))
                number += row["image_id"] != last
                last = row["image_id"]
                yield number, row


def _coco_images(spool: BinaryIO, labels: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """One entry per image; collects (task, label) on the way. Images that show only background are in it too."""
    last = 0
    for number, row in _numbered(spool):
        if not _is_background(row):
            labels.add((row["task"], row["label"]))
        if number != last:
            last = number
            yield {
                "id": number,
                "file_name": row["uri"],
                "width": row["width"],
                "height": row["height"],
                "split": row["split"],
                "winnow_image_id": row["image_id"],
            }


def _coco_annotations(spool: BinaryIO, categories: dict[tuple[str, str], int]) -> Iterator[dict[str, Any]]:
    rows = ((number, row) for number, row in _numbered(spool) if not _is_background(row))
    annotation = 0
    for _, group in groupby(rows, lambda item: (item[0], item[1]["task"], item[1]["is_segment"])):
        answers = list(group)
        masks = _coco_masks([row for _, row in answers]) if answers[0][1]["is_segment"] else {}
        for number, row in answers:
            if row["is_segment"] and row["label"] not in masks:
                continue
            annotation += 1
            yield {
                "id": annotation,
                "image_id": number,
                "category_id": categories[row["task"], row["label"]],
                "score": row["confidence"],
                "source": row["source"],
                "model": row["model"],
                **masks.get(row["label"], {}),
            }


def _coco_masks(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What COCO says of a mask, by class, for all segments of one image and task.

    ``iscrowd`` is 0, as in COCO-Stuff, whose annotations are like ours: the whole of a class in an image.

    Raises:
        StorageError: a mask in the table is damaged.
    """
    classes = [row["label"] for row in rows]
    width, height = rows[0]["width"], rows[0]["height"]
    try:
        if width is None or height is None:
            raise MaskError("the size of the image is not known")
        labels = label_map([(row["label"], row["rle"]) for row in rows], classes)
    except MaskError as error:
        where = f"image {rows[0]['image_id']} and task {rows[0]['task']!r}"
        raise StorageError(f"the table segments holds a damaged mask for {where}: {error}") from None
    found = encode_classes(resize_to_source(labels, width, height))
    return {
        classes[entry.value]: {
            "segmentation": entry.rle,
            "area": entry.num_pixels,
            "bbox": list(entry.box),
            "iscrowd": 0,
        }
        for entry in found
        if entry.value < len(classes)  # the rest is background
    }


def _is_background(row: dict[str, Any]) -> bool:
    return row["is_segment"] and row["label"] in BACKGROUNDS


FORMATS: dict[str, Callable[[QueryEngine, BinaryIO], int]] = {
    "parquet": _write_parquet,
    "csv": _write_csv,
    "coco": _write_coco,
}
"""Formats of ``export_results``: each writes the view to a file and returns the number of its rows."""
