"""Label Studio's run-length encoding: its own converter's bytes, and every mask comes back pixel by pixel."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from winnow.errors import MaskError
from winnow_connectors import brush

# What label_studio_sdk 2.1.2 makes of them: converter.brush.mask2rle(255 * np.uint8(mask)).
GOLDEN = [
    (np.eye(3, dtype=np.bool_), [0, 0, 0, 36, 57, 27, 252, 127, 246, 192, 35, 255, 182, 1, 31, 248]),
    (np.ones((150, 200), dtype=np.bool_), [0, 1, 212, 192, 57, 27, 255, 255, 255, 255, 250, 151, 255, 224]),
]
masks = st.tuples(st.integers(1, 60), st.integers(1, 60)).flatmap(lambda size: arrays.arrays(np.bool_, size))


def _pack(words: np.ndarray, *, literal: bool) -> list[int]:
    """The encoding of RGBA words, written bit by bit as the format's specification reads."""
    bits = f"{words.size:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    if literal:
        for start in range(0, words.size, 256):
            part = words[start : start + 256]
            bits += f"010{part.size - 1:08b}" + "".join(f"{word:08b}" for word in part)
    else:
        bits += "".join(f"100000{word:08b}" for word in words)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


@pytest.mark.parametrize(("mask", "rle"), GOLDEN)
def test_the_bytes_are_those_of_label_studios_own_converter(mask: np.ndarray, rle: list[int]) -> None:
    assert brush.encode(mask) == rle
    assert np.array_equal(brush.decode(rle, width=mask.shape[1], height=mask.shape[0]), mask)


@given(masks)
def test_every_mask_comes_back_pixel_by_pixel(mask: np.ndarray) -> None:
    height, width = mask.shape
    assert np.array_equal(brush.decode(brush.encode(mask), width=width, height=height), mask)


def test_runs_longer_than_a_count_can_say_are_split() -> None:
    mask = np.zeros((700, 900), dtype=np.bool_)
    mask[100:600] = True
    assert np.array_equal(brush.decode(brush.encode(mask), width=900, height=700), mask)


@settings(max_examples=50)
@given(arrays.arrays(np.uint8, (7, 9)), st.booleans())
def test_half_transparent_edges_count_from_half_on(alpha: np.ndarray, literal: bool) -> None:
    words = np.repeat(alpha.reshape(-1), 4)
    found = brush.decode(_pack(words, literal=literal), width=9, height=7)
    assert np.array_equal(found, alpha >= 128)


def test_only_the_opacity_counts_and_not_the_colour() -> None:
    words = np.array([[255, 0, 0, 0], [0, 0, 0, 255], [0, 200, 9, 255]], dtype=np.uint8).reshape(-1)
    assert brush.decode(_pack(words, literal=True), width=3, height=1).tolist() == [[False, True, True]]


@given(masks, st.data())
def test_damaged_bytes_are_an_error_or_a_mask_of_the_right_size(mask: np.ndarray, data: st.DataObject) -> None:
    height, width = mask.shape
    rle = brush.encode(mask)
    place = data.draw(st.integers(0, len(rle) - 1))
    damaged = rle[:place] + data.draw(st.lists(st.integers(0, 255), max_size=5)) + rle[place + 1 :]
    with contextlib.suppress(MaskError):
        assert brush.decode(damaged, width=width, height=height).shape == (height, width)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ([], "no room for its header"),
        ([0, 0, 0, 36], "no room for its header"),
        ([300], "list of bytes"),
        (GOLDEN[0][1][:12], "was cut off"),
        ([0, 0, 0, 40, *GOLDEN[0][1][4:]], "10 pixels, its image of 3 x 3 has 9"),
        ([0, 0, 0, 36, 121, *GOLDEN[0][1][5:]], "has 16"),
    ],
)
def test_malformed_masks_are_told(rle: list[int], message: str) -> None:
    with pytest.raises(MaskError, match=message):
        brush.decode(rle, width=3, height=3)


@pytest.mark.parametrize("mask", [np.zeros((0, 3), np.bool_), np.zeros((2, 2), np.uint8), np.zeros(4, np.bool_)])
def test_what_is_no_mask_is_not_encoded(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a mask is bool"):
        brush.encode(mask)
