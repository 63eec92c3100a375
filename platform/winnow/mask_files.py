"""Masks as PNG files, and labels of pixels: what stands in ``labels.value`` for a segmentation task.

A mask file has one channel, and the value of each pixel is the class id: the place of the class in the task's list of
classes, 0 being the first. In files of 8 bits 255, in files of 16 bits 65535 means "not labelled".
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from winnow.errors import MaskError
from winnow.image_formats import FAULTS, explain, pillow_guarded
from winnow.masks import LabelMap, label_dtype, label_map, shown_names, size_of, unlabelled
from winnow.palette import UNLABELLED, class_colours

_BIT_DEPTH = 24
"""Where the header chunk, always first in a PNG, says how many bits a value has."""


def write_png(labels_HW: LabelMap, classes: Sequence[str]) -> bytes:
    """A label map as PNG: a palette of the classes' colours with 8 bits, or 16-bit grey where that is not enough.

    Args:
        labels_HW: uint8 or uint16 (h, w).
        classes: names in the order of the ids, for their colours.
    """
    height, width = labels_HW.shape
    sink = io.BytesIO()
    if labels_HW.dtype == np.uint8:
        colours = np.zeros((256, 3), dtype=np.uint8)
        colours[: len(classes)] = class_colours(classes[:256])
        if len(classes) < 256:
            colours[255] = UNLABELLED
        image = Image.frombytes("P", (width, height), np.ascontiguousarray(labels_HW).tobytes())
        image.putpalette(colours.tobytes())
    else:
        image = Image.fromarray(labels_HW)
    image.save(sink, "PNG")
    return sink.getvalue()


def read_png(data: bytes, *, width: int, height: int) -> LabelMap:
    """The class ids in a PNG with one channel (palette, or grey of up to 16 bits), uint8 or uint16 (h, w).

    Args:
        data: the whole file.
        width: that it must have.
        height: that it must have.

    Raises:
        MaskError: it is no PNG, is damaged, has colours instead of class ids, or has another size.
    """
    with pillow_guarded():
        Image.MAX_IMAGE_PIXELS = None  # the size is checked before any pixel is decoded
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG",))
            if image.size != (width, height):
                raise MaskError(
                    f"the mask has {image.width} x {image.height} pixels, its image has {width} x {height} with the "
                    "EXIF orientation applied; a mask needs the size of its image"
                )
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                raise MaskError(
                    f"the mask is a PNG of mode {image.mode}: colours, not class ids; save it with one channel, as "
                    "palette or grey"
                )
            values: Any = np.asarray(image)
        except FAULTS as error:
            raise MaskError(f"the mask cannot be read: {_reason(error, data)}") from None
    bits = data[_BIT_DEPTH]
    if image.mode == "L" and bits < 8:
        return np.asarray(values // (255 // (2**bits - 1)), dtype=np.uint8)  # Pillow stretches grey of 2 or 4 bits
    return np.asarray(values, dtype=np.uint16 if bits == 16 else np.uint8)


def _reason(error: BaseException, data: bytes) -> str:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return f"its {len(data):,} bytes are no PNG; masks must be PNG, because JPEG changes the class ids"
    if isinstance(error, UnidentifiedImageError):
        return "the PNG's header is damaged; upload the file again"
    return explain(error, "PNG", data).message


def read_label(
    value: str, classes: Sequence[str], *, width: int, height: int, read: Callable[[str], bytes]
) -> LabelMap:
    """A label of an image's pixels as label map of the image's size; 255 means "not labelled".

    Of the type ``label_dtype`` gives for so many classes: uint8 for up to 255 (65535 is "not labelled" beyond).

    Args:
        value: ``labels.value``: JSON of ``{"mask": URI}``, or of ``{"segments": [{"label": …, "rle": …}, …]}``. Where
            segments overlap, the later one counts.
        classes: names in the order of the ids.
        width: of the image, with the EXIF orientation applied, as in ``outcomes``.
        height: of the image, likewise.
        read: gives the bytes of a mask file.

    Raises:
        MaskError: malformed, of another size, an unknown class, or a value that is no class's id.
    """
    content = _content(value)
    if isinstance(content, str):
        labels = read_png(read(content), width=width, height=height)
        return _checked(labels, classes)
    if not content:
        dtype = label_dtype(len(classes))
        return np.full((height, width), np.iinfo(dtype).max, dtype=dtype)
    for name, rle in content:
        if size_of(rle) != (height, width):
            found = f"{size_of(rle)[1]} x {size_of(rle)[0]}"
            raise MaskError(f"the mask of {name!r} has {found} pixels, its image has {width} x {height}")
    return label_map(content, classes)


def _content(value: str) -> str | list[tuple[str, Any]]:
    """URI of the mask file, or class and encoded mask of each segment."""
    try:
        content = json.loads(value)
    except (ValueError, TypeError, RecursionError):
        raise MaskError(f"the label is not JSON: {value!r:.100}") from None
    mask = content.get("mask") if isinstance(content, dict) else None
    segments = content.get("segments") if isinstance(content, dict) else None
    if isinstance(mask, str) and mask and segments is None:
        return mask
    if isinstance(segments, list) and mask is None and all(map(_is_segment, segments)):
        return [(segment["label"], segment["rle"]) for segment in segments]
    raise MaskError(
        f'a label of pixels is {{"mask": URI}} or {{"segments": [{{"label": …, "rle": …}}]}}; it is {value!r:.100}'
    )


def _is_segment(segment: object) -> bool:
    return isinstance(segment, dict) and isinstance(segment.get("label"), str) and isinstance(segment.get("rle"), dict)


def _checked(labels: LabelMap, classes: Sequence[str]) -> LabelMap:
    """The label map in the type for so many classes.

    Raises:
        MaskError: a value is no class's id.
    """
    dtype = label_dtype(len(classes))
    is_void = labels == unlabelled(labels)
    wrong = (labels >= len(classes)) & ~is_void
    if wrong.any():
        y, x = (int(place[0]) for place in np.nonzero(wrong))
        raise MaskError(
            f"the mask has the value {labels[y, x]} (first at x {x}, y {y}), which is no class: there are "
            f"{len(classes)}, from 0 on ({shown_names(classes)}); {unlabelled(labels)} means not labelled"
        )
    found: LabelMap = labels.astype(dtype)
    found[is_void] = np.iinfo(dtype).max
    return found
