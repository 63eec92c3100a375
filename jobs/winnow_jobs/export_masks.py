"""``winnow export masks``: the segments of every image as files for other tools, and drawn on the image for people.

A folder or prefix gets, for each current image that the task answered::

    <image_id>.png           class ids in the size of the image, as a PNG with a palette (winnow.mask_files)
    <image_id>.overlay.jpg   the image with its mask drawn; on request
    index.csv                image_id, uri, mask, overlay, error: of the images of the last export
    classes.json             the task, and the class of each value

Files that are there are kept, so an export that was cut short goes on where it was. Memory holds a few images.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import mmap
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from winnow import uris
from winnow.decoders import DecoderPool
from winnow.drawing import draw_overlay
from winnow.errors import CallError, ImageError, MaskError
from winnow.images import DecodeLimits, View
from winnow.mask_files import write_png
from winnow.masks import LabelMap, label_map, resize_to_source
from winnow_connectors.object_store import NotFoundError, ObjectStore
from winnow_jobs.progress import Progress
from winnow_jobs.writers import text_of

if TYPE_CHECKING:
    from winnow_connectors.query import QueryEngine
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

OVERLAY_PX = 1600
"""Longest side of an overlay; larger images are scaled down for it."""

_INDEX, _CLASSES = "index.csv", "classes.json"
_COLUMNS = ("image_id", "uri", "mask", "overlay", "error")
_NUM_THREADS = 8
_BATCH_ROWS = 2048
_ROWS_AT_ONCE = 64
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class MasksResult:
    """What an export of masks did.

    Attributes:
        uri: the folder, as a canonical URI.
        task: whose masks.
        num_images: images asked for.
        num_written: files written, masks and overlays.
        num_kept: files that were there already.
        num_failed: images with an error in the index.
        failures: these, by kind of error.
    """

    uri: str
    task: str
    num_images: int
    num_written: int
    num_kept: int
    num_failed: int
    failures: Mapping[str, int]


@dataclass(frozen=True)
class _Answer:
    """The answer for one image: the columns asked for, and class and encoded mask of each segment."""

    image: Mapping[str, Any]
    segments: Sequence[tuple[str, Mapping[str, Any]]]


@dataclass
class _Entry:
    """A row of the index, and what was done for it."""

    image_id: str
    uri: str
    mask: str = ""
    overlay: str = ""
    error: str = ""
    num_written: int = 0
    num_kept: int = 0


def export_masks(
    workspace: Workspace,
    task: str,
    to: str,
    *,
    overlay: bool = False,
    where: str | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> MasksResult:
    """Write the masks of a segmentation task's newest answers.

    Args:
        workspace: configuration and warehouse.
        task: a segmentation task.
        to: folder or object-store prefix (s3://, gs://, az://); relative paths start at the workspace's folder.
        overlay: also draw each mask on its image. An image that cannot be read is an error in the index.
        where: SQL condition over ``current_images``.
        limit: at most so many images, in the order of image_id.
        overwrite: write files anew that are there.

    Raises:
        CallError: no such task, another kind of task, a wrong condition, or a folder that holds masks of another task
            or of other classes.
        StorageError: the tables cannot be read, or files cannot be written.
    """
    config = workspace.config.task(task)
    if config.kind != "segmentation":
        known = sorted(name for name, other in workspace.config.tasks.items() if other.kind == "segmentation")
        raise CallError(
            f"task {task!r} is a {config.kind} task and has no masks; segmentation tasks: {', '.join(known) or 'none'}"
        )
    if limit is not None and limit < 1:
        raise CallError(f"limit = {limit} must be at least 1")
    uri = workspace.stores.canonical(to)
    if uris.scheme_of(uri) == "file" and Path(uris.local_path(uri)).is_file():
        raise CallError(f"{uris.local_path(uri)} is a file; name a folder for the masks")
    store = workspace.stores.at(uri)
    engine = workspace.query_engine()
    chosen = _chosen(task, where, limit)
    num_images = int(engine.sql(f"WITH {chosen} SELECT count(*) FROM chosen").column(0)[0].as_py())
    if not num_images:
        return MasksResult(uri, task, 0, 0, 0, 0, {})
    started = time.monotonic()
    classes = class_names(workspace, engine, task)
    _put_classes(store, task, classes, overwrite=overwrite)
    answers = _answers(engine, f"WITH {chosen} {_answers_sql(task)}")
    exporter = _Exporter(workspace, store, classes, overlay=overlay, overwrite=overwrite)
    num_written = num_kept = 0
    failures: dict[str, int] = {}
    with (
        tempfile.TemporaryFile(prefix="winnow-export-") as file,
        Progress("export", num_images) as progress,
        exporter,
    ):
        with text_of(file) as text:
            index = csv.writer(text, lineterminator="\r\n")
            index.writerow(_COLUMNS)
            for number, entry in enumerate(exporter.export(answers), start=1):
                index.writerow([getattr(entry, name) for name in _COLUMNS])
                num_written += entry.num_written
                num_kept += entry.num_kept
                if entry.error:
                    kind = entry.error.partition(":")[0]
                    failures[kind] = failures.get(kind, 0) + 1
                progress.update(number, sum(failures.values()))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _put_if_new(store, _INDEX, cast("bytes", data))
    result = MasksResult(uri, task, num_images, num_written, num_kept, sum(failures.values()), failures)
    logger.info(
        "exported masks of %d images to %s in %.1f s: %d files written, %d kept, %d images with an error",
        *(num_images, uris.redact(uri), time.monotonic() - started, num_written, num_kept, result.num_failed),
    )
    return result


def class_names(workspace: Workspace, engine: QueryEngine, task: str) -> tuple[str, ...]:
    """The classes of a segmentation task in the order of their ids.

    Those of the configuration, else those of the model that answered last, as its run recorded them; then classes
    that only older answers have, by name.
    """
    quoted = _quote(task)
    known = workspace.config.task(task).classes or ()
    if not known:
        configs = engine.sql(
            f"SELECT config FROM runs SEMI JOIN (SELECT run AS run_id FROM latest_segments WHERE task = {quoted}) "
            "USING (run_id) ORDER BY finished_at DESC LIMIT 1"
        ).column("config")
        known = _recorded_classes(json.loads(configs[0].as_py()), task) if len(configs) else ()
    found = engine.sql(f"SELECT DISTINCT label FROM latest_segments WHERE task = {quoted} ORDER BY label")
    return (*known, *(name for name in found.column("label").to_pylist() if name not in known))


def _recorded_classes(config: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """The classes of a task's model, as the plan of a predict run holds them; none where it does not tell."""
    try:
        return tuple(config["spec"]["tasks"][task]["model"]["classes"])
    except (KeyError, TypeError):
        return ()


# ---------------------------------------------------------------------------------------------------------------- rows


def _chosen(task: str, where: str | None, limit: int | None) -> str:
    """The images asked for, as part of a WITH clause."""
    condition = f"WHERE ({where}\n)" if where else ""
    tail = f"ORDER BY image_id LIMIT {limit}" if limit else ""
    return f"""
of_task AS (SELECT image_id, model, label, rle FROM latest_segments WHERE task = {_quote(task)} AND current),
chosen AS (
    SELECT image_id, uri, version, size FROM (SELECT * FROM current_images {condition})
    SEMI JOIN of_task USING (image_id) {tail}
)
"""


def _answers_sql(task: str) -> str:
    return f"""
SELECT c.image_id, c.uri, c.version, c.size, o.width, o.height, s.label, s.rle
FROM chosen AS c JOIN of_task AS s USING (image_id)
LEFT JOIN latest_outcomes AS o ON o.image_id = s.image_id AND o.model = s.model AND o.task = {_quote(task)}
ORDER BY c.image_id, s.label
"""


def _answers(engine: QueryEngine, statement: str) -> Iterator[_Answer]:
    """One image after the other. Encoded masks are large: few rows become Python objects at once."""

    def rows() -> Iterator[dict[str, Any]]:
        for batch in engine.reader(statement, batch_rows=_BATCH_ROWS):
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()

    for _, of_image in groupby(rows(), itemgetter("image_id")):
        found = list(of_image)
        yield _Answer(found[0], [(row["label"], row["rle"]) for row in found])


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# --------------------------------------------------------------------------------------------------------------- files


class _Exporter:
    """Writes the files of many images at once, and gives their entries in order."""

    def __init__(
        self, workspace: Workspace, store: ObjectStore, classes: Sequence[str], *, overlay: bool, overwrite: bool
    ) -> None:
        predict = workspace.config.predict
        self._stores = workspace.stores
        self._max_bytes = predict.max_bytes
        self._limits = DecodeLimits(predict.max_bytes, predict.max_pixels, predict.image_timeout_s)
        self._store = store
        self._classes = classes
        self._overlay = overlay
        self._overwrite = overwrite
        self._num_decoders = min(4, len(os.sched_getaffinity(0)))
        self._drawing = threading.BoundedSemaphore(self._num_decoders + 1)  # whole photographs in memory at once
        self._stack = ExitStack()

    def __enter__(self) -> _Exporter:
        if self._overlay:
            num_processes = min(4, os.process_cpu_count() or 1) if hasattr(os, "process_cpu_count") else 2
            self._decoders = self._stack.enter_context(DecoderPool(num_processes, limits=self._limits, views=(View(),)))
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="winnow-export")
        self._stack.callback(self._threads.shutdown, wait=True, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def export(self, answers: Iterator[_Answer]) -> Iterator[_Entry]:
        """Export all; a failed image is an entry with its error.

        Raises:
            StorageError: files cannot be written.
            JobError: decoder processes do not start.
        """
        waiting: deque[Future[_Entry]] = deque()
        for answer in answers:
            waiting.append(self._threads.submit(self._export, answer))
            if len(waiting) >= 2 * _NUM_THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _export(self, answer: _Answer) -> _Entry:
        image_id = answer.image["image_id"]
        entry = _Entry(image_id, answer.image["uri"])
        entry.mask, entry.overlay = f"{image_id}.png", f"{image_id}.overlay.jpg" if self._overlay else ""
        has_mask = not self._overwrite and self._store.exists(entry.mask)
        has_overlay = not self._overlay or (not self._overwrite and self._store.exists(entry.overlay))
        entry.num_kept = has_mask + (has_overlay and self._overlay)
        if has_mask and has_overlay:
            return entry
        width, height = answer.image["width"], answer.image["height"]
        try:
            if width is None or height is None:
                raise MaskError("the size of the image is not known")
            labels = label_map(answer.segments, self._classes)
            if not has_mask:
                self._store.put(entry.mask, write_png(resize_to_source(labels, width, height), self._classes))
                entry.num_written += 1
        except MaskError as error:
            entry.mask = entry.overlay = ""
            entry.error = f"mask: {error}"
            return entry
        if not has_overlay:
            try:
                drawn = self._draw(answer.image, labels)
            except ImageError as error:
                entry.overlay = ""
                entry.error = f"{error.kind}: {error}"
                return entry
            self._store.put(entry.overlay, drawn)
            entry.num_written += 1
        return entry

    def _draw(self, image: Mapping[str, Any], labels_hw: LabelMap) -> bytes:
        """The overlay as JPEG, its longer side at most ``OVERLAY_PX``.

        Raises:
            ImageError: the image cannot be read or decoded.
        """
        data = asyncio.run(
            self._stores.read(image["uri"], version=image["version"], max_bytes=self._max_bytes, size=image["size"])
        )
        with self._drawing:
            decoded = self._decoders.submit(data).result()
            if decoded.image is None:
                assert decoded.error is not None
                raise decoded.error
            picture = Image.fromarray(decoded.image.views[0])
            picture.thumbnail((OVERLAY_PX, OVERLAY_PX), Image.Resampling.LANCZOS)
        labels_HW = resize_to_source(labels_hw, picture.width, picture.height)
        sink = io.BytesIO()
        drawn = draw_overlay(np.asarray(picture), labels_HW, self._classes)
        drawn.save(sink, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return sink.getvalue()


def _put_classes(store: ObjectStore, task: str, classes: Sequence[str], *, overwrite: bool) -> None:
    """Say what the values mean, and see that the masks that are there mean the same.

    Raises:
        CallError: they are of another task or have other classes.
    """
    content = {"task": task, "classes": {str(value): name for value, name in enumerate(classes)}}
    try:
        found = json.loads(store.get(_CLASSES))
        same = found["task"] == task and found["classes"].items() <= content["classes"].items()  # type: ignore[attr-defined]
    except NotFoundError:
        same = True
    except (ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same and not overwrite:
        raise CallError(
            f"{uris.redact(store.uri)} holds masks of another task or with other classes (see {_CLASSES}); choose "
            "another folder, or write all of them anew with --overwrite"
        )
    _put_if_new(store, _CLASSES, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def _put_if_new(store: ObjectStore, key: str, data: bytes) -> None:
    try:
        if store.get(key) == data[:]:
            return
    except NotFoundError:
        pass
    store.put(key, data)
