"""Which image formats are opened, and what Pillow's exceptions mean.

The content decides, never a name. A format is opened only when it stands in ``FORMATS``; what is recognised beyond them
is refused by name. Nothing here runs Ghostscript or unpickles.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image, ImageFile, UnidentifiedImageError

from winnow.errors import DecodeError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "ICO", "DIB", "TGA")
"""Formats that are decoded, by Pillow's names; JPEG includes MPO. TGA has no signature and is tried last."""

FAULTS: tuple[type[BaseException], ...] = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(EOFError, ArithmeticError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises on damaged files. Anything else is a fault of ours and not the image's."""

_PLUGINS = ("Jpeg", "Mpo", "Png", "Gif", "WebP", "Tiff", "Bmp", "Ppm", "Jpeg2K", "Avif", "Ico", "Tga")
_CONVERT = "convert it to JPEG, PNG, WebP or TIFF"
_FOREIGN = (
    (b"%pdf", "PDF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjxl ", "JPEG XL"),
    (b"ii\xbc\x01", "JPEG XR"),
    (b"farbfeld", "farbfeld"),
    (b"#?radiance", "Radiance HDR"),
    (b"v/1\x01", "OpenEXR"),
)
"""Images that Pillow does not know; compared in lower case."""

_NOT_IMAGES = (
    ((b"<!doctype html", b"<html"), "an HTML page; was an error page saved under this name?"),
    ((b"<?xml", b"<error"), "an XML document; was a storage error saved under this name?"),
    ((b"{", b"["), "JSON; was an error message saved under this name?"),
    ((b"pk\x03\x04", b"\x1f\x8b"), "an archive or a checkpoint"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a Python pickle, which was not opened"),
)


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """The formats of ``FORMATS`` that this Pillow knows; imports its modules for them."""
    for plugin in _PLUGINS:
        with contextlib.suppress(ImportError):  # Pillow before 11.3 has no AVIF
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)


_LOCK = threading.Lock()
_UNSUPPORTED = re.compile(r"(?i)unsupported|not supported|cannot handle|unknown (?!data organization)")
_TRUNCATED = re.compile(
    r"(?i)truncated|incomplete|not enough .*data|but only got|reached EOF|unexpected end|buffer of|not large enough"
    r"|cannot load this image|no more images|missing dimensions"
)


@contextlib.contextmanager
def pillow_guarded() -> Iterator[list[warnings.WarningMessage]]:
    """Pillow's globals as we need them, and its warnings in a list."""
    with _LOCK, warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        kept = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.WARN_POSSIBLE_FORMATS
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.WARN_POSSIBLE_FORMATS = False, True
        try:
            yield remarks
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.WARN_POSSIBLE_FORMATS = kept


def _accepts(name: str, prefix: bytes) -> bool:
    accept = Image.OPEN[name][1]
    try:
        return accept is not None and accept(prefix) is True
    except (struct.error, IndexError):  # shorter than the signature
        return False


def sniff(data: bytes) -> str | None:
    """The format whose signature the bytes carry; None when there is none."""
    return next((name for name in load_plugins() if _accepts(name, data[:16])), None)


def open_image(data: bytes, max_pixels: int, remarks: list[warnings.WarningMessage]) -> ImageFile.ImageFile:
    """The opened image: its header is read, its pixels are not.

    Raises:
        DecodeError: of no format that is decoded.
        FAULTS: damaged; see ``explain``.
    """
    if data[4:8] == b"ftyp" and b"avif" not in data[8:64] and b"avis" not in data[8:64]:
        kind = "HEIC or HEIF" if data[8:11] in (b"hei", b"hev", b"mif", b"msf") else "MP4 or QuickTime"
        raise DecodeError("unsupported", f"{kind} files are not decoded; {_CONVERT}")
    name = sniff(data)
    # Our own check follows with the size in its message; only WebP allocates its canvas while it is opened.
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2 if name == "WEBP" else None
    try:
        return Image.open(io.BytesIO(data), formats=(name or "TGA",))
    except FAULTS as error:
        if name is None:  # every doubtful file was tried as TGA
            raise _refusal(data) from None
        if not isinstance(error, UnidentifiedImageError):
            raise
        start = f"{name} opening failed. "
        said = [str(remark.message).removeprefix(start) for remark in remarks if str(remark.message).startswith(start)]
        raise SyntaxError(said[-1] if said and said[-1] else "the header is damaged") from None


def _refusal(data: bytes) -> DecodeError:
    """Why bytes without a signature of ``FORMATS`` are refused; names what they are where that is known."""
    start = data[:1024].lstrip().lower()
    if b"<svg" in start:
        return DecodeError("unsupported", f"SVG drawings are not decoded; {_CONVERT}")
    for signature, name in _FOREIGN:
        if start.startswith(signature):
            return DecodeError("unsupported", f"{name} files are not decoded; {_CONVERT}")
    Image.init()
    for name in Image.OPEN:
        if name not in FORMATS and _accepts(name, data[:16]):
            return DecodeError("unsupported", f"{name} images are recognised but not decoded; {_CONVERT}")
    for signatures, what in _NOT_IMAGES:
        if start.startswith(signatures):
            return DecodeError("not_an_image", f"the bytes look like {what}")
    if not data[:4096].strip(b"\0"):
        return DecodeError("not_an_image", "the file holds only NUL bytes where an image starts; upload it again")
    return DecodeError("not_an_image", f"no image format that is known starts like this file of {len(data):,} bytes")


def explain(error: BaseException, name: str, data: bytes) -> DecodeError:
    """Pillow's exception as a typed failure."""
    said = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))[:200].rstrip(".") or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return DecodeError("too_many_pixels", f"{name}: {said}; raise max_pixels to decode it")
    if isinstance(error, NotImplementedError) or _UNSUPPORTED.search(said):
        return DecodeError("unsupported", f"a variant of {name} that is not decoded ({said}); {_CONVERT}")
    if "Decompressed data too large" in said:
        return DecodeError("unsupported", f"{name}: a compressed text chunk inflates beyond 1 MiB; remove it")
    if _ends_early(name, data) or _TRUNCATED.search(said):
        return DecodeError("truncated", f"the {name} data ends before the last pixel ({said}); upload the file again")
    return DecodeError("corrupt", f"the {name} data is damaged ({said}); replace the file")


def _ends_early(name: str, data: bytes) -> bool:
    """True when the container says so, where the library's message does not."""
    if name == "WEBP":  # RIFF: 4 bytes name, 4 bytes length of what follows
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return name == "JPEG2000" and not data.endswith(b"\xff\xd9")  # the end-of-codestream marker
