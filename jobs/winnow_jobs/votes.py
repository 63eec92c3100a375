"""What several people said about one image, from rows of the table ``labels``, so that it can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from winnow.errors import MaskError
from winnow.mask_files import read_label
from winnow.masks import LabelMap

Row = Mapping[str, Any]


def is_mask(row: Row) -> bool:
    """True for painted masks; not where the person said something of the whole image."""
    value = row["value"]
    return value is not None and value.startswith('{"segments"') and '"answer":' not in value


def vote(row: Row) -> str:
    """What a person said, as far as another can have said the same: masks are all one answer."""
    return "masks" if is_mask(row) else f"{row['label'] or ''}|{row['value'] or ''}"


def label_maps(rows: Sequence[Row], classes: Sequence[str]) -> tuple[list[str], list[LabelMap]]:
    """The masks of several people as label maps of one meaning.

    Args:
        rows: with ``value``, all masks of one image.
        classes: of the task; classes that only the masks have come after them.

    Returns:
        Names of the values of the maps, and a map for each row; no maps when nobody painted anything.

    Raises:
        MaskError: masks of different sizes, or malformed.
    """
    segments = [segment for row in rows for segment in json.loads(row["value"])["segments"]]
    names = list(dict.fromkeys([*classes, *(segment["label"] for segment in segments)]))
    if not segments:
        return names, []
    height, width = segments[0]["rle"]["size"]
    return names, [read_label(row["value"], names, width=width, height=height, read=_no_files) for row in rows]


def _no_files(uri: str) -> bytes:
    raise MaskError(f"a painted mask names no file, and this one names {uri}")
