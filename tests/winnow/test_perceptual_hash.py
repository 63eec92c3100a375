"""The perceptual hash against the package ImageHash, and what it is robust to."""

from __future__ import annotations

import imagehash
import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance

from winnow.perceptual_hash import SIDE, as_integers, hamming, hash_of_grey, perceptual_hash

NAMES = ("astronaut", "coffee", "chelsea", "rocket", "camera", "cat", "moon", "page")


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def distance(one: str, other: str) -> int:
    return int(hamming(as_integers([one]), as_integers([other]))[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_hash_is_that_of_imagehash(name: str) -> None:
    image = photograph(name)
    reference = str(imagehash.phash(image))
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    assert hash_of_grey(np.asarray(grey)) == reference
    assert distance(perceptual_hash(image), reference) <= 4  # it averages large pictures first


@pytest.mark.parametrize("name", NAMES)
def test_the_same_picture_in_another_size_or_light_is_close_and_others_are_far(name: str) -> None:
    image = photograph(name)
    own = perceptual_hash(image)
    assert distance(own, perceptual_hash(image.resize((320, 200), Image.Resampling.BICUBIC))) <= 4
    assert distance(own, perceptual_hash(ImageEnhance.Brightness(image).enhance(0.8))) <= 6
    others = [perceptual_hash(photograph(other)) for other in NAMES if {name, other} != {"cat", "chelsea"}]
    assert sorted(distance(own, other) for other in others)[1] > 12


@pytest.mark.parametrize("colour", ["black", "white", "#804020"])
def test_flat_and_symmetric_pictures_have_hashes_free_of_rounding_errors(colour: str) -> None:
    assert perceptual_hash(Image.new("RGB", (77, 1), colour)) in ("8" + 15 * "0", 16 * "0")
    rows = np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[:, None], SIDE, axis=1)
    odd = int(hash_of_grey(rows), 16)
    assert odd & 0x7F7F7F7F7F7F7F7F == 0  # nothing changes from left to right: only the first of each row may be set


def test_bits_are_counted_pair_by_pair() -> None:
    hashes = as_integers(["0000000000000000", "ffffffffffffffff", "8000000000000001"])
    assert hamming(hashes[:, None], hashes[None, :]).tolist() == [[0, 64, 2], [64, 0, 62], [2, 62, 0]]
