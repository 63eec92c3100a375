"""Colours of classes: the same for the same list of classes, in every mask, overlay and legend.

The first seven are those of Okabe and Ito, "Color Universal Design" (2008), which people with any kind of colour vision
tell apart. Each further one is the colour farthest from all before it, by CIELAB distance (CIE 1976). Classes that
stand for the background are black and use up none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from winnow.masks import BACKGROUNDS

Colours = NDArray[np.uint8]
"""(n, 3), R, G, B."""

NUM_COLOURS = 256
"""Distinct colours that there are; further classes begin anew."""

UNLABELLED = (224, 224, 224)
"""Colour of pixels that are not labelled."""

_OKABE_ITO = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
)
_TAKEN = ((0, 0, 0), (128, 128, 128), (255, 255, 255), UNLABELLED)
"""Background, not labelled, and the greys of photographs: no class's colour comes near."""


def class_colours(classes: Sequence[str]) -> Colours:
    """A colour for each class, uint8 (C, 3)."""
    found = np.zeros((len(classes), 3), dtype=np.uint8)
    shown = [number for number, name in enumerate(classes) if name not in BACKGROUNDS]
    found[shown] = _distinct()[np.arange(len(shown)) % NUM_COLOURS]
    return found


@cache
def _distinct() -> Colours:
    levels = np.linspace(0, 255, 12).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = _lab(grid)[:, 0]
    candidates = grid[(lightness > 45) & (lightness < 92)]  # darker ones would look black as a tint
    lab = _lab(candidates)
    chosen = [np.array(colour, dtype=np.uint8) for colour in _OKABE_ITO]
    taken = _lab(np.array([*_TAKEN, *_OKABE_ITO], dtype=np.uint8))
    nearest = np.linalg.norm(lab[:, None] - taken, axis=2).min(axis=1)
    while len(chosen) < NUM_COLOURS:
        best = int(nearest.argmax())
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=1))
    return np.stack(chosen)


def _lab(colours: Colours) -> NDArray[np.float64]:
    """Colours of sRGB as CIELAB, D65 (IEC 61966-2-1; CIE 15:2004, section 8.2.1)."""
    share = colours / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=-1)
