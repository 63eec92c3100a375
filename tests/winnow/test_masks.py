"""Masks and label maps: byte for byte as pycocotools, back again, and where they lie on the image."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pycocotools import mask as coco

from winnow.errors import MaskError
from winnow.masks import (
    box_to_source,
    decode,
    encode,
    encode_classes,
    label_dtype,
    label_map,
    resize_to_source,
    unlabelled,
)

SHAPES = st.one_of(
    st.just((1, 1)),
    st.tuples(st.just(1), st.integers(1, 300)),
    st.tuples(st.integers(1, 300), st.just(1)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
ODD_SHAPES = [(1, 1), (1, 7), (7, 1), (1, 1000), (1000, 1), (3, 5), (5, 3), (31, 33), (97, 101), (520, 333)]


def blobs(height: int, width: int, num_classes: int, seed: int = 0, num_blobs: int = 60) -> NDArray[np.uint8]:
    """A label map of overlapping discs."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((height, width), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(num_blobs):
        y, x, radius = generator.integers(height), generator.integers(width), generator.integers(2, 2 + height // 6)
        labels[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = generator.integers(num_classes)
    return labels


def by_pycocotools(mask: NDArray[np.bool_]) -> dict[str, Any]:
    found = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(found["size"]), "counts": found["counts"].decode("ascii")}


def check(mask: NDArray[np.bool_]) -> None:
    rle = encode(mask)
    assert rle == by_pycocotools(mask)
    assert np.array_equal(decode(rle), mask)
    assert np.array_equal(decode({**rle, "counts": rle["counts"].encode()}), mask)  # as pycocotools gives it
    assert np.array_equal(coco.decode(rle).astype(bool), mask)


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.bool_, SHAPES))
def test_any_mask_is_encoded_as_pycocotools_does_and_comes_back(mask: NDArray[np.bool_]) -> None:
    check(mask)


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_empty_full_chequered_and_random_masks_of_odd_shapes(shape: tuple[int, int]) -> None:
    check(np.zeros(shape, dtype=bool))
    check(np.ones(shape, dtype=bool))
    check(np.indices(shape).sum(axis=0) % 2 == 0)
    for share in (0.01, 0.5, 0.99):
        check(np.random.default_rng(1).random(shape) < share)


def test_runs_of_millions_of_pixels_and_their_large_differences() -> None:
    mask = np.zeros((3000, 4001), dtype=bool)
    check(mask)
    mask[5, 7] = mask[2999, 4000] = True
    mask[:, 100:3000] = True
    check(mask)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_layout_in_memory_does_not_matter(order: Any) -> None:
    mask = blobs(33, 57, 2).astype(bool)
    assert encode(np.asarray(mask, order=order)) == by_pycocotools(mask)
    assert encode(mask[::2, ::3]) == by_pycocotools(mask[::2, ::3])
    assert decode(encode(mask)).flags.c_contiguous


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(st.sampled_from([np.uint8, np.uint16]), SHAPES, elements=st.integers(0, 5) | st.just(255)))
def test_one_pass_finds_every_class_with_its_pixels_and_box(labels: Any) -> None:
    found = encode_classes(labels)
    assert [entry.value for entry in found] == np.unique(labels).tolist()
    for entry in found:
        expected = by_pycocotools(labels == entry.value)
        assert entry.rle == expected
        assert entry.num_pixels == coco.area(expected)
        assert entry.box == tuple(coco.toBbox(expected))
    assert sum(entry.num_pixels for entry in found) == labels.size


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 4)))
def test_a_label_map_comes_back_from_its_segments(labels: NDArray[np.uint8]) -> None:
    classes = [f"class {number}" for number in range(5)]
    segments = [(classes[entry.value], entry.rle) for entry in encode_classes(labels)]
    for order in (segments, segments[::-1]):
        found = label_map(order, classes)
        assert (found.dtype, found.flags.c_contiguous) == (np.uint8, True)
        assert np.array_equal(found, labels)


def test_pixels_of_no_segment_are_not_labelled_and_later_segments_cover_earlier_ones() -> None:
    low, high = np.zeros((2, 4), dtype=bool), np.zeros((2, 4), dtype=bool)
    low[:, :3] = high[0, 2:] = True
    found = label_map([("a", encode(low)), ("b", encode(high))], ["b", "a"])
    assert found.tolist() == [[1, 1, 0, 0], [1, 1, 1, 255]]
    assert unlabelled(found) == 255


def test_more_classes_than_a_byte_holds_get_two() -> None:
    assert (label_dtype(255), label_dtype(256)) == (np.uint8, np.uint16)
    classes = [str(number) for number in range(300)]
    labels = np.arange(300, dtype=np.uint16).reshape(20, 15)
    found = label_map([(classes[entry.value], entry.rle) for entry in encode_classes(labels)], classes)
    assert found.dtype == np.uint16
    assert np.array_equal(found, labels)
    with pytest.raises(ValueError, match="70,000 classes"):
        label_dtype(70_000)


@pytest.mark.parametrize(
    ("rle", "says"),
    [
        ({"size": [2, 2], "counts": ""}, "needs its counts as text"),
        ({"size": [2, 2], "counts": None}, "needs its counts as text; they are None"),
        ({"size": [2, 2], "counts": [4]}, "needs its counts as text"),
        ({"size": [2, 2]}, "needs its counts"),
        ({"size": [2, 2], "counts": "5"}, "covers 5 pixels, but its size 2 x 2 has 4"),
        ({"size": [2, 2], "counts": "3"}, "covers 3 pixels"),
        ({"size": [2, 2], "counts": "ooo"}, "end within a number: the run-length encoding was cut off"),
        ({"size": [2, 2], "counts": "oooooooo0"}, "a number of 9 characters"),
        ({"size": [2, 2], "counts": "o"}, "cut off"),
        ({"size": [2, 2], "counts": "4 "}, "character 2 of the counts, 0x20"),
        ({"size": [2, 2], "counts": "é"}, "character 1 of the counts"),
        ({"size": [2, 2], "counts": "O5"}, "run 1 of the encoding has the length -1"),
        ({"size": [2], "counts": "4"}, r"needs its size as \[height, width\]"),
        ({"size": [2, -2], "counts": "4"}, "needs its size"),
        ({"size": [0, 4], "counts": "0"}, "needs its size"),
        ({"size": "22", "counts": "4"}, "needs its size"),
        ({"counts": "4"}, "it is None"),
        ({"size": [100_000, 100_000], "counts": "4"}, "more than a run-length encoding can hold"),
        ("4", "needs its size"),
    ],
)
def test_a_malformed_encoding_gets_a_clear_error(rle: Any, says: str) -> None:
    with pytest.raises(MaskError, match=says):
        decode(rle)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30), st.integers(1, 9), st.integers(1, 9))
def test_no_text_does_worse_than_an_error(text: str, height: int, width: int) -> None:
    try:
        mask = decode({"size": [height, width], "counts": text})
    except MaskError:
        return
    assert mask.shape == (height, width)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(2, 40), st.integers(2, 40))), st.data())
def test_a_cut_off_encoding_is_never_taken_for_a_whole_one(mask: NDArray[np.bool_], data: Any) -> None:
    rle = encode(mask)
    cut = data.draw(st.integers(0, len(rle["counts"]) - 1))
    with pytest.raises(MaskError):
        decode({**rle, "counts": rle["counts"][:cut]})


def test_segments_that_do_not_belong_together_get_a_clear_error() -> None:
    square, tall = encode(np.ones((2, 2), dtype=bool)), encode(np.ones((3, 2), dtype=bool))
    with pytest.raises(MaskError, match="class 'cow' is unknown; the classes are 'cat', 'dog'"):
        label_map([("cow", square)], ["cat", "dog"])
    with pytest.raises(MaskError, match="the mask of 'dog' has 2 x 3 pixels, the one before it 2 x 2"):
        label_map([("cat", square), ("dog", tall)], ["cat", "dog"])
    with pytest.raises(MaskError, match="without segments"):
        label_map([], ["cat"])


def test_wrong_arrays_are_refused() -> None:
    for wrong in (np.zeros((2, 2), np.uint8), np.zeros((0, 4), bool), np.zeros(4, bool), np.zeros((1, 2, 2), bool)):
        with pytest.raises(ValueError, match="mask"):
            encode(wrong)
    with pytest.raises(ValueError, match="uint8 or uint16, not int64"):
        encode_classes(np.zeros((2, 2), np.int64))


# --------------------------------------------------------------------------------------------------------- source image


@settings(max_examples=200, deadline=None)
@given(*[st.integers(1, 30)] * 4)
def test_each_pixel_of_the_image_takes_the_value_that_covers_its_centre(
    mask_height: int, mask_width: int, height: int, width: int
) -> None:
    labels = np.arange(mask_height * mask_width, dtype=np.uint16).reshape(mask_height, mask_width)
    found = resize_to_source(labels, width, height)
    assert (found.shape, found.dtype) == ((height, width), np.uint16)
    for y in range(height):
        for x in range(width):
            row, column = divmod(int(found[y, x]), mask_width)
            # docs/tables.md: mask pixel (column, row) covers from column * W / w on; in whole numbers.
            assert 2 * column * width <= (2 * x + 1) * mask_width < 2 * (column + 1) * width
            assert 2 * row * height <= (2 * y + 1) * mask_height < 2 * (row + 1) * height


def test_whole_factors_repeat_every_pixel() -> None:
    labels = blobs(26, 39, 5)
    assert np.array_equal(resize_to_source(labels, 39 * 3, 26 * 2), labels.repeat(2, axis=0).repeat(3, axis=1))
    assert np.array_equal(resize_to_source(labels, 39, 26), labels)


def test_a_box_lies_around_the_enlarged_mask() -> None:
    labels = np.zeros((10, 20), dtype=np.uint8)
    labels[3:5, 7:12] = 1
    _, entry = encode_classes(labels)
    assert box_to_source(entry.box, (20, 10), (640, 480)) == (224.0, 144.0, 160.0, 96.0)
    _, large = encode_classes(resize_to_source(labels, 640, 480))
    assert large.box == (224, 144, 160, 96)


# --------------------------------------------------------------------------------------------------------------- speed


def test_a_map_of_21_classes_is_encoded_fast_enough_to_go_unnoticed() -> None:
    labels = blobs(520, 520, 21)
    assert len(encode_classes(labels)) > 15
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        encode_classes(labels)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.01, f"{1000 * min(seconds):.1f} ms"
