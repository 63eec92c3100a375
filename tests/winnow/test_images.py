"""Decoding: geometry, colour, orientation, limits and failures, on real photographs."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageCms, ImageFile, ImageOps, features
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from winnow.errors import FAILURE_KINDS, DecodeError
from winnow.images import DecodeLimits, View, attempt, decode, decode_rgb, pixel_hash
from winnow.perceptual_hash import as_integers, hamming

LIMITS = DecodeLimits(max_bytes=50_000_000, max_pixels=50_000_000, timeout_s=20.0)
PHOTOGRAPHS: dict[str, Callable[[], Any]] = {
    name: getattr(skimage.data, name) for name in ("astronaut", "coffee", "chelsea", "rocket", "camera")
}


def photograph(name: str = "chelsea", size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.fromarray(PHOTOGRAPHS[name]()).convert("RGB")
    return image if size is None else image.resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("needs Pillow with AVIF")
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def expected(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def torchvision_view(data: bytes, view: View) -> np.ndarray:
    image = Image.fromarray(expected(data))
    if view.resize is not None:
        size = [view.resize] if isinstance(view.resize, int) else list(view.resize)
        image = F.resize(image, size, InterpolationMode(view.interpolation))
    return np.asarray(image if view.crop is None else F.center_crop(image, list(view.crop)))


def failure(data: bytes, limits: DecodeLimits = LIMITS) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode(data, limits=limits)
    assert caught.value.kind in FAILURE_KINDS
    assert " at 0x" not in caught.value.message
    return caught.value


VIEWS = (
    View(256, (224, 224)),
    View(232, (224, 224)),
    View(236, (224, 224), "bicubic"),
    View(224, (224, 224), "nearest"),
    View(248, (248, 248), "lanczos"),
    View((240, 320), (224, 224)),
    View(255, (224, 191), "bicubic"),
    View(64, (100, 71)),
    View(None, (333, 1001)),
    View(64),
    View(),
)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_views_are_torchvisions_bit_for_bit(name: str, kind: str) -> None:
    data = encode(photograph(name), kind)
    decoded = decode(data, limits=LIMITS, views=VIEWS, scaled=False)
    assert (decoded.width, decoded.height) == photograph(name).size
    assert decoded.format == kind
    for view, pixels in zip(VIEWS, decoded.views, strict=True):
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        np.testing.assert_array_equal(pixels, torchvision_view(data, view), err_msg=str(view))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (223, 225), (255, 256), (257, 511), (300, 301), (1000, 12), (7, 400)])
def test_views_are_torchvisions_at_awkward_sizes(size: tuple[int, int]) -> None:
    data = encode(photograph("coffee", size), "PNG")
    views = [view for view in VIEWS if view.resize != 64 or view.crop is not None]
    for view, pixels in zip(views, decode(data, limits=LIMITS, views=views).views, strict=True):
        np.testing.assert_array_equal(pixels, torchvision_view(data, view), err_msg=str(view))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50", "efficientnet_b0", "vit_b_16"])
def test_views_are_what_torchvisions_weights_ask_for(name: str) -> None:
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    view = View(preset.resize_size[0], (preset.crop_size[0],) * 2, preset.interpolation.value)
    data = encode(photograph("astronaut"), "JPEG")
    pixels = decode(data, limits=LIMITS, views=(view,), scaled=False).views[0]
    ours = F.normalize(F.convert_image_dtype(F.to_tensor(pixels)), preset.mean, preset.std)
    assert (ours == preset(Image.fromarray(expected(data)))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(), kind, exif=exif)
    decoded = decode(data, limits=LIMITS, views=(View(), View(256, (224, 224))), scaled=False)
    reference = expected(data)
    assert (decoded.height, decoded.width) == reference.shape[:2]
    np.testing.assert_array_equal(decoded.views[0], reference)
    np.testing.assert_array_equal(decoded.views[1], torchvision_view(data, View(256, (224, 224))))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_illegal_orientation_counts_as_none(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(), "JPEG", exif=exif)
    np.testing.assert_array_equal(decode_rgb(data, LIMITS), expected(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_keeps_the_picture_in_place(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Sides that 8 does not divide: half a pixel of shift would show.
    data = encode(photograph("astronaut", (2051, 1539)), "JPEG", quality=92, exif=exif)
    views = (View(64, (56, 56)), View((60, 60)), View(100, (120, 90), "bicubic"))
    exact = decode(data, limits=LIMITS, views=views, scaled=False)
    scaled = decode(data, limits=LIMITS, views=views, scaled=True)
    assert (scaled.width, scaled.height) == (exact.width, exact.height)
    for ours, reference in zip(scaled.views, exact.views, strict=True):
        assert ours.shape == reference.shape
        assert np.abs(ours.astype(int) - reference).mean() < 0.6


def test_jpeg_is_scaled_only_when_twice_the_need_remains() -> None:
    view = View(200, (190, 190))
    for side, is_scaled in ((799, False), (800, True)):
        data = encode(photograph("astronaut", (side, side)), "JPEG")
        exact = decode(data, limits=LIMITS, views=(view,), scaled=False).views[0]
        assert np.array_equal(decode(data, limits=LIMITS, views=(view,), scaled=True).views[0], exact) is not is_scaled
        # The most demanding view decides, and a view of the whole picture forbids it.
        for demanding in (View(401), View()):
            both = decode(data, limits=LIMITS, views=(view, demanding), scaled=True).views[0]
            np.testing.assert_array_equal(both, exact)


def test_extreme_shapes_do_not_cost_memory() -> None:
    data = encode(photograph("rocket", (1, 6000)), "PNG")
    view = View(256, (224, 224))  # whole, this would be 256 x 1,536,000 pixels
    assert decode(data, limits=LIMITS, views=(view,)).views[0].shape == (224, 224, 3)
    assert "crop" in str(attempt(data, limits=LIMITS, views=(View(256),)).error)


def test_resizing_only_the_cropped_part_gives_the_same_pixels() -> None:
    data = encode(photograph("rocket", (90, 60)), "PNG")
    for view in (View(200, (180, 180)), View(200, (350, 100), "bicubic")):
        part = decode(data, limits=DecodeLimits(10**6, 90 * 60, 9.0), views=(view,)).views[0]
        whole = decode(data, limits=LIMITS, views=(view,)).views[0]
        assert np.abs(part.astype(int) - whole).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_modes_become_what_pillows_convert_gives(mode: str) -> None:
    if mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(photograph(), lab)
    elif mode in ("LA", "RGBA"):
        image = photograph()
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image = image.convert(mode)
    else:
        image = photograph().convert(mode)
    data = encode(image, "PNG" if mode in ("1", "L", "LA", "P", "RGBA") else "TIFF")
    np.testing.assert_array_equal(decode_rgb(data, LIMITS), expected(data))


def test_transparent_palettes_give_no_warning() -> None:
    data = encode(photograph().quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))
    decoded = decode(data, limits=LIMITS, views=(View(),))
    assert decoded.warnings == ()
    assert decoded.views[0].shape == (300, 451, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_sixteen_bits_keep_their_high_byte(kind: str) -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode_rgb(encode(Image.fromarray(deep), kind), LIMITS)
    np.testing.assert_array_equal(pixels, np.repeat((deep >> 8)[:, :, None], 3, axis=2))


def test_floats_and_32_bits_are_stretched_not_clipped() -> None:
    grey = np.linspace(0.0, 1.0, 256, dtype=np.float32).reshape(16, 16)
    for values in (grey, grey * 7000.0 - 3500.0, (grey * 2e9).astype(np.int32)):
        pixels = decode_rgb(encode(Image.fromarray(values), "TIFF"), LIMITS)
        np.testing.assert_array_equal(pixels[:, :, 0].ravel(), np.arange(256))
    holes = np.where(grey > 0.5, np.nan, grey).astype(np.float32)
    assert decode_rgb(encode(Image.fromarray(holes), "TIFF"), LIMITS)[-1, -1].tolist() == [0, 0, 0]
    assert not decode_rgb(encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), LIMITS).any()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    first, second = photograph("chelsea", (64, 48)), photograph("coffee", (64, 48))
    data = encode(first, kind, save_all=True, append_images=[second] * 3)
    np.testing.assert_array_equal(decode_rgb(data, LIMITS), expected(data))
    assert np.abs(decode_rgb(data, LIMITS).astype(int) - np.asarray(first)).mean() < 12


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("AVIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("BMP", {}),
        ("PPM", {}),
        ("JPEG2000", {}),
        ("ICO", {"sizes": [(96, 96)]}),
        ("TGA", {}),
        ("TGA", {"compression": "tga_rle"}),
    ],
)
def test_a_truncated_file_fails_and_is_never_grey(kind: str, options: dict[str, Any]) -> None:
    data = encode(photograph(size=(160, 120)), kind, **options)
    assert decode(data, limits=LIMITS).format == kind
    for share in (0.05, 0.3, 0.6, 0.9, 0.98):
        error = failure(data[: int(len(data) * share)])
        assert error.kind in ("truncated", "corrupt")
        assert kind in error.message
        if kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP"):
            assert error.kind == "truncated"


def test_limits_are_read_from_the_header() -> None:
    small = DecodeLimits(max_bytes=1_000_000, max_pixels=160 * 120 - 1, timeout_s=1.0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        # All pixels are missing; still, the size is the reason.
        data = encode(photograph(size=(160, 120)), kind, **({"lossless": True} if kind == "WEBP" else {}))
        error = failure(data if kind in ("WEBP", "TIFF") else data[: len(data) // 2], small)
        assert error.kind == "too_many_pixels"
        assert "19,2" in error.message or "19200" in error.message
    outcome = attempt(encode(photograph(size=(160, 120)), "JPEG"), limits=small)
    assert outcome.header is not None
    assert (outcome.header.width, outcome.header.height, outcome.header.format) == (160, 120, "JPEG")
    assert failure(bytes(11), DecodeLimits(10, 10, 1.0)).kind == "too_many_bytes"
    assert failure(b"").kind == "empty"


def test_a_picture_inside_an_icon_is_held_to_the_limit() -> None:
    data = bytearray(encode(photograph(size=(256, 256)), "ICO", sizes=[(256, 256)]))
    data[6:8] = b"\x08\x08"  # the directory says 8 x 8
    error = failure(bytes(data), DecodeLimits(10**6, 100 * 100, 1.0))
    assert error.kind in ("too_many_pixels", "corrupt")


@pytest.mark.parametrize(
    ("data", "kind", "word"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "unsupported", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(99), "unsupported", "MP4"),
        (b"%PDF-1.7\n" + bytes(99), "unsupported", "PDF"),
        (b"8BPS\0\x01" + bytes(99), "unsupported", "PSD"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "unsupported", "EPS"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "unsupported", "SVG"),
        (b"\xff\x0a" + bytes(99), "unsupported", "JPEG XL"),
        (b"<!DOCTYPE html><html>", "not_an_image", "HTML"),
        (b'<?xml version="1.0"?><Error>', "not_an_image", "XML"),
        (b'{"error": "denied"}', "not_an_image", "JSON"),
        (b"PK\x03\x04" + bytes(99), "not_an_image", "archive"),
        (b"\x80\x04\x95" + bytes(99), "not_an_image", "pickle"),
        (bytes(4096), "not_an_image", "NUL"),
        (b"hello", "not_an_image", "5 bytes"),
    ],
)
def test_what_is_not_decoded_is_named(data: bytes, kind: str, word: str) -> None:
    error = failure(data)
    assert error.kind == kind
    assert word in error.message


def test_pillows_globals_and_warnings_do_not_leak() -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.WARN_POSSIBLE_FORMATS
    big = encode(Image.new("1", (11_000, 9_000)), "PNG")  # Pillow alone warns above 89 megapixels
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decoded = decode(big, limits=DecodeLimits(10**8, 10**8, 1.0), views=(View(64, (64, 64)),))
        failure(big)
    assert seen == []
    assert decoded.warnings == ()
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, Image.WARN_POSSIBLE_FORMATS)


@pytest.mark.parametrize(
    "arguments", [{"resize": 0}, {"crop": (0, 5)}, {"resize": (3, -1)}, {"resize": 8, "interpolation": "cubic"}]
)
def test_an_impossible_view_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"pixel|choose"):
        View(**arguments)


# -------------------------------------------------------------------------------------------------------- fingerprints


def fingerprints(data: bytes, *views: View, scaled: bool = False) -> tuple[str | None, str | None]:
    image = attempt(data, limits=LIMITS, views=views, scaled=scaled, fingerprints=True).image
    assert image is not None
    return image.pixel_hash, image.phash


def test_a_picture_has_one_pixel_hash_in_every_lossless_format() -> None:
    image = photograph(size=(301, 97))
    hashes = {fingerprints(encode(image, kind))[0] for kind in ("PNG", "BMP", "TIFF", "PPM")}
    hashes.add(fingerprints(encode(image, "WEBP", lossless=True))[0])
    expected_hash = hashlib.blake2b(b"301x97" + np.asarray(image).tobytes(), digest_size=16).hexdigest()
    assert hashes == {expected_hash}
    turned = image.transpose(Image.Transpose.ROTATE_90)
    assert fingerprints(encode(turned, "PNG"))[0] != expected_hash


def test_fingerprints_are_of_the_upright_picture() -> None:
    image = photograph(size=(300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = image.transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    assert fingerprints(encode(stored, "PNG", exif=exif)) == fingerprints(encode(image, "PNG"))


def test_pixel_hash_of_a_large_picture_is_taken_in_strips() -> None:
    image = photograph(size=(1501, 1203))
    digest = hashlib.blake2b(b"1501x1203" + np.asarray(image).tobytes(), digest_size=16).hexdigest()
    assert pixel_hash(image) == digest


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_that_was_scaled_has_a_perceptual_hash_only(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(size=(1601, 1203)), "JPEG", quality=90, exif=exif)
    exact, scaled = fingerprints(data, View(64)), fingerprints(data, View(64), scaled=True)
    assert exact[0] is not None
    assert scaled[0] is None
    assert exact[1] is not None
    assert scaled[1] is not None
    assert hamming(as_integers([exact[1]]), as_integers([scaled[1]]))[0] <= 4


def test_fingerprints_are_taken_only_when_asked() -> None:
    image = decode(encode(photograph(), "PNG"), limits=LIMITS)
    assert (image.pixel_hash, image.phash) == (None, None)
