"""``winnow report``: what the tables say, as one HTML file for people.

``gather`` asks the tables, ``charts`` draws numbers, ``pictures`` makes thumbnails, ``page`` puts them together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from winnow_jobs.workspace import Workspace

FILE_NAME = "report.html"


@dataclass(frozen=True)
class ReportResult:
    """What was written.

    Attributes:
        path: of the file.
        num_bytes: of the file.
        tasks: that it is about.
        num_images: current originals in the warehouse.
        num_pictures: thumbnails on the page.
        num_unreadable: images that were to be shown and cannot be read.
        seconds: that it took.
    """

    path: str
    num_bytes: int
    tasks: tuple[str, ...]
    num_images: int
    num_pictures: int
    num_unreadable: int
    seconds: float


def report(
    workspace: Workspace, tasks: Sequence[str] = (), *, to: str | Path | None = None, images: bool = True
) -> ReportResult:
    """Write the report; a file that is there is replaced once the new one is whole.

    Args:
        workspace: configuration and warehouse.
        tasks: only these; all but embeddings by default.
        to: the file; ``report.html`` beside winnow.toml by default.
        images: show thumbnails.

    Raises:
        CallError: no such task, or no such folder.
        StorageError: the file cannot be written.
    """
    from winnow_jobs.report.gather import gather
    from winnow_jobs.report.page import render
    from winnow_jobs.report.pictures import thumbnails
    from winnow_jobs.writers import atomic_file

    started = time.monotonic()
    path = workspace.folder / FILE_NAME if to is None else Path(to)
    with atomic_file(path, overwrite=True) as file:
        found = gather(workspace, tasks)
        pictures = thumbnails(workspace, found.tasks) if images else {}
        data = render(found, pictures, images=images).encode()
        file.write(data)
    num_pictures = sum(bool(each.address) for each in pictures.values())
    return ReportResult(
        path=str(path),
        num_bytes=len(data),
        tasks=tuple(task.name for task in found.tasks),
        num_images=found.num_images,
        num_pictures=num_pictures,
        num_unreadable=len(pictures) - num_pictures,
        seconds=round(time.monotonic() - started, 3),
    )
