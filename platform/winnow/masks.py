"""Masks as COCO's compressed run-length encoding, label maps, and where a mask's pixels lie on their image.

Legend: a mask is bool (h, w). A label map is uint8 or uint16 (h, w): each pixel's class id, which is the place of the
class in the task's list of classes; the largest value of the type (255 or 65535) means "not labelled".

The encoding is that of ``common/maskApi.c`` in https://github.com/cocodataset/cocoapi, byte for byte. The mask is read
column by column; ``counts`` are the lengths of its runs of zeros and ones in turn, zeros first. From the fourth on,
each is written as its difference to the one two places before. A number becomes groups of five bits, lowest first, in
two's complement; each group is one character: the bits, plus 32 unless it is the last of its number, plus 48.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from winnow.errors import MaskError

Mask = NDArray[np.bool_]
LabelMap = NDArray[np.uint8 | np.uint16]
Box = tuple[float, float, float, float]
"""x, y, width, height."""

BACKGROUNDS = ("__background__", "background")
"""Names of classes that stand for nothing in particular: left out of drawings and of COCO annotations."""

_MAX_PIXELS = 2**32 - 1  # pycocotools keeps counts in 32 bits
_MAX_GROUPS = 7  # of five bits: enough for every difference of two such counts


class Rle(TypedDict):
    """COCO's compressed run-length encoding: ``size`` is [height, width]."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class ClassMask:
    """Where one class lies in a label map.

    Attributes:
        value: the class id.
        rle: its mask.
        num_pixels: how many it has, at least 1.
        box: x, y, width, height around them, in pixels of the mask.
    """

    value: int
    rle: Rle
    num_pixels: int
    box: tuple[int, int, int, int]


# ------------------------------------------------------------------------------------------------------------- encoding


def encode(mask_HW: Mask) -> Rle:
    """A mask as run-length encoding.

    Args:
        mask_HW: bool (h, w), of at least one pixel.

    Raises:
        ValueError: another type or shape.
    """
    if mask_HW.dtype != np.bool_:
        raise ValueError(f"a mask is bool, not {mask_HW.dtype}; compare a label map with a class id first")
    flat = _by_columns(mask_HW)
    starts, ends = _runs(flat)
    counts = ends - starts
    if flat[0]:
        counts = np.concatenate(([0], counts))
    return Rle(size=list(mask_HW.shape), counts=_write_counts(counts, np.array([0, len(counts)]))[0])


def encode_classes(labels_HW: LabelMap) -> list[ClassMask]:
    """Every value of a label map with its mask, pixel count and box, in one pass; in the order of the values.

    Args:
        labels_HW: uint8 or uint16 (h, w), of at least one pixel. "Not labelled" is a value like any other.

    Raises:
        ValueError: another type or shape.
    """
    if labels_HW.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"a label map is uint8 or uint16, not {labels_HW.dtype}")
    flat = _by_columns(labels_HW)
    height = labels_HW.shape[0]
    starts, ends = _runs(flat)
    order = np.argsort(flat[starts], kind="stable")  # runs of one class side by side, still from left to right
    starts, ends = starts[order], ends[order]
    values = flat[starts]
    firsts = np.concatenate(([0], np.flatnonzero(values[1:] != values[:-1]) + 1))  # the first run of each class
    lasts = np.concatenate((firsts[1:], [len(values)])) - 1
    gaps = starts - np.concatenate(([0], ends[:-1]))
    gaps[firsts] = starts[firsts]
    tails = flat.size - ends[lasts]  # zeros after the last run of ones; written only where there are some
    has_tail = tails > 0
    pairs = np.stack((gaps, ends - starts), axis=1).reshape(-1)
    counts = np.insert(pairs, 2 * (lasts[has_tail] + 1), tails[has_tail])
    offsets = np.concatenate(([0], np.cumsum(2 * (lasts - firsts + 1) + has_tail)))
    # A run that goes on in the next column touches both the lower and the upper edge.
    left, right = starts // height, (ends - 1) // height
    within = left == right
    top = np.minimum.reduceat(np.where(within, starts % height, 0), firsts)
    bottom = np.maximum.reduceat(np.where(within, (ends - 1) % height, height - 1), firsts)
    left, right = np.minimum.reduceat(left, firsts), np.maximum.reduceat(right, firsts)
    boxes = np.stack((left, top, right - left + 1, bottom - top + 1), axis=1).tolist()
    areas = np.add.reduceat(ends - starts, firsts).tolist()
    size = list(labels_HW.shape)
    texts = _write_counts(counts, offsets)
    return [
        ClassMask(value, Rle(size=list(size), counts=text), area, tuple(box))
        for value, text, area, box in zip(values[firsts].tolist(), texts, areas, boxes, strict=True)
    ]


def decode(rle: Mapping[str, Any]) -> Mask:
    """The mask of a run-length encoding, bool (h, w).

    Args:
        rle: ``size`` [height, width] and ``counts``, as text or as pycocotools' bytes.

    Raises:
        MaskError: it is malformed; the message says how.
    """
    height, width = size_of(rle)
    return np.ascontiguousarray(_decode_by_columns(rle, height, width).reshape(width, height).T)


def size_of(rle: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width that an encoding announces.

    Raises:
        MaskError: they are no two sides of an image.
    """
    size = rle.get("size") if isinstance(rle, Mapping) else None
    sides = list(size) if isinstance(size, Sequence) and not isinstance(size, str | bytes) else []
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise MaskError(f"a run-length encoding needs its size as [height, width] in pixels; it is {size!r}")
    if sides[0] * sides[1] > _MAX_PIXELS:
        raise MaskError(
            f"{sides[1]} x {sides[0]} pixels are more than a run-length encoding can hold ({_MAX_PIXELS:,})"
        )
    return sides[0], sides[1]


def _decode_by_columns(rle: Mapping[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """All pixels of the mask, column after column, (h·w,)."""
    counts = _read_counts(rle.get("counts"))
    if counts.sum() != height * width:
        raise MaskError(
            f"the run-length encoding covers {counts.sum():,} pixels, but its size {width} x {height} has "
            f"{height * width:,}; was it cut off, or made for another size?"
        )
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


def _by_columns(array_HW: NDArray[Any]) -> NDArray[Any]:
    """All pixels, column after column, (h·w,)."""
    if array_HW.ndim != 2 or array_HW.size == 0:
        raise ValueError(f"a mask has the shape (height, width), both at least 1; not {array_HW.shape}")
    return np.ascontiguousarray(array_HW.T).reshape(-1)


def _runs(flat: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of the runs of equal values."""
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.concatenate(([0], borders)), np.concatenate((borders, [flat.size]))


def _write_counts(counts: NDArray[np.int64], offsets: NDArray[np.int64]) -> list[str]:
    """The counts of many masks, one after the other, as a text each; mask i's begin at ``offsets[i]``."""
    places = np.arange(len(counts)) - np.repeat(offsets[:-1], np.diff(offsets))
    later = np.flatnonzero(places > 2)
    numbers = counts.copy()
    numbers[later] -= counts[later - 2]
    # n groups hold -2^(5n-1) to 2^(5n-1) - 1.
    magnitudes = np.where(numbers < 0, ~numbers, numbers)
    num_groups = np.ones(len(numbers), dtype=np.int64)
    for n in range(1, _MAX_GROUPS):
        num_groups += magnitudes >= 1 << (5 * n - 1)
    place_of_group = np.arange(num_groups.max())
    groups = (numbers[:, None] >> (5 * place_of_group)) & 31
    groups += 48 + 32 * (place_of_group < num_groups[:, None] - 1)
    text = groups.astype(np.uint8)[place_of_group < num_groups[:, None]].tobytes().decode("ascii")
    ends = np.concatenate(([0], np.cumsum(num_groups)))[offsets].tolist()
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def _read_counts(text: object) -> NDArray[np.int64]:
    """Lengths of the runs, int64.

    Raises:
        MaskError: the text is malformed.
    """
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if not isinstance(data, bytes) or not data:
        raise MaskError(f"a run-length encoding needs its counts as text; they are {text!r:.80}")
    characters = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    wrong = np.flatnonzero((characters < 0) | (characters > 63))
    if wrong.size:
        raise MaskError(
            f"character {wrong[0] + 1:,} of the counts, {data[int(wrong[0])]:#04x}, is none that COCO's run-length "
            "encoding uses ('0' to 'o'); is it an uncompressed one, or base64?"
        )
    is_last = characters < 32
    if not is_last[-1]:
        raise MaskError("the counts end within a number: the run-length encoding was cut off")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    num_groups = ends - starts + 1
    if num_groups.max() > _MAX_GROUPS:
        raise MaskError(f"a number of {num_groups.max():,} characters stands in the counts; {_MAX_GROUPS} is the most")
    shifts = 5 * (np.arange(len(characters)) - np.repeat(starts, num_groups))
    numbers = np.add.reduceat((characters & 31) << shifts, starts)
    numbers -= np.where(characters[ends] & 16, 1 << (5 * num_groups), 0)
    counts = numbers
    counts[1::2] = np.cumsum(numbers[1::2])
    counts[2::2] = np.cumsum(numbers[2::2])
    negative = np.flatnonzero(counts < 0)
    if negative.size:
        raise MaskError(
            f"run {negative[0] + 1:,} of the encoding has the length {counts[negative[0]]:,}; is it damaged?"
        )
    return counts


# ----------------------------------------------------------------------------------------------------------- label maps


def label_dtype(num_classes: int) -> type[np.uint8] | type[np.uint16]:
    """The type of label maps of so many classes, with a value left for "not labelled".

    Raises:
        ValueError: more classes than 65,535.
    """
    if num_classes > np.iinfo(np.uint16).max:
        raise ValueError(f"{num_classes:,} classes are more than a label map can tell apart (65,535)")
    return np.uint8 if num_classes <= np.iinfo(np.uint8).max else np.uint16


def unlabelled(labels_HW: LabelMap) -> int:
    """The value that means "not labelled" in a label map of this type: 255 or 65535."""
    return int(np.iinfo(labels_HW.dtype).max)


def label_map(segments: Iterable[tuple[str, Mapping[str, Any]]], classes: Sequence[str]) -> LabelMap:
    """The label map of an image's segments, (h, w) in the resolution of their masks.

    Args:
        segments: name of the class and mask, as in the columns ``label`` and ``rle`` of the table ``segments``. Where
            two overlap, the later one counts; pixels of none are "not labelled".
        classes: the names in the order of their ids.

    Raises:
        MaskError: no segments, one of an unknown class, a malformed mask, or masks of different sizes.
    """
    ids = {name: number for number, name in enumerate(classes)}
    size: tuple[int, int] | None = None
    flat: LabelMap = np.empty(0, dtype=np.uint8)
    for name, rle in segments:
        if name not in ids:
            raise MaskError(f"class {name!r} is unknown; the classes are {shown_names(classes)}")
        height, width = size_of(rle)
        if size is None:
            size = height, width
            dtype = label_dtype(len(ids))
            flat = np.full(height * width, np.iinfo(dtype).max, dtype=dtype)
        elif size != (height, width):
            first = f"{size[1]} x {size[0]}"
            raise MaskError(f"the mask of {name!r} has {width} x {height} pixels, the one before it {first}")
        flat[_decode_by_columns(rle, height, width)] = ids[name]
    if size is None:
        raise MaskError("an image without segments has no label map")
    return np.ascontiguousarray(flat.reshape(size[::-1]).T)


def shown_names(names: Sequence[str], num_shown: int = 10) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - num_shown} more" if len(names) > num_shown else ""
    return ", ".join(map(repr, names[:num_shown])) + more


# --------------------------------------------------------------------------------------------------------- source image
#
# Pixel (x, y) of a mask of w × h covers the rectangle from (x·W/w, y·H/h) of its W × H image: docs/tables.md, segments.


def resize_to_source(labels_hw: LabelMap | Mask, width: int, height: int) -> Any:
    """A mask or label map in the resolution of its image, (height, width) of the same type.

    Each pixel of the image takes the value of the mask's pixel that covers its centre.
    """
    mask_height, mask_width = labels_hw.shape
    if (mask_height, mask_width) == (height, width):
        return labels_hw
    columns = (2 * np.arange(width) + 1) * mask_width // (2 * width)
    rows = (2 * np.arange(height) + 1) * mask_height // (2 * height)
    return np.take(np.take(labels_hw, columns, axis=1), rows, axis=0)


def box_to_source(box: Sequence[float], mask_size: tuple[int, int], source_size: tuple[int, int]) -> Box:
    """A box in pixels of a mask, as x, y, width, height in pixels of its image.

    Args:
        box: x, y, width, height.
        mask_size: width and height of the mask.
        source_size: width and height of the image.
    """
    across, down = source_size[0] / mask_size[0], source_size[1] / mask_size[1]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down
