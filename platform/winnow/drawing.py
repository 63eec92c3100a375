"""Pictures for people: a mask drawn on its image, and contact sheets.

Text is in Pillow's own scalable font, so that it looks the same everywhere. What is written stands on grounds of our
own, never on the photograph, so that it can be read whatever the photograph shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from winnow.errors import CallError
from winnow.images import Pixels
from winnow.masks import BACKGROUNDS, LabelMap, unlabelled
from winnow.palette import class_colours

Colour = tuple[int, int, int]

_SMALL_PX = 360
"""Images with a shorter longer side are enlarged by a whole factor: else neither they nor their legend can be seen."""

_DARK: Colour = (24, 24, 27)
_LIGHT: Colour = (244, 244, 245)
_DIM: Colour = (161, 161, 170)
_PAPER: Colour = (250, 250, 250)
_INK: Colour = (24, 24, 27)
_PALE: Colour = (113, 113, 122)
_LINE: Colour = (212, 212, 216)
_MISSING: Colour = (228, 228, 231)

_MAX_SHEET_PIXELS = 64_000_000
_MIN_TILE_PX = 48


@dataclass(frozen=True)
class Tile:
    """One image of a contact sheet.

    Attributes:
        pixels_HW3: uint8 (H, W, 3) of any size; None when it could not be read.
        title: first line below it, such as rank and similarity.
        name: second line; shortened in the middle where it is too long.
        reason: drawn in place of an image that could not be read.
    """

    pixels_HW3: Pixels | None
    title: str = ""
    name: str = ""
    reason: str = ""


# -------------------------------------------------------------------------------------------------------------- overlay


def draw_overlay(
    pixels_HW3: Pixels, labels_HW: LabelMap, classes: Sequence[str], *, opacity: float = 0.45, legend: bool = True
) -> Image.Image:
    """An image with its classes tinted and outlined, and below it a legend with each class's share of the image.

    The background and what is not labelled keep their own colours. Small images are enlarged by a whole factor.

    Args:
        pixels_HW3: uint8 (H, W, 3).
        labels_HW: class ids of the same size.
        classes: names in the order of the ids.
        opacity: of the tint, from 0 (the image) to 1 (flat colours).
        legend: add the strip below.

    Raises:
        ValueError: sizes that differ, or an id without a class.
    """
    if pixels_HW3.shape[:2] != labels_HW.shape:
        raise ValueError(f"labels of shape {labels_HW.shape} do not fit an image of shape {pixels_HW3.shape}")
    counts = np.bincount(labels_HW.reshape(-1), minlength=unlabelled(labels_HW) + 1)
    beyond = counts[len(classes) : unlabelled(labels_HW)]
    if beyond.any():
        raise ValueError(
            f"class id {len(classes) + int(beyond.argmax())} has no name: there are {len(classes)} classes"
        )
    factor = max(1, _SMALL_PX // max(labels_HW.shape))
    if factor > 1:
        pixels_HW3 = pixels_HW3.repeat(factor, axis=0).repeat(factor, axis=1)
        labels_HW = labels_HW.repeat(factor, axis=0).repeat(factor, axis=1)
    colours = np.zeros((len(counts), 3), dtype=np.uint8)
    colours[: len(classes)] = class_colours(classes)
    is_shown = np.zeros(len(counts), dtype=bool)
    is_shown[: len(classes)] = [name not in BACKGROUNDS for name in classes]
    picture = Image.fromarray(_tinted(pixels_HW3, labels_HW, colours, is_shown, opacity))
    if not legend:
        return picture
    found = sorted(np.flatnonzero(is_shown & (counts > 0)).tolist(), key=lambda value: -int(counts[value]))
    entries = [(_colour(colours[value]), classes[value], float(counts[value] / counts.sum())) for value in found]
    return _with_legend(picture, entries)


def _tinted(
    pixels_HW3: Pixels, labels_HW: LabelMap, colours: NDArray[np.uint8], is_shown: NDArray[np.bool_], opacity: float
) -> Pixels:
    """Tint and outlines: a line in the class's colour inside each border, a dark one outside."""
    if not is_shown[labels_HW].any():
        return pixels_HW3
    weight = round(256 * min(max(opacity, 0.0), 1.0))
    weights = np.where(is_shown, weight, 0).astype(np.uint16)
    tints = colours.astype(np.uint16) * weights[:, None]
    border_HW = _borders(labels_HW, max(1, round(max(labels_HW.shape) / 500)))
    drawn = np.empty_like(pixels_HW3)
    for top in range(0, len(drawn), 128):  # in blocks of rows: whole, the products of 100 megapixels take gigabytes
        rows = slice(top, top + 128)
        labels, border = labels_HW[rows], border_HW[rows]
        kept = pixels_HW3[rows] * (256 - weights[labels])[..., None]
        drawn[rows] = (kept + tints[labels]) >> 8
        inside = border & is_shown[labels]
        drawn[rows][inside] = colours[labels[inside]]
        drawn[rows][border & ~inside] //= 3
    return drawn


def _borders(labels_HW: LabelMap, width: int) -> NDArray[np.bool_]:
    """Pixels at most ``width`` rows and columns away from another class."""
    borders = np.zeros(labels_HW.shape, dtype=bool)
    down, across = labels_HW[1:] != labels_HW[:-1], labels_HW[:, 1:] != labels_HW[:, :-1]
    borders[1:] |= down
    borders[:-1] |= down
    borders[:, 1:] |= across
    borders[:, :-1] |= across
    for _ in range(width - 1):
        near = borders.copy()
        near[1:] |= borders[:-1]
        near[:-1] |= borders[1:]
        borders = near.copy()
        borders[:, 1:] |= near[:, :-1]
        borders[:, :-1] |= near[:, 1:]
    return borders


def _with_legend(picture: Image.Image, entries: Sequence[tuple[Colour, str, float]]) -> Image.Image:
    """The picture with a strip below that names the colours, in as many rows as they need, four at most."""
    size = min(max(round(max(picture.size) / 52), 13), 96)
    font = _font(size)
    pad, swatch, row = round(size * 0.8), size, round(size * 1.6)
    room = picture.width - 2 * pad
    lines: list[list[tuple[int, Colour | None, str, str]]] = [[]]
    x = 0
    left_over = 0
    for number, (colour, name, share) in enumerate(entries):
        percent = _percent(share)
        most = room - swatch - size - font.getlength(" " + percent)
        name = _shorten(_one_line(name), font, min(most, 14 * size))
        wide = round(swatch + size * 0.4 + font.getlength(name + " " + percent))
        if x and x + wide > room:
            if len(lines) == 4:
                left_over = len(entries) - number
                break
            lines.append([])
            x = 0
        lines[-1].append((x, colour, name, percent))
        x += wide + round(size * 1.2)
    if left_over:
        more = f"+ {left_over} more"
        while lines[-1] and x + font.getlength(more) > room:
            x, *_ = lines[-1].pop()
            left_over += 1
            more = f"+ {left_over} more"
        lines[-1].append((x, None, "", more))
    if not entries:
        lines = [[(0, None, "", _shorten("nothing but background", font, room))]]
    framed = Image.new("RGB", (picture.width, picture.height + 2 * pad + row * len(lines) - (row - size)), _DARK)
    framed.paste(picture)
    draw = ImageDraw.Draw(framed)
    for number, line in enumerate(lines):
        top = picture.height + pad + row * number
        middle = top + size / 2
        for x, swatch_colour, name, percent in line:
            text_x = pad + x
            if swatch_colour is not None:
                square = (pad + x, top, pad + x + swatch - 1, top + swatch - 1)
                draw.rounded_rectangle(square, radius=size // 5, fill=swatch_colour, outline=_LIGHT)
                text_x += round(swatch + size * 0.4)
            draw.text((text_x, middle), name, font=font, fill=_LIGHT, anchor="lm")
            gap = font.getlength(name + " ") if name else 0
            draw.text((text_x + gap, middle), percent, font=font, fill=_DIM, anchor="lm")
    return framed


def _percent(share: float) -> str:
    """Such as ``34 %``, ``2.1 %`` or ``< 0.1 %``."""
    if share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


# -------------------------------------------------------------------------------------------------------- contact sheet


def draw_contact_sheet(tiles: Sequence[Tile], *, columns: int | None = None, tile_px: int = 192) -> Image.Image:
    """Thumbnails in a grid, row by row, each with two lines below it.

    Args:
        tiles: any number of them; also none.
        columns: side by side; about half as many again as there are rows without it.
        tile_px: longest side of a thumbnail; less where a sheet of so many would have more than 64 megapixels.

    Raises:
        CallError: too many tiles for one picture.
    """
    columns = columns or max(1, min(len(tiles), math.ceil(math.sqrt(1.5 * len(tiles)))))
    rows = max(1, math.ceil(len(tiles) / columns))
    while tile_px > _MIN_TILE_PX and math.prod(_sheet_size(columns, rows, tile_px)) > _MAX_SHEET_PIXELS:
        tile_px = max(_MIN_TILE_PX, tile_px * 9 // 10)
    width, height = _sheet_size(columns, rows, tile_px)
    if width * height > _MAX_SHEET_PIXELS:
        raise CallError(f"{len(tiles):,} images are too many for one contact sheet; draw fewer")
    gap, text, line = _spacing(tile_px)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if not tiles:
        draw.text((width / 2, height / 2), "no images", font=_font(text), fill=_PALE, anchor="mm")
    for number, tile in enumerate(tiles):
        left = gap + (number % columns) * (tile_px + gap)
        top = gap + (number // columns) * (tile_px + 2 * line + 2 * gap)
        if tile.pixels_HW3 is None:
            _draw_missing(draw, left, top, tile_px, tile.reason)
        else:
            thumbnail = _thumbnail(tile.pixels_HW3, tile_px)
            x, y = left + (tile_px - thumbnail.width) // 2, top + tile_px - thumbnail.height
            sheet.paste(thumbnail, (x, y))
            draw.rectangle((x - 1, y - 1, x + thumbnail.width, y + thumbnail.height), outline=_LINE)
        for row, (caption, colour) in enumerate(((tile.title, _INK), (tile.name, _PALE))):
            font = _font(text)
            shown = _shorten(_one_line(caption), font, tile_px)
            middle = top + tile_px + gap // 2 + line * row + line / 2
            draw.text((left + tile_px / 2, middle), shown, font=font, fill=colour, anchor="mm")
    return sheet


def _spacing(tile_px: int) -> tuple[int, int, int]:
    """Gap between tiles, size of the text, height of a line."""
    text = min(max(round(tile_px / 14), 8), 22)
    return max(6, tile_px // 14), text, round(text * 1.35)


def _sheet_size(columns: int, rows: int, tile_px: int) -> tuple[int, int]:
    gap, _, line = _spacing(tile_px)
    return gap + columns * (tile_px + gap), gap + rows * (tile_px + 2 * line + 2 * gap)


def _thumbnail(pixels_HW3: Pixels, tile_px: int) -> Image.Image:
    """The image so that its longer side is ``tile_px``; small ones are enlarged by a whole factor, unblurred."""
    height, width = pixels_HW3.shape[:2]
    image = Image.fromarray(np.ascontiguousarray(pixels_HW3))
    scale = tile_px / max(width, height)
    if scale >= 2:
        factor = int(scale)
        return image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0) if scale < 1 else image


def _draw_missing(draw: ImageDraw.ImageDraw, left: int, top: int, tile_px: int, reason: str) -> None:
    """A grey tile with the reason, wrapped to lines that fit."""
    draw.rectangle((left, top, left + tile_px - 1, top + tile_px - 1), fill=_MISSING, outline=_LINE)
    _, text, line = _spacing(tile_px)
    font = _font(text)
    room = tile_px - 2 * text
    lines: list[str] = []
    for word in _one_line(reason or "could not be read").split():
        word = _shorten(word, font, room)
        if lines and font.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    most = max(1, (tile_px - text) // line)
    if len(lines) > most:
        lines = lines[:most]
        lines[-1] = _shorten(lines[-1] + " …", font, room)
    first = top + (tile_px - line * (len(lines) - 1)) / 2
    for number, words in enumerate(lines):
        draw.text((left + tile_px / 2, first + line * number), words, font=font, fill=_PALE, anchor="mm")


# ----------------------------------------------------------------------------------------------------------------- text


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return font


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, or its start and end with ``…`` between them, so that it is at most ``room`` pixels wide."""
    if font.getlength(text[:2000]) <= room and len(text) <= 2000:
        return text
    low, high = 0, min(len(text) - 1, 2000)  # characters kept
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(_middle_out(text, middle)) <= room else (low, middle - 1)
    return _middle_out(text, low)


def _middle_out(text: str, num_kept: int) -> str:
    head = num_kept // 2
    tail = num_kept - head  # the end of a name tells more than its start
    return f"{text[:head]}…{text[len(text) - tail :]}"


def _one_line(text: str) -> str:
    """The text without line breaks and control characters, which would be drawn as boxes or break the layout."""
    return "".join(character if character.isprintable() else " " for character in text)


def _colour(values: NDArray[np.uint8]) -> Colour:
    return int(values[0]), int(values[1]), int(values[2])
