"""Overlays and contact sheets: what must be on them. How they look was judged by eye."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from winnow.drawing import Tile, _font, _shorten, draw_contact_sheet, draw_overlay
from winnow.errors import CallError
from winnow.palette import class_colours

CLASSES = ["background", "cat", "dog"]
ORANGE, BLUE = class_colours(CLASSES)[1:].tolist()


def grey(height: int, width: int, value: int = 200) -> NDArray[np.uint8]:
    return np.full((height, width, 3), value, dtype=np.uint8)


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    assert image.mode == "RGB"
    return np.asarray(image)


# -------------------------------------------------------------------------------------------------------------- overlay


def test_a_class_is_tinted_outlined_and_the_rest_is_left_alone() -> None:
    labels = np.zeros((400, 500), dtype=np.uint8)
    labels[100:200, 150:300] = 1
    labels[300:, :] = 255
    drawn = pixels(draw_overlay(grey(400, 500), labels, CLASSES, opacity=0.5, legend=False))
    assert drawn.shape == (400, 500, 3)
    assert drawn[150, 200].tolist() == [(200 + channel) // 2 for channel in ORANGE]
    assert drawn[100, 200].tolist() == drawn[199, 200].tolist() == drawn[150, 150].tolist() == ORANGE
    assert (drawn[99, 200] == 200 // 3).all()
    assert (drawn[98, 200] == 200).all()
    assert (drawn[350, 200] == 200).all()


def test_opacity_goes_from_the_image_to_flat_colours() -> None:
    labels = np.ones((400, 400), dtype=np.uint8)
    photo = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    assert np.array_equal(pixels(draw_overlay(photo, labels, CLASSES, opacity=0, legend=False)), photo)
    assert (pixels(draw_overlay(photo, labels, CLASSES, opacity=1, legend=False)) == ORANGE).all()


def test_the_legend_stands_below_and_covers_nothing() -> None:
    labels = np.zeros((400, 500), dtype=np.uint8)
    labels[:10, :10] = 2
    with_legend = pixels(draw_overlay(grey(400, 500), labels, CLASSES))
    without = pixels(draw_overlay(grey(400, 500), labels, CLASSES, legend=False))
    assert with_legend.shape[0] > 400
    assert np.array_equal(with_legend[:400], without)
    strip = {tuple(colour) for colour in with_legend[400:].reshape(-1, 3).tolist()}
    assert tuple(BLUE) in strip
    assert tuple(ORANGE) not in strip


@pytest.mark.parametrize("num_classes", [1, 2, 30, 400])
@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (30, 40), (500, 400)])
def test_any_size_and_any_number_of_classes_is_drawn(shape: tuple[int, int], num_classes: int) -> None:
    names = [f"a class with a name that is long {number}" for number in range(num_classes)]
    labels = np.arange(shape[0] * shape[1]).reshape(shape) % num_classes
    drawn = draw_overlay(grey(*shape), labels.astype(np.uint8 if num_classes < 256 else np.uint16), names)
    factor = max(1, 360 // max(shape))
    assert drawn.width == shape[1] * factor
    assert drawn.height > shape[0] * factor


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        draw_overlay(grey(10, 20), np.zeros((20, 10), np.uint8), CLASSES)
    with pytest.raises(ValueError, match="class id 7 has no name: there are 3 classes"):
        draw_overlay(grey(10, 20), np.full((10, 20), 7, np.uint8), CLASSES)


def test_the_images_given_are_not_changed() -> None:
    photo, labels = grey(400, 400), np.ones((400, 400), np.uint8)
    draw_overlay(photo, labels, CLASSES)
    assert (photo == 200).all()


# -------------------------------------------------------------------------------------------------------- contact sheet


@pytest.mark.parametrize("num_tiles", [0, 1, 2, 7, 50, 1000])
def test_a_sheet_of_any_number_of_images_is_near_to_a_screens_shape(num_tiles: int) -> None:
    sheet = draw_contact_sheet([Tile(grey(30, 40), "1", "a.jpg")] * num_tiles)
    assert sheet.width * sheet.height <= 64_000_000
    assert 0.5 < sheet.width / sheet.height < 3


def test_too_many_images_are_refused() -> None:
    with pytest.raises(CallError, match="100,000 images are too many for one contact sheet"):
        draw_contact_sheet([Tile(None)] * 100_000)


def test_images_keep_their_shape_and_small_ones_stay_sharp() -> None:
    half = grey(2, 8, 0)
    half[:, 4:] = (255, 0, 0)
    drawn = pixels(draw_contact_sheet([Tile(half)], tile_px=200))
    black, red = (drawn == 0).all(axis=2), (drawn == (255, 0, 0)).all(axis=2)
    assert (black.sum(), red.sum()) == (100 * 50, 100 * 50)


def test_an_image_that_could_not_be_read_is_a_grey_tile_with_the_reason() -> None:
    blank = pixels(draw_contact_sheet([Tile(None, reason=" ")]))
    told = pixels(draw_contact_sheet([Tile(None, reason="truncated: the data end before the last pixel " * 20)]))
    assert (blank == (228, 228, 231)).all(axis=2).sum() > 0.5 * blank.shape[0] * blank.shape[1]
    assert not np.array_equal(blank, told)
    assert np.array_equal(blank[:10], told[:10])  # however long, it stays in its tile


def test_long_names_are_shortened_in_the_middle() -> None:
    font = _font(14)
    name = "s3://bucket/" + "folder/" * 1000 + "photo-0017.jpg"
    short = _shorten(name, font, 200)
    assert font.getlength(short) <= 200
    start, end = short.split("…")
    assert name.startswith(start)
    assert name.endswith(end)
    assert len(end) >= 8
    assert _shorten("a.jpg", font, 200) == "a.jpg"
    assert _shorten("a.jpg", font, 0) == "…"


def test_line_breaks_and_control_characters_in_names_do_no_harm() -> None:
    plain = draw_contact_sheet([Tile(grey(9, 9), "1", "a b.jpg")])
    odd = draw_contact_sheet([Tile(grey(9, 9), "1", "a\nb.jpg")])
    assert np.array_equal(pixels(plain), pixels(odd))
    draw_contact_sheet([Tile(grey(9, 9), "猫", "\x1b[31m\u202e猫🐈\ud800.jpg")])
