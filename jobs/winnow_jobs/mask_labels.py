"""The label maps of images that were read: from the masks that labels name or hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from winnow.errors import FetchError, MaskError
from winnow.mask_files import read_label
from winnow_jobs.reading import ImageReader, Read


def read_masks(
    reader: ImageReader, images: Sequence[Read], classes: Sequence[str], on_error: Callable[[Read, str], None]
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Place and label map (H, W), at its own size, of every image whose mask can be read; others go to ``on_error``.

    Args:
        reader: fetches the files of masks, all at once.
        images: that could be read; the column ``value`` of their rows is the label, as docs/masks.md describes it.
        classes: of the task, in order.
        on_error: told the image and why its mask cannot be used.
    """
    files = reader.fetch(filter(None, (_mask_uri(image.row["value"]) for image in images)))

    def read(uri: str) -> bytes:
        found = files[uri]
        if isinstance(found, FetchError):
            raise found
        return found

    for number, image in enumerate(images):
        try:
            yield number, read_label(image.row["value"], classes, width=image.width, height=image.height, read=read)
        except (MaskError, FetchError) as error:
            on_error(image, f"{image.row['uri']}: {error.message}")


def _mask_uri(value: str) -> str | None:
    """The file that a label names, if it is well-formed and names one; what else it may be, ``read_label`` says."""
    try:
        content = json.loads(value)
    except (ValueError, RecursionError):
        return None
    uri = content.get("mask") if isinstance(content, dict) else None
    return uri if isinstance(uri, str) and uri else None
