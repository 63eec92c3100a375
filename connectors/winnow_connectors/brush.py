"""Masks in the form of Label Studio's brush: a run-length encoding that is not COCO's.

Legend: a mask is bool (h, w). Label Studio keeps a brush region as the R, G, B and A of each pixel, row by row, packed
with @thi.ng/rle-pack (https://github.com/thi-ng/umbrella, packages/rle-pack), and writes the bytes as a list of
numbers.

Bits, most significant first: 32 for the number of words, 5 for the bits of a word less 1, four times 4 for the sizes
less 1 of a count; then until all words are there: 1 bit (a run, or words as they are), 2 bits that choose a size, as
many bits for the count less 1, and the one word or the words themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from winnow.errors import MaskError
from winnow.masks import Mask

_WORD_BITS = 8
_SIZES = (3, 4, 8, 16)
"""Bits of a count, in four choices; those that Label Studio writes."""

_HEADER_BITS = 32 + 5 + 4 * 4
_LONGEST = 2 ** _SIZES[-1]
_MAX_WORDS = 2**32 - 1
_VISIBLE = 128
"""Least opacity, of 255, of a pixel that counts as painted: the edge of a stroke drawn by hand is half transparent."""


def encode(mask_HW: Mask) -> list[int]:
    """A mask as Label Studio draws it, fully opaque.

    Args:
        mask_HW: bool (h, w), of at least one pixel.

    Raises:
        ValueError: another type or shape.
        MaskError: more pixels than the encoding can count.
    """
    if mask_HW.dtype != np.bool_ or mask_HW.ndim != 2 or mask_HW.size == 0:
        raise ValueError(f"a mask is bool (height, width), both at least 1; not {mask_HW.dtype} {mask_HW.shape}")
    if 4 * mask_HW.size > _MAX_WORDS:
        raise MaskError(f"{mask_HW.size:,} pixels are more than a brush mask can hold ({_MAX_WORDS // 4:,})")
    flat = np.ascontiguousarray(mask_HW).reshape(-1)
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate(([0], borders))
    lengths = 4 * np.diff(np.concatenate((starts, [flat.size])))
    words = np.where(flat[starts], 255, 0)
    num_pieces = -(-lengths // _LONGEST)
    counts = np.full(num_pieces.sum(), _LONGEST)
    counts[np.cumsum(num_pieces) - 1] = lengths - (num_pieces - 1) * _LONGEST
    words = np.repeat(words, num_pieces)
    choices = np.searchsorted([2**size for size in _SIZES], counts)
    sizes = np.array(_SIZES)[choices]
    codes = ((0b100 | choices) << sizes | (counts - 1)) << _WORD_BITS | words
    bits = np.concatenate((_header(4 * flat.size), _bits(codes, 3 + sizes + _WORD_BITS)))
    found: list[int] = np.packbits(bits).tolist()
    return found


def decode(rle: Sequence[int], *, width: int, height: int) -> Mask:
    """The painted pixels of a brush region, bool (h, w).

    Args:
        rle: the bytes as numbers.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Raises:
        MaskError: malformed, or made for another size.
    """
    try:
        data = bytes(rle)
    except (TypeError, ValueError):
        raise MaskError(f"a brush mask is a list of bytes, 0 to 255; it is {rle!r:.80}") from None
    words = np.frombuffer(_unpack(data, 4 * width * height, f"{width} x {height}"), dtype=np.uint8)
    painted: Mask = words.reshape(height, width, 4)[..., 3] >= _VISIBLE
    return painted


def _header(num_words: int) -> NDArray[np.bool_]:
    fields = [num_words, _WORD_BITS - 1, *(size - 1 for size in _SIZES)]
    return _bits(np.array(fields), np.array([32, 5, 4, 4, 4, 4]))


def _bits(numbers: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The lowest ``widths`` bits of each number, most significant first, one number after the other."""
    places = np.arange(int(widths.max()))[::-1]
    bits = (numbers[:, None] >> places) & 1 == 1
    return np.asarray(bits[places < widths[:, None]])


def _unpack(data: bytes, num_words: int, size: str) -> bytes:
    """All words, each as a byte."""
    end = 8 * len(data)
    if end < _HEADER_BITS:
        raise MaskError(f"a brush mask of {len(data)} bytes has no room for its header; was it cut off?")
    head = int.from_bytes(data[:7]) >> (56 - _HEADER_BITS)
    found_words, word_bits = head >> 21, (head >> 16 & 31) + 1
    if word_bits != _WORD_BITS:
        raise MaskError(f"a brush mask has words of 8 bits; this one has {word_bits}: it is no mask of Label Studio's")
    if found_words != num_words:
        raise MaskError(f"the brush mask has {found_words / 4:,g} pixels, its image of {size} has {num_words // 4:,}")
    sizes = [(head >> shift & 15) + 1 for shift in (12, 8, 4, 0)]
    pieces: list[bytes] = []
    place, done = _HEADER_BITS, 0
    while done < num_words:
        code = int.from_bytes(data[place >> 3 : (place >> 3) + 5].ljust(5, b"\0")) >> 16 - (place & 7) & 0xFFFFFF
        count_bits = sizes[code >> 21 & 3]
        count = (code >> 21 - count_bits & (1 << count_bits) - 1) + 1
        is_run = code >> 23
        place += 3 + count_bits
        num_bits = _WORD_BITS if is_run else _WORD_BITS * count
        if place + num_bits > end:
            raise MaskError(f"the brush mask ends after {done // 4:,} of {num_words // 4:,} pixels: it was cut off")
        first, last = place >> 3, place + num_bits + 7 >> 3
        value = int.from_bytes(data[first:last]) >> 8 * last - place - num_bits & (1 << num_bits) - 1
        words = value.to_bytes(num_bits // 8)
        pieces.append(words * count if is_run else words)
        place, done = place + num_bits, done + count
    if done > num_words:
        raise MaskError(f"the brush mask has more than the {num_words // 4:,} pixels that it announces; is it damaged?")
    return b"".join(pieces)
