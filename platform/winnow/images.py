"""Image bytes to uint8 RGB pixels, within limits, with Pillow.

Shapes: ``(H, W, 3)`` uint8, sRGB as stored (colour profiles are not applied), EXIF orientation applied.

The geometry of a view is that of torchvision's ``Resize`` and ``CenterCrop`` on a Pillow image, bit for bit, unless
JPEG was scaled while decoding. Nothing here guards against a decoder that crashes or hangs: ``winnow.decoders`` does.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from winnow.errors import DecodeError
from winnow.image_formats import FAULTS, explain, open_image, pillow_guarded, sniff
from winnow.perceptual_hash import perceptual_hash

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Pixels = NDArray[np.uint8]

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = frozenset({5, 6, 7, 8})
_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_BITS_PER_SAMPLE = 258  # the TIFF tag
_HASHED_BYTES = 2**20


@dataclass(frozen=True)
class View:
    """The pixels that a model wants.

    Attributes:
        resize: the shorter side in pixels (the longer is ``int(resize * long / short)``), an exact (height, width), or
            None to keep the size.
        crop: centre crop (height, width), padded with 0 where the image is smaller; None keeps everything.
        interpolation: how to resize; always antialiased, as Pillow does.
        fit: instead of both: scaled, keeping its shape, to fit into this (height, width), in the upper left corner.
        fill: colour (R, G, B) of what ``fit`` leaves free.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    fit: tuple[int, int] | None = None
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        sides = (*((self.resize,) if isinstance(self.resize, int) else self.resize or ()), *(self.crop or ()))
        if any(side < 1 for side in (*sides, *(self.fit or ()))):
            raise ValueError(f"a view's sides must be at least 1 pixel: {self}")
        if self.fit is not None and sides:
            raise ValueError(f"a view either fits or resizes and crops: {self}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation {self.interpolation!r} is unknown; choose {', '.join(get_args(Interpolation))}"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The view of a dict such as ``dataclasses.asdict`` makes, also after a way through JSON."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the pixels that come out; None where that depends on the image."""
        return self.fit or self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing and before cropping, as torchvision's ``_compute_resized_output_size``.

        With ``fit``, the part of the pixels that shows the image: the longer side fills, the other is rounded half up.
        """
        if self.fit is not None:
            most_high, most_wide = self.fit
            if width * most_high >= height * most_wide:
                return most_wide, max(1, (2 * height * most_wide + width) // (2 * width))
            return max(1, (2 * width * most_high + height) // (2 * height)), most_high
        if self.resize is None:
            return width, height
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)


@dataclass(frozen=True)
class DecodeLimits:
    """What one image may cost.

    Attributes:
        max_bytes: largest file.
        max_pixels: largest width × height, read from the header before any pixel is decoded.
        timeout_s: longest decoding; enforced by ``winnow.decoders`` only.
        max_memory_bytes: address space of a decoder process; enforced by ``winnow.decoders`` only.
    """

    max_bytes: int
    max_pixels: int
    timeout_s: float
    max_memory_bytes: int = 3 * 2**30


@dataclass(frozen=True)
class Header:
    """What the header announces; the orientation is applied where it stands before the pixels (JPEG, TIFF)."""

    width: int
    height: int
    format: str


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image.

    Attributes:
        width: of the source, after EXIF orientation.
        height: of the source, after EXIF orientation.
        format: Pillow's name of the format found in the bytes.
        views: one uint8 (H, W, 3) per view asked for, in their order; writable.
        warnings: what Pillow remarked, such as damaged metadata.
        pixel_hash: of size and pixels, see ``pixel_hash``; None unless asked, and None when JPEG was scaled.
        phash: 64-bit perceptual hash in hex, see ``winnow.perceptual_hash``; None unless asked.
    """

    width: int
    height: int
    format: str
    views: tuple[Pixels, ...]
    warnings: tuple[str, ...] = ()
    pixel_hash: str | None = None
    phash: str | None = None


@dataclass(frozen=True)
class Attempt:
    """One image or one error, and the header as far as it could be read."""

    header: Header | None
    image: DecodedImage | None
    error: DecodeError | None


def decode(data: bytes, *, limits: DecodeLimits, views: Sequence[View] = (), scaled: bool = False) -> DecodedImage:
    """The image in ``data``, as the views ask for it. See ``attempt``.

    Raises:
        DecodeError: the bytes cannot be decoded within the limits.
    """
    outcome = attempt(data, limits=limits, views=views, scaled=scaled)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.image is not None
    return outcome.image


def decode_rgb(data: bytes, limits: DecodeLimits) -> Pixels:
    """All pixels, uint8 (H, W, 3), EXIF orientation applied.

    Raises:
        DecodeError: the bytes cannot be decoded within the limits.
    """
    return decode(data, limits=limits, views=(View(),), scaled=False).views[0]


def attempt(
    data: bytes,
    *,
    limits: DecodeLimits,
    views: Sequence[View] = (),
    scaled: bool = False,
    fingerprints: bool = False,
) -> Attempt:
    """Decode and never raise for what is wrong with an image.

    All pixels are decoded even without views, so that a truncated file is found. One image at a time per process:
    Pillow keeps its limits, and Python its warning filters, in globals. Use ``winnow.decoders`` to decode in parallel.

    Args:
        data: the whole file.
        limits: ``max_bytes`` and ``max_pixels`` count here.
        views: what to make of it.
        scaled: let JPEG decode at 1/2, 1/4 or 1/8 size while that is at least twice what every view needs.
        fingerprints: also find ``pixel_hash`` and ``phash``.
    """
    header: Header | None = None
    with pillow_guarded() as remarks:
        try:
            _check_bytes(data, limits)
            image = open_image(data, limits.max_pixels, remarks)
            width, height = image.size
            if image.format in ("JPEG", "MPO") and _orientation(image) in _SWAPPING:
                width, height = height, width
            header = Header(width, height, image.format or "unknown")
            _check_pixels(width, height, limits)
            return Attempt(header, _render(image, header, limits, views, scaled, fingerprints, remarks), None)
        except DecodeError as error:
            return Attempt(header, None, error)
        except MemoryError:
            size = f"{header.width} x {header.height} pixels" if header else f"{len(data):,} bytes"
            message = f"decoding {size} needed more memory than a decoder process may use; scale the image down"
            return Attempt(header, None, DecodeError("out_of_memory", message))
        except FAULTS as error:
            return Attempt(header, None, explain(error, header.format if header else sniff(data) or "image", data))


# -------------------------------------------------------------------------------------------------------------- pixels


def _check_bytes(data: bytes, limits: DecodeLimits) -> None:
    if not data:
        raise DecodeError("empty", "the object has no bytes; upload it again")
    if len(data) > limits.max_bytes:
        raise DecodeError("too_many_bytes", f"{len(data):,} bytes are more than max_bytes = {limits.max_bytes:,}")


def _check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    if width < 1 or height < 1:
        raise DecodeError("corrupt", f"the header announces {width} x {height} pixels; replace the file")
    if width * height > limits.max_pixels:
        size = f"{width} x {height} = {width * height:,}"
        raise DecodeError("too_many_pixels", f"{size} pixels are more than max_pixels = {limits.max_pixels:,}")
    Image.MAX_IMAGE_PIXELS = (limits.max_pixels + 1) // 2  # Pillow refuses above twice this: pictures inside ICO, TIFF


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where the metadata is absent, damaged or holds another value."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return int(value) if value in _TRANSPOSE else 1
    except FAULTS:
        return 1


def _render(
    image: ImageFile.ImageFile,
    header: Header,
    limits: DecodeLimits,
    views: Sequence[View],
    scaled: bool,
    fingerprints: bool,
    remarks: list[warnings.WarningMessage],
) -> DecodedImage:
    source = image.size
    targets = [view.target(header.width, header.height) for view in views]
    if scaled and views and image.format in ("JPEG", "MPO"):
        need = 2 * max(width for width, _ in targets), 2 * max(height for _, height in targets)
        if _orientation(image) in _SWAPPING:
            need = need[::-1]
        # Rounded up by libjpeg; the true edge, between two of its pixels, is what resizing has to start from.
        drafted = image.draft(None, need) if all(2 * n <= side for n, side in zip(need, source, strict=True)) else None
        box = drafted[1] if drafted else None
    else:
        box = None
    image.load()
    if box is None:
        _check_pixels(*image.size, limits)
    Image.MAX_IMAGE_PIXELS = None  # every size below is asked for by a view
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    method = _TRANSPOSE.get(orientation)
    if box is None:
        rgb = rgb.transpose(method) if method is not None else rgb
        width, height = rgb.size
    else:
        width, height = header.width, header.height
    arrays = []
    for view in views:
        if box is not None:
            target = view.target(width, height)
            target = target[::-1] if orientation in _SWAPPING else target
            small = rgb.resize(target, _resampling(view), box=box)
            picture = _crop(small if method is None else small.transpose(method), view)
        else:
            picture = _crop(_resize(rgb, view, limits), view)
        arrays.append(np.array(picture, dtype=np.uint8))
    said = {str(remark.message): None for remark in remarks if _means_something(remark)}
    decoded = DecodedImage(width, height, header.format, tuple(arrays), tuple(said))
    if not fingerprints:
        return decoded
    if box is None:
        return replace(decoded, pixel_hash=pixel_hash(rgb), phash=perceptual_hash(rgb))
    rgb = rgb.crop((0, 0, round(box[2]), round(box[3])))
    return replace(decoded, phash=perceptual_hash(rgb if method is None else rgb.transpose(method)))


def pixel_hash(rgb: Image.Image) -> str:
    """Hex BLAKE2b-128 of "WIDTHxHEIGHT" and the pixels, row by row: the same in every lossless format."""
    digest = hashlib.blake2b(f"{rgb.width}x{rgb.height}".encode(), digest_size=16)
    num_rows = max(1, _HASHED_BYTES // (3 * rgb.width))
    for top in range(0, rgb.height, num_rows):  # in strips: a copy of all pixels could exceed a decoder's memory
        digest.update(rgb.crop((0, top, rgb.width, min(top + num_rows, rgb.height))).tobytes())
    return digest.hexdigest()


def _means_something(remark: warnings.WarningMessage) -> bool:
    """False for warnings about our own limits and about dropping transparency, which is what we document."""
    if issubclass(remark.category, (Image.DecompressionBombWarning, DeprecationWarning, ResourceWarning)):
        return False
    return not str(remark.message).startswith("Palette images with Transparency")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB: what Pillow's ``convert`` gives, except that deep grey is scaled to 8 bits and not clipped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        bits = image.getexif().get(_BITS_PER_SAMPLE) if image.format == "TIFF" else None
        return Image.fromarray(_to_8_bits(np.asarray(image), 12 if bits == 12 else 16)).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(grey: NDArray[Any], bits: int) -> Pixels:
    """Grey (H, W) as uint8: the high byte of 16 bits; [0, 1] of floats; else minimum to maximum."""
    finite = np.isfinite(grey)
    low, high = (float(grey[finite].min()), float(grey[finite].max())) if finite.any() else (0.0, 1.0)
    if np.issubdtype(grey.dtype, np.integer):
        if low >= 0 and high < 2**16:
            return np.asarray(grey >> (4 if bits == 12 and high < 2**12 else 8), dtype=np.uint8)
    elif low >= 0.0 and high <= 1.0:
        low, high = 0.0, 1.0
    floats = np.where(finite, grey, low).astype(np.float32)
    scaled = np.rint((floats - low) * (255.0 / ((high - low) or 1.0))).clip(0, 255)
    return np.asarray(scaled, dtype=np.uint8)


def _resampling(view: View) -> Image.Resampling:
    return Image.Resampling[view.interpolation.upper()]


def _resize(rgb: Image.Image, view: View, limits: DecodeLimits) -> Image.Image:
    """Resize as torchvision does. Of a picture that would exceed ``max_pixels``, only the part that the crop keeps."""
    width, height = view.target(*rgb.size)
    if (view.resize is None and view.fit is None) or width * height <= limits.max_pixels:
        return rgb if (width, height) == rgb.size else rgb.resize((width, height), _resampling(view))
    if view.crop is None:
        size = f"{rgb.width} x {rgb.height}"
        raise DecodeError("too_many_pixels", f"{size} resized to {width} x {height} is more than max_pixels; crop it")
    kept_height, kept_width = min(view.crop[0], height), min(view.crop[1], width)
    left, top = round((width - kept_width) / 2.0), round((height - kept_height) / 2.0)
    x, y = rgb.width / width, rgb.height / height
    box = left * x, top * y, min((left + kept_width) * x, rgb.width), min((top + kept_height) * y, rgb.height)
    return rgb.resize((kept_width, kept_height), _resampling(view), box=box)


def _crop(picture: Image.Image, view: View) -> Image.Image:
    """Centre crop as torchvision's ``center_crop``: padded with 0, then offsets rounded half to even. Or ``fit``."""
    if view.fit is not None:
        if picture.size == (view.fit[1], view.fit[0]):
            return picture
        canvas = Image.new("RGB", (view.fit[1], view.fit[0]), view.fill)
        canvas.paste(picture, (0, 0))
        return canvas
    if view.crop is None:
        return picture
    height, width = view.crop
    left_pad, top_pad = max(width - picture.width, 0) // 2, max(height - picture.height, 0) // 2
    padded_width, padded_height = max(width, picture.width), max(height, picture.height)
    left, top = round((padded_width - width) / 2.0) - left_pad, round((padded_height - height) / 2.0) - top_pad
    if (left, top, width, height) == (0, 0, *picture.size):
        return picture
    return picture.crop((left, top, left + width, top + height))  # Pillow fills what lies outside with 0
