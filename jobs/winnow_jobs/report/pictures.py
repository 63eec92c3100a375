"""Thumbnails: small, without metadata, and part of the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from winnow.drawing import draw_overlay
from winnow.errors import FAILURE_KINDS, MaskError
from winnow.images import View
from winnow.masks import label_map, resize_to_source
from winnow_jobs.reading import ImageReader, Read

if TYPE_CHECKING:
    from winnow_jobs.report.gather import Picture, TaskReport
    from winnow_jobs.workspace import Workspace

THUMBNAIL_PX = 160
"""Longer side of a thumbnail."""

_VIEW = View(fit=(2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
_JPEG_QUALITY = 80


@dataclass(frozen=True)
class Thumbnail:
    """A picture as part of a page.

    Attributes:
        address: ``data:`` URI of a JPEG; empty when there is none.
        width, height: in pixels.
        reason: why there is none.
    """

    address: str = ""
    width: int = THUMBNAIL_PX
    height: int = THUMBNAIL_PX
    reason: str = ""


def thumbnails(workspace: Workspace, tasks: Sequence[TaskReport]) -> Mapping[tuple[str, str], Thumbnail]:
    """The thumbnails of all images that the tasks show, by task and image_id; those of masks with the mask drawn in.

    An image that cannot be read has none, and a reason instead.
    """
    wanted = {(task.name, each.image_id): (task, each) for task in tasks for each in (*task.least, *task.most)}
    if not wanted:
        return {}
    rows = [
        {"key": key, "uri": each.uri, "version": each.version, "size": each.size} for key, (_, each) in wanted.items()
    ]
    with ImageReader(workspace.stores, workspace.config.predict, [_VIEW], num_decoders=2) as reader:
        return {read.row["key"]: _thumbnail(read, *wanted[read.row["key"]]) for read in reader.read(rows)}


def classes_of(task: TaskReport) -> list[str]:
    """Classes in the order that gives them their colours: as configured, then those that only the answers know."""
    found = {label for each in (*task.least, *task.most) for label, _ in each.segments}
    return [*task.classes, *sorted(found - set(task.classes))]


def _thumbnail(read: Read, task: TaskReport, picture: Picture) -> Thumbnail:
    if read.views is None:
        kind = FAILURE_KINDS.get(read.error.kind) if read.error is not None else None
        return Thumbnail(reason=kind.meaning if kind else "the image cannot be read")
    width, height = _VIEW.target(read.width, read.height)
    pixels_HW3 = np.ascontiguousarray(read.views[0][:height, :width])
    shown = Image.fromarray(pixels_HW3)
    if picture.segments:
        classes = classes_of(task)
        try:
            labels_HW = resize_to_source(label_map(picture.segments, classes), width, height)
        except MaskError:
            return Thumbnail(reason="the mask is damaged")
        shown = draw_overlay(pixels_HW3, labels_HW, classes, legend=False)
    shown.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    shown.save(sink, "JPEG", quality=_JPEG_QUALITY, optimize=True)  # of pixels alone: there is no metadata to write
    return Thumbnail(f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}", shown.width, shown.height)
