"""Mask files and labels of pixels, from people and programs that keep to the rules and from others."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from winnow.errors import MaskError
from winnow.mask_files import read_label, read_png, write_png
from winnow.masks import encode, encode_classes
from winnow.palette import class_colours

CLASSES = ("background", "cat", "dog")
LABELS = np.array([[0, 1, 1, 2], [0, 0, 255, 2]], dtype=np.uint8)


def png(image: Image.Image, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, options.pop("format", "PNG"), **options)
    return sink.getvalue()


def no_file(uri: str) -> bytes:
    raise AssertionError(f"nobody asked for {uri}")


def of_file(data: bytes, *, width: int = 4, height: int = 2, classes: tuple[str, ...] = CLASSES) -> Any:
    def read(uri: str) -> bytes:
        assert uri == "s3://masks/1.png"
        return data

    return read_label('{"mask": "s3://masks/1.png"}', classes, width=width, height=height, read=read)


def of_segments(*segments: tuple[str, NDArray[np.bool_]], width: int = 4, height: int = 2) -> Any:
    value = json.dumps({"segments": [{"label": name, "rle": encode(mask)} for name, mask in segments]})
    return read_label(value, CLASSES, width=width, height=height, read=no_file)


# --------------------------------------------------------------------------------------------------------------- files


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_any_label_map_comes_back_from_its_file(labels: Any) -> None:
    found = read_png(write_png(labels, CLASSES), width=labels.shape[1], height=labels.shape[0])
    assert found.dtype == labels.dtype
    assert np.array_equal(found, labels)


def test_a_mask_file_shows_each_class_in_its_colour() -> None:
    with Image.open(io.BytesIO(write_png(LABELS, CLASSES))) as image:
        assert (image.mode, image.size) == ("P", (4, 2))
        shown = np.asarray(image.convert("RGB"))
    assert np.array_equal(shown[0], class_colours(CLASSES)[LABELS[0]])
    assert shown[1, 2].tolist() == [224, 224, 224]
    assert write_png(LABELS, CLASSES) == write_png(LABELS, CLASSES)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_few_bits_are_read(bits: int) -> None:
    labels = (np.arange(24).reshape(4, 6) % 2**bits).astype(np.uint8)
    image = Image.fromarray(labels).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([7] * 3 * 2**bits)
    assert np.array_equal(read_png(png(image, bits=bits), width=6, height=4), labels)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_few_and_many_bits_is_read(bits: int) -> None:
    """Written by hand: Pillow writes no grey of 2 and 4 bits, and stretches it when it reads."""
    import struct
    import zlib

    labels = np.arange(24).reshape(3, 8) % 2**bits
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in labels]
    else:
        ones = (labels[..., None] >> np.arange(bits)[::-1]) & 1
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in ones]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 3, bits, 0, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")
    assert np.array_equal(read_png(data, width=8, height=3), labels)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "its 0 bytes are no PNG"),
        (b"<html>", "are no PNG; masks must be PNG"),
        (png(Image.new("L", (4, 2)), format="JPEG"), "masks must be PNG, because JPEG changes the class ids"),
        (png(Image.new("RGB", (4, 2))), "PNG of mode RGB: colours, not class ids"),
        (png(Image.new("LA", (4, 2))), "PNG of mode LA"),
        (png(Image.new("L", (2, 4))), "the mask has 2 x 4 pixels, its image has 4 x 2"),
        (write_png(LABELS, CLASSES)[:-22], "the mask cannot be read: the PNG data ends before"),
        (write_png(LABELS, CLASSES)[:12] + bytes(60), "the PNG's header is damaged"),
        (write_png(LABELS, CLASSES)[:20], "the PNG data ends before"),
    ],
)
def test_a_file_that_is_no_mask_gets_a_clear_error(data: bytes, says: str) -> None:
    with pytest.raises(MaskError, match=says):
        read_png(data, width=4, height=2)


# -------------------------------------------------------------------------------------------------------------- labels


def test_a_label_names_a_file_of_class_ids() -> None:
    found = of_file(write_png(LABELS, CLASSES))
    assert found.dtype == np.uint8
    assert np.array_equal(found, LABELS)


def test_a_label_holds_segments_and_the_rest_is_not_labelled() -> None:
    found = of_segments(("cat", LABELS == 1), ("dog", LABELS == 2))
    assert found.tolist() == [[255, 1, 1, 2], [255, 255, 255, 2]]
    assert found.dtype == np.uint8
    assert of_segments(("cat", LABELS < 9), ("dog", LABELS == 2))[0].tolist() == [1, 1, 1, 2]


def test_a_label_without_segments_labels_nothing() -> None:
    assert of_segments().tolist() == [[255] * 4] * 2


def test_two_bytes_for_many_classes_keep_what_is_not_labelled() -> None:
    many = tuple(map(str, range(300)))
    assert of_file(write_png(LABELS, many), classes=many)[1].tolist() == [0, 0, 65535, 2]
    large = np.array([[0, 299, 65535, 3]], dtype=np.uint16)
    found = of_file(write_png(large, many), classes=many, height=1)
    assert np.array_equal(found, large)
    few = of_file(write_png(np.array([[0, 2, 65535, 1]], dtype=np.uint16), CLASSES), height=1)
    assert (few.dtype, few.tolist()) == (np.uint8, [[0, 2, 255, 1]])


def test_a_value_that_is_no_class_is_named_with_its_place() -> None:
    labels = LABELS.copy()
    labels[1, 3] = 7
    with pytest.raises(
        MaskError, match=r"the value 7 \(first at x 3, y 1\), which is no class: there are 3.*255 means"
    ):
        of_file(write_png(labels, CLASSES))


def test_segments_that_do_not_fit_are_named() -> None:
    with pytest.raises(MaskError, match="class 'cow' is unknown; the classes are 'background', 'cat', 'dog'"):
        of_segments(("cow", LABELS == 1))
    with pytest.raises(MaskError, match="the mask of 'cat' has 4 x 2 pixels, its image has 2 x 4"):
        of_segments(("cat", LABELS == 1), width=2, height=4)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("cat", "the label is not JSON: 'cat'"),
        ("", "not JSON"),
        ("[]", "a label of pixels is"),
        ("{}", "a label of pixels is"),
        ('{"mask": ""}', "a label of pixels is"),
        ('{"mask": 3}', "a label of pixels is"),
        ('{"mask": "a.png", "segments": []}', "a label of pixels is"),
        ('{"segments": {}}', "a label of pixels is"),
        ('{"segments": [{"label": "cat"}]}', "a label of pixels is"),
        ('{"segments": [{"label": "cat", "rle": {"counts": "8"}}]}', r"needs its size as \[height, width\]"),
        ('{"segments": [{"label": "cat", "rle": {"size": [2, 4], "counts": "9"}}]}', "covers 9 pixels"),
    ],
)
def test_a_malformed_label_gets_a_clear_error(value: str, says: str) -> None:
    with pytest.raises(MaskError, match=says):
        read_label(value, CLASSES, width=4, height=2, read=no_file)


def test_real_masks_are_read_as_they_are(shared_data: Path) -> None:
    folder = shared_data / "segmentation" / "nuclei"
    files = sorted((folder / "masks").rglob("*.png"))
    assert len(files) == 170
    for file in files:
        with Image.open(file) as image:
            expected = np.asarray(image)
        value = json.dumps({"mask": str(file)})
        size = {"width": expected.shape[1], "height": expected.shape[0]}
        found = read_label(value, ("background", "nucleus"), **size, read=lambda uri: Path(uri).read_bytes())
        assert np.array_equal(found, expected)
        segments = [
            {"label": ("background", "nucleus")[entry.value], "rle": entry.rle} for entry in encode_classes(found)
        ]
        again = read_label(json.dumps({"segments": segments}), ("background", "nucleus"), **size, read=no_file)
        assert np.array_equal(again, expected)
