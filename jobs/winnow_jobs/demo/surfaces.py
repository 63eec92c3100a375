"""Rendered surfaces as an inspection camera sees them: metal, concrete and paint; good, scratched, stained, cracked.

Every picture follows from its number and the seed alone. What makes them hard is what makes real ones hard: defects of
little contrast, and things that look like defects and are none, such as joints, machining marks, shadows and dust.
Concrete is the hardest of the three, because its pores and grain hide what is thin.

Legend: pictures uint8 (H, W, 3); masks uint8 (H, W), class ids in the order of ``MASK_CLASSES``; fields float32 (H, W).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("good", "scratch", "stain", "crack")
MASK_CLASSES = ("background", *CLASSES[1:])

SIDE = 224
"""Pixels of each side."""

VISIBLE = 0.25
"""Least opacity of a defect, relative to its strongest, of a pixel that counts as part of it."""

MARGIN = 3
"""Pixels around a defect that its mask covers too, as a person's brush does."""

_SHARES = (0.34, 0.22, 0.22, 0.22)
_CAMERAS = ("cam-1", "cam-2")
_FINE = 3
"""Lines are drawn so many times larger, and reduced."""

Field = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Surface:
    """What a picture shows; known before it is drawn.

    Attributes:
        number: of the picture.
        seed: of the set.
        material: ``metal``, ``concrete`` or ``paint``.
        camera: that took it; the second one has a worse lens and less light.
        label: one of ``CLASSES``.
    """

    number: int
    seed: int
    material: str
    camera: str
    label: str

    @property
    def path(self) -> str:
        """Where the picture lies below its source: it says material and camera, and not the label."""
        return f"{self.material}/{self.camera}/{self.number:05d}.jpg"


@dataclass(frozen=True)
class Picture:
    """A rendered surface.

    Attributes:
        pixels_HWC: what the camera sees, uint8.
        mask_HW: where the defect is, uint8.
    """

    pixels_HWC: Pixels
    mask_HW: Pixels

    def to_jpeg(self) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(self.pixels_HWC).save(sink, "JPEG", quality=92)
        return sink.getvalue()


def describe(number: int, seed: int = 0) -> Surface:
    """The surface of that number."""
    random = np.random.default_rng([seed, number, 0])
    material = str(random.choice(list(_MATERIALS)))
    return Surface(number, seed, material, str(random.choice(_CAMERAS)), str(random.choice(CLASSES, p=_SHARES)))


def number_of(path: str) -> int:
    """The number of the surface whose picture has this path or URI."""
    return int(path.rpartition("/")[2].removesuffix(".jpg"))


def render(surface: Surface, *, defect: bool = True) -> Picture:
    """The picture of a surface.

    Args:
        surface: what to draw.
        defect: False draws the same place before the damage; the mask is then empty.
    """
    ground, sensor = (_random(surface, part) for part in ("ground", "sensor"))
    shown_HWC = _MATERIALS[surface.material](ground)
    mask_HW: Pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    if defect and surface.label != "good":
        layer = _damage(surface)
        mask_HW = mask_of(surface)
        # What reaches beyond the mask is not drawn, so that mask and picture agree.
        opacity = np.where(mask_HW > 0, layer.opacity_HW, np.float32(0))[..., None] * np.float32(layer.strength)
        shown_HWC = shown_HWC * (1 - opacity) + layer.colour_of(shown_HWC) * opacity
    lit_HWC = shown_HWC * _light(ground, surface.camera)[..., None]
    return Picture(_photograph(lit_HWC, sensor, surface.camera), mask_HW)


def mask_of(surface: Surface) -> Pixels:
    """The mask alone, without drawing the picture: the damage and ``MARGIN`` pixels around it."""
    if surface.label == "good":
        return np.zeros((SIDE, SIDE), dtype=np.uint8)
    value = np.uint8(MASK_CLASSES.index(surface.label))
    damaged_HW = np.where(_damage(surface).opacity_HW >= VISIBLE, value, np.uint8(0))
    return np.asarray(Image.fromarray(damaged_HW).filter(ImageFilter.MaxFilter(2 * MARGIN + 1)))


def mask_to_png(mask_HW: Pixels) -> bytes:
    """A mask as a file of class ids."""
    sink = io.BytesIO()
    Image.fromarray(mask_HW).save(sink, "PNG")
    return sink.getvalue()


def _damage(surface: Surface) -> _Layer:
    return _DEFECTS[surface.label](_random(surface, "damage"), surface.material)


def _random(surface: Surface, part: str) -> np.random.Generator:
    """Each part of a picture has a stream of its own, so that one can be drawn without the others."""
    return np.random.default_rng([surface.seed, surface.number, _PARTS.index(part)])


_PARTS = ("description", "ground", "damage", "sensor")


# ------------------------------------------------------------------------------------------------------------ materials


def _metal(random: np.random.Generator) -> Field:
    """Brushed steel or aluminium."""
    tone = random.uniform(0.45, 0.72)
    angle = random.choice([0.0, 90.0]) + random.normal(0, 4)
    grain = _turned(
        0.6 * _streaks(random, 300, 3) + 0.4 * _streaks(random, 300, 40),
        angle,
    )
    value = tone + random.uniform(0.03, 0.08) * grain + 0.03 * _clouds(random, 3, 2)
    if random.random() < 0.3:
        value += random.uniform(0.02, 0.06) * _milling(random)
    if random.random() < 0.25:
        value = _joint(random, value, random.uniform(0.25, 0.5))
    value = _hairs(random, _dust(random, value, int(random.integers(0, 14))), 0.06)
    return _tinted(value, 1 + random.normal(0, 0.015, 3) + np.array([-0.01, 0.0, 0.015]))


def _concrete(random: np.random.Generator) -> Field:
    """Cast concrete: clouds, grain, pores, now and then a joint of the formwork."""
    tone = random.uniform(0.42, 0.68)
    value = tone + random.uniform(0.04, 0.09) * _clouds(random, 4, 4) + random.uniform(0.03, 0.07) * _grain(random)
    value = value * (1 - random.uniform(0.25, 0.6) * _pores(random, int(random.integers(10, 70))))
    if random.random() < 0.35:
        value = _joint(random, value, random.uniform(0.2, 0.5))
    if random.random() < 0.25:
        value += random.uniform(0.02, 0.04) * _turned(_streaks(random, 24, 2), random.uniform(0, 180))
    value = _hairs(random, value, 0.06)
    return _tinted(value, np.array([1.02, 1.0, 0.95]) + random.normal(0, 0.02, 3))


def _paint(random: np.random.Generator) -> Field:
    """A painted panel: one colour, orange peel, sometimes the marks of a roller."""
    colour = np.array(_PAINTS[int(random.integers(len(_PAINTS)))]) * random.uniform(0.8, 1.15)
    value = 1 + random.uniform(0.02, 0.06) * _clouds(random, 40, 2) + 0.03 * _clouds(random, 3, 2)
    if random.random() < 0.35:
        value += random.uniform(0.02, 0.05) * _turned(_streaks(random, 30, 2), random.choice([0.0, 90.0]))
    if random.random() < 0.25:
        value = _joint(random, value, random.uniform(0.25, 0.5))
    value = _hairs(random, _dust(random, value, int(random.integers(0, 18))), 0.08)
    return _tinted(value, colour)


_PAINTS = (
    (0.25, 0.38, 0.55),
    (0.32, 0.48, 0.36),
    (0.62, 0.62, 0.60),
    (0.72, 0.58, 0.20),
    (0.58, 0.22, 0.18),
    (0.80, 0.79, 0.74),
)

_MATERIALS: dict[str, Callable[[np.random.Generator], Field]] = {
    "metal": _metal,
    "concrete": _concrete,
    "paint": _paint,
}


# -------------------------------------------------------------------------------------------------------------- defects


@dataclass(frozen=True)
class _Layer:
    """A defect to lay over a surface.

    Attributes:
        opacity_HW: where, from 0 to 1.
        strength: how much of the surface is replaced where the opacity is 1.
        colour_of: what replaces it.
    """

    opacity_HW: Field
    strength: float
    colour_of: Callable[[Field], Field]


def _scratch(random: np.random.Generator, material: str) -> _Layer:
    """One or a few thin strokes that begin and end within the picture, nearly straight."""
    sheet = _Sheet()
    angle = random.uniform(0, math.pi)
    start = random.uniform(0.2, 0.8, 2) * SIDE
    for _ in range(int(random.choice([1, 1, 2, 3]))):
        length = random.uniform(40, 140)
        bend = random.normal(0, 0.004)
        place = start + random.normal(0, 10, 2)
        heading = angle + random.normal(0, 0.06)
        points = [place]
        for _ in range(12):
            heading += bend * length / 12
            place = place + length / 12 * np.array([math.cos(heading), math.sin(heading)])
            points.append(place)
        sheet.stroke(points, np.linspace(1.0, 0.5, 12) * random.uniform(1.0, 2.2))
    brighter = random.random() < (0.85 if material == "metal" else 0.6)
    gain = random.uniform(1.5, 1.9) if brighter else random.uniform(0.35, 0.6)
    return _Layer(sheet.opacity(0.5), _contrast(random, _least(material, 0.46)), lambda shown: shown * gain)


def _stain(random: np.random.Generator, material: str) -> _Layer:
    """A blot with an uneven edge: oil, rust, or water with a darker rim."""
    centre = random.uniform(0.2, 0.8, 2) * SIDE
    radius = random.uniform(15, 44)
    stretch, angle = random.uniform(1.0, 1.8), random.uniform(0, math.pi)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    across = (x - centre[0]) * math.cos(angle) + (y - centre[1]) * math.sin(angle)
    along = (y - centre[1]) * math.cos(angle) - (x - centre[0]) * math.sin(angle)
    reach = 1 - np.hypot(across * stretch, along) / radius + 0.35 * _clouds(random, 7, 3)
    blot = np.clip(reach / random.uniform(0.15, 0.6), 0, 1)
    kind = random.choice(["oil", "rust", "water"])
    if kind == "water":
        blot = np.clip(blot * (0.45 + 1.2 * np.exp(-np.square((reach - 0.12) / 0.1))), 0, 1) * (reach > 0)
    tints = {"oil": (0.35, 0.33, 0.30), "rust": (0.75, 0.48, 0.30), "water": (0.62, 0.62, 0.60)}
    tint = np.array(tints[str(kind)], dtype=np.float32)
    return _Layer(blot.astype(np.float32), _contrast(random, _least(material, 0.28)), lambda shown: shown * tint)


def _crack(random: np.random.Generator, material: str) -> _Layer:
    """A jagged dark line that changes its width, with branches."""
    sheet = _Sheet()
    _grow(
        random, sheet, random.uniform(0.25, 0.75, 2) * SIDE, random.uniform(0, 2 * math.pi), random.uniform(40, 130), 0
    )
    depth = random.uniform(0.1, 0.35)
    return _Layer(sheet.opacity(0.5), _contrast(random, _least(material, 0.46)), lambda shown: shown * depth)


def _grow(
    random: np.random.Generator, sheet: _Sheet, place: NDArray[np.float64], heading: float, length: float, depth: int
) -> None:
    points, wandering = [place], heading
    widths = []
    for step in range(max(3, int(length / 6))):
        wandering = 0.75 * wandering + 0.25 * heading + random.normal(0, 0.45)
        place = place + random.uniform(3, 9) * np.array([math.cos(wandering), math.sin(wandering)])
        points.append(place)
        widths.append(random.uniform(0.8, 2.6) / (1 + 0.6 * depth))
        if depth < 2 and step > 1 and random.random() < 0.09:
            _grow(
                random,
                sheet,
                place,
                wandering + random.choice([-1, 1]) * random.uniform(0.5, 1.1),
                length / 3,
                depth + 1,
            )
    sheet.stroke(points, widths)


_DEFECTS: dict[str, Callable[[np.random.Generator, str], _Layer]] = {
    "scratch": _scratch,
    "stain": _stain,
    "crack": _crack,
}


def _least(material: str, plain: float) -> float:
    """Strength of the faintest defect that is drawn; on concrete it needs more to be seen at all."""
    return plain * (1.25 if material == "concrete" else 1.0)


def _contrast(random: np.random.Generator, least: float) -> float:
    """Strength of a defect: some are plain, many are faint."""
    return float(least + (1 - least) * random.beta(1.5, 1.5))


class _Sheet:
    """Where strokes are drawn, enlarged."""

    def __init__(self) -> None:
        self._image = Image.new("L", (SIDE * _FINE, SIDE * _FINE))
        self._draw = ImageDraw.Draw(self._image)

    def stroke(self, points: list[NDArray[np.float64]], widths: Field | list[float]) -> None:
        """A line through (x, y) in pixels of the picture, with the width of each of its parts."""
        for first, second, width in zip(points, points[1:], widths, strict=False):
            ends = [*(first * _FINE), *(second * _FINE)]
            self._draw.line([float(value) for value in ends], fill=255, width=max(1, round(width * _FINE)))

    def opacity(self, softness: float) -> Field:
        reduced = self._image.resize((SIDE, SIDE), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(softness))
        found = np.asarray(reduced, dtype=np.float32)
        return found / max(1.0, float(found.max()))


# ---------------------------------------------------------------------------------------------- texture, light, camera


def _clouds(random: np.random.Generator, cells: int, octaves: int) -> Field:
    """Smooth noise of about unit variance: ``cells`` patches a side, and finer ones of half the weight each."""
    found = np.zeros((SIDE, SIDE), dtype=np.float32)
    for octave in range(octaves):
        found += _enlarged(random.standard_normal((cells << octave, cells << octave), dtype=np.float32)) / 2**octave
    return found


def _streaks(random: np.random.Generator, across: int, along: int) -> Field:
    """Noise drawn out along x: ``across`` lines of ``along`` patches, larger than the picture, to be turned."""
    values = random.standard_normal((across, along), dtype=np.float32)
    return _enlarged(values, int(SIDE * 1.45))


def _turned(field: Field, degrees: float) -> Field:
    """The middle of a larger field, turned."""
    turned = Image.fromarray(field).rotate(degrees, Image.Resampling.BILINEAR)
    edge = (turned.width - SIDE) // 2
    return np.asarray(turned.crop((edge, edge, edge + SIDE, edge + SIDE)))


def _enlarged(values: Field, side: int = SIDE) -> Field:
    return np.asarray(Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC))


def _grain(random: np.random.Generator) -> Field:
    """Sand: noise of single pixels and of two."""
    return 0.6 * random.standard_normal((SIDE, SIDE), dtype=np.float32) + 0.8 * _clouds(random, SIDE // 2, 1)


def _pores(random: np.random.Generator, number: int) -> Field:
    """Small dark holes, from 0 to 1."""
    sheet = Image.new("L", (SIDE * _FINE, SIDE * _FINE))
    draw = ImageDraw.Draw(sheet)
    for x, y in random.uniform(0, SIDE * _FINE, (number, 2)):
        width, height = np.exp(random.normal(1.1, 0.6, 2)).clip(1, 14)
        draw.ellipse([x - width, y - height, x + width, y + height], fill=int(random.integers(90, 256)))
    return np.asarray(sheet.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255


def _milling(random: np.random.Generator) -> Field:
    """Marks of a tool: parallel arcs at equal distances."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    centre = random.uniform(-3, 4, 2) * SIDE
    radius = np.hypot(x - centre[0], y - centre[1])
    return np.asarray(np.cos(radius * 2 * math.pi / random.uniform(5, 18)), dtype=np.float32)


def _joint(random: np.random.Generator, value: Field, depth: float) -> Field:
    """A seam: dark, straight, as wide everywhere, from edge to edge."""
    sheet = _Sheet()
    angle, width = random.choice([0.0, math.pi / 2]) + random.normal(0, 0.08), random.uniform(1.2, 3.5)
    middle = random.uniform(0.1, 0.9, 2) * SIDE
    way = 2 * SIDE * np.array([math.cos(angle), math.sin(angle)])
    sheet.stroke([middle - way, middle + way], [width])
    return np.asarray(value * (1 - depth * sheet.opacity(0.6)))


def _dust(random: np.random.Generator, value: Field, number: int) -> Field:
    """Specks, light or dark."""
    if not number:
        return value
    specks = _pores(random, number)
    return np.asarray(value * (1 + random.choice([-0.35, 0.35]) * specks))


def _hairs(random: np.random.Generator, value: Field, share: float) -> Field:
    """Now and then a fibre that fell there: thin, curled, as wide everywhere."""
    if random.random() >= share:
        return value
    sheet = _Sheet()
    place, heading, bend = random.uniform(0.15, 0.85, 2) * SIDE, random.uniform(0, 2 * math.pi), random.normal(0, 0.12)
    points = [place]
    for _ in range(int(random.integers(10, 40))):
        bend += random.normal(0, 0.03)
        heading += bend
        place = place + 3 * np.array([math.cos(heading), math.sin(heading)])
        points.append(place)
    sheet.stroke(points, [1.0] * len(points))
    return np.asarray(value * (1 + random.choice([-0.5, 0.45]) * sheet.opacity(0.5)))


def _tinted(value: Field, colour: NDArray[np.float64]) -> Field:
    return np.asarray(value[..., None] * colour, dtype=np.float32)


def _light(random: np.random.Generator, camera: str) -> Field:
    """Lighting: a slope, a lamp, and sometimes the soft edge of a shadow."""
    y, x = (np.mgrid[:SIDE, :SIDE] / SIDE - 0.5).astype(np.float32)
    angle = random.uniform(0, 2 * math.pi)
    light = 1 + random.uniform(0, 0.35) * (x * math.cos(angle) + y * math.sin(angle))
    lamp = random.uniform(-0.4, 0.4, 2)
    light += random.uniform(0, 0.25) * np.exp(-((x - lamp[0]) ** 2 + (y - lamp[1]) ** 2) / 0.08)
    if random.random() < 0.35:
        angle, offset = random.uniform(0, 2 * math.pi), random.uniform(-0.3, 0.3)
        edge = (x * math.cos(angle) + y * math.sin(angle) - offset) / random.uniform(0.01, 0.12)
        light *= 1 - random.uniform(0.15, 0.4) / (1 + np.exp(-edge))
    return np.asarray(light * (1.0 if camera == _CAMERAS[0] else 0.8), dtype=np.float32)


def _photograph(shown_HWC: Field, random: np.random.Generator, camera: str) -> Pixels:
    """Lens and sensor: blur and noise."""
    good = camera == _CAMERAS[0]
    noisy = shown_HWC + random.standard_normal((SIDE, SIDE, 1), dtype=np.float32) * (0.008 if good else 0.02)
    pixels = (np.clip(noisy, 0, 1) * 255).astype(np.uint8)
    if good:
        return pixels
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.6)))
