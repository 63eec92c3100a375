from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation

from winnow_jobs.demo.surfaces import (
    CLASSES,
    MARGIN,
    MASK_CLASSES,
    SIDE,
    describe,
    mask_of,
    mask_to_png,
    number_of,
    render,
)


def first(label: str, material: str) -> int:
    return next(n for n in range(1000) if (describe(n).label, describe(n).material) == (label, material))


def test_a_number_and_a_seed_always_give_the_same_picture() -> None:
    one, again = render(describe(7)), render(describe(7))
    assert np.array_equal(one.pixels_HWC, again.pixels_HWC)
    assert one.to_jpeg() == again.to_jpeg()
    assert not np.array_equal(one.pixels_HWC, render(describe(8)).pixels_HWC)
    assert not np.array_equal(one.pixels_HWC, render(describe(7, seed=1)).pixels_HWC)


def test_the_set_has_all_classes_on_all_materials() -> None:
    surfaces = [describe(number) for number in range(1200)]
    counts = Counter(surface.label for surface in surfaces)
    assert set(counts) == set(CLASSES)
    assert min(counts.values()) > 200
    assert len({(surface.label, surface.material, surface.camera) for surface in surfaces}) == 4 * 3 * 2


@pytest.mark.parametrize("material", ["metal", "concrete", "paint"])
@pytest.mark.parametrize("label", CLASSES)
def test_the_mask_is_where_the_damage_changed_the_picture(label: str, material: str) -> None:
    surface = describe(first(label, material))
    damaged, before = render(surface), render(surface, defect=False)
    assert damaged.pixels_HWC.shape == (SIDE, SIDE, 3)
    assert not before.mask_HW.any()
    difference_HW = np.abs(damaged.pixels_HWC.astype(int) - before.pixels_HWC).max(axis=2)
    if label == "good":
        assert not difference_HW.any()
        assert not damaged.mask_HW.any()
        return
    assert set(np.unique(damaged.mask_HW)) == {0, MASK_CLASSES.index(label)}
    assert np.array_equal(mask_of(surface), damaged.mask_HW)
    inside_HW = damaged.mask_HW > 0
    assert 100 < inside_HW.sum() < 0.3 * SIDE**2
    assert not difference_HW[~_near(inside_HW, 2)].any()  # the second camera's lens blurs
    changed_HW = difference_HW > 4
    assert changed_HW.any()
    assert not (inside_HW & ~_near(changed_HW, 2 * MARGIN)).any()


def _near(mask_HW: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    return np.asarray(binary_dilation(mask_HW, np.ones((3, 3)), iterations=pixels))


def test_every_damaged_surface_shows_its_damage() -> None:
    for number in range(600):
        surface = describe(number)
        assert mask_of(surface).any() == (surface.label != "good"), surface


def test_a_picture_goes_to_files_and_back() -> None:
    surface = describe(first("crack", "paint"))
    picture = render(surface)
    assert Image.open(io.BytesIO(picture.to_jpeg())).size == (SIDE, SIDE)
    mask = Image.open(io.BytesIO(mask_to_png(picture.mask_HW)))
    assert mask.mode == "L"
    assert np.array_equal(np.asarray(mask), picture.mask_HW)


def test_the_path_tells_the_number_and_not_the_label() -> None:
    surface = describe(first("stain", "metal"))
    assert number_of(f"s3://bucket/day-1/{surface.path}") == surface.number
    assert surface.path.startswith("metal/cam-")
    assert "stain" not in surface.path
