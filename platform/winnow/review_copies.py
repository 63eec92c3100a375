"""What annotators get to see of an image: its pixels, and nothing else that the file holds.

A review copy is a JPEG or PNG, which every browser shows, made of the decoded pixels alone: upright, of the size of the
image, so that masks painted on it fit, without metadata (place, camera, time, thumbnail, comments, colour profile),
under a name that tells nothing.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from winnow.images import DecodeLimits, Pixels, View, decode

Format = Literal["JPEG", "PNG"]

_LOSSY = frozenset({"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"})
"""Formats of photographs: a PNG of them would be several times as large, to keep noise."""

_QUALITY = 92
_MAX_JPEG_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_SUFFIX: dict[Format, str] = {"JPEG": "jpg", "PNG": "png"}


@dataclass(frozen=True)
class ReviewCopy:
    """A file for annotators.

    Attributes:
        name: file name, of the image's id.
        data: the file.
        width: in pixels, of image and copy.
        height: likewise.
    """

    name: str
    data: bytes
    width: int
    height: int


def review_copy(data: bytes, image_id: str, limits: DecodeLimits) -> ReviewCopy:
    """The copy of an image file; the same bytes every time.

    Nothing guards against a decoder that crashes or hangs: of files that may be hostile, decode the pixels with
    ``winnow.decoders`` and give them to ``from_pixels``.

    Raises:
        DecodeError: the bytes cannot be decoded within the limits.
    """
    decoded = decode(data, limits=limits, views=(View(),))
    return from_pixels(decoded.views[0], image_id, source_format=decoded.format)


def from_pixels(pixels_HW3: Pixels, image_id: str, *, source_format: str) -> ReviewCopy:
    """The copy of decoded pixels.

    Args:
        pixels_HW3: uint8 (H, W, 3), upright.
        image_id: of the image.
        source_format: Pillow's name of the format that they were in: what was lossy becomes a JPEG, all else a PNG.
    """
    height, width = pixels_HW3.shape[:2]
    format_: Format = "JPEG" if source_format in _LOSSY and max(width, height) <= _MAX_JPEG_SIDE else "PNG"
    sink = io.BytesIO()
    options = {"quality": _QUALITY, "subsampling": "4:4:4"} if format_ == "JPEG" else {"compress_level": 6}
    Image.fromarray(pixels_HW3).save(sink, format_, **options)  # a new image: it has no metadata that could be written
    return ReviewCopy(file_name(image_id, format_), sink.getvalue(), width, height)


def file_name(image_id: str, format_: Format) -> str:
    """The name of an image's copy."""
    return f"{image_id}.{_SUFFIX[format_]}"
