"""Review copies: the same picture, upright, and nothing of what the file told beside it."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from photographs import LIMITS, packaged_photographs
from winnow.errors import DecodeError
from winnow.review_copies import ReviewCopy, review_copy

ID = "0123456789abcdef" * 2
PLANTED = "Rosenweg Familie Huber"
POSITION = (48.0, 8.0, 3.125)
GPS, MAKER_NOTE, ORIENTATION = 0x8825, 0x927C, 0x0112


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x010F] = PLANTED  # camera
    exif[0x9C9B] = PLANTED.encode("utf-16-le")  # Windows' title
    exif.get_ifd(0x8769)[MAKER_NOTE] = PLANTED.encode()
    exif.get_ifd(GPS).update({1: "N", 2: POSITION, 3: "E", 4: POSITION, 29: "2026:01:02"})
    return exif


def _planted(kind: str, orientation: int = 1) -> bytes:
    """A photograph whose file tells a place and a name in every way that its format has."""
    image = Image.open(io.BytesIO(packaged_photographs()["chelsea"])).convert("RGB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:-8] + PLANTED.encode()[:8]
    options: dict[str, object] = {"exif": _exif(orientation), "icc_profile": profile}
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{PLANTED}</x:xmpmeta>".encode()
    if kind == "JPEG":
        options |= {"comment": PLANTED.encode(), "xmp": xmp, "quality": 95}
    elif kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Location", PLANTED)
        info.add_text("Author", PLANTED, zip=True)
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options["pnginfo"] = info
    elif kind == "WEBP":
        options |= {"xmp": xmp, "quality": 95}
    else:
        options["description"] = PLANTED
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue() + (PLANTED.encode() if kind == "JPEG" else b"")  # and after its end


def _jpeg_segments(data: bytes) -> list[int]:
    """Markers of a JPEG up to the picture itself."""
    place, found = 2, []
    while data[place + 1] != 0xDA:
        assert data[place] == 0xFF
        found.append(data[place + 1])
        place += 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    return found


def _png_chunks(data: bytes) -> set[bytes]:
    place, found = 8, set()
    while place < len(data):
        found.add(data[place + 4 : place + 8])
        place += 12 + int(struct.unpack(">I", data[place : place + 4])[0])
    return found


def _assert_tells_nothing(copy: ReviewCopy) -> None:
    for word in PLANTED.split():
        for encoded in (word.encode(), word.encode("utf-16-le"), word.encode("utf-16-be")):
            assert encoded not in copy.data
    with Image.open(io.BytesIO(copy.data)) as image:
        assert dict(image.getexif()) == {}
        assert dict(image.getexif().get_ifd(GPS)) == {}
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        kind = image.format
    if kind == "JPEG":
        # JFIF's header, tables and frame: no EXIF, XMP or colour profile (APP1, APP2), no IPTC (APP13), no comment.
        assert set(_jpeg_segments(copy.data)) <= {0xE0, 0xDB, 0xC0, 0xC4}
        assert copy.data.endswith(b"\xff\xd9")
    else:
        assert _png_chunks(copy.data) == {b"IHDR", b"IDAT", b"IEND"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_place_camera_and_comments_are_gone(kind: str) -> None:
    data = _planted(kind)
    assert PLANTED.split()[0].encode() in data
    if kind != "TIFF":  # Pillow writes no position into a TIFF
        with Image.open(io.BytesIO(data)) as image:
            assert 2 in image.getexif().get_ifd(GPS)
    copy = review_copy(data, ID, LIMITS)
    _assert_tells_nothing(copy)
    assert copy.name == f"{ID}.{'jpg' if kind in ('JPEG', 'WEBP') else 'png'}"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_it_stands_upright_in_the_size_of_the_image(kind: str, orientation: int) -> None:
    data = _planted(kind, orientation)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    copy = review_copy(data, ID, LIMITS)
    with Image.open(io.BytesIO(copy.data)) as image:
        pixels = np.asarray(image).astype(int)
    assert pixels.shape == expected.shape == (copy.height, copy.width, 3)
    assert np.abs(pixels - expected).mean() < (2.5 if kind == "JPEG" else 1e-9)


def test_the_same_image_gives_the_same_bytes() -> None:
    data = _planted("JPEG")
    assert review_copy(data, ID, LIMITS) == review_copy(data, ID, LIMITS)


def test_every_photograph_has_a_copy() -> None:
    for data in packaged_photographs().values():
        _assert_tells_nothing(review_copy(data, ID, LIMITS))


def test_what_cannot_be_decoded_has_none() -> None:
    with pytest.raises(DecodeError):
        review_copy(_planted("JPEG")[:5000], ID, LIMITS)
