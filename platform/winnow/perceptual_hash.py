"""A 64-bit perceptual hash: pictures that look the same have hashes that differ in few bits.

The sign pattern of an image's lowest frequencies: C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions", 2010, section 3.2.1, in the form of the package ImageHash: 32 × 32 grey pixels, discrete cosine transform,
the 8 × 8 lowest frequencies, one bit for each that is above their median. Numpy and Pillow only: decoder processes
compute it.

Legend: N hashes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
"""Pixels a side of the grey picture."""

_FREQUENCIES = 8
_REDUCING_GAP = 3.0
_STEPS_PER_GREY = 1e4


def perceptual_hash(image: Image.Image) -> str:
    """The hash of a picture of any size, 16 hex digits."""
    # Large pictures are first averaged over whole pixels: four times quicker, and hardly a bit differs.
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    return hash_of_grey(np.asarray(grey))


def hash_of_grey(grey: NDArray[np.uint8]) -> str:
    """The hash of a grey picture, uint8 (32, 32), as 16 hex digits."""
    transform = _cosines()
    lowest = transform @ grey.astype(np.float64) @ transform.T
    # What is zero or equal but for rounding errors, as in flat and in symmetric pictures, must not decide a bit.
    lowest = np.rint(lowest * _STEPS_PER_GREY)
    return np.packbits(lowest > np.median(lowest)).tobytes().hex()


def hamming(hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Number of differing bits, 0 to 64, element by element (broadcast)."""
    return np.asarray(np.bitwise_count(np.bitwise_xor(hashes, others)), dtype=np.uint8)


def is_telling(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """True where a hash describes a picture: half of its bits are set; in that of a flat picture one, or few."""
    return np.asarray(np.bitwise_count(hashes) >= _FREQUENCIES)


def as_integers(hashes: list[str]) -> NDArray[np.uint64]:
    """Hashes in hex as uint64 (N,), for ``hamming``."""
    return np.array([int(text, 16) for text in hashes], dtype=np.uint64)


def _cosines() -> NDArray[np.float64]:
    """The rows of the DCT-II that belong to the lowest frequencies, float64 (8, 32)."""
    frequency, pixel = np.ogrid[:_FREQUENCIES, :SIDE]
    return np.asarray(np.cos(np.pi * frequency * (2 * pixel + 1) / (2 * SIDE)))
