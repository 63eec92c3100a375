"""Photographs that ship inside PyPI packages, for tests."""

from __future__ import annotations

import io

import skimage.data
import sklearn.datasets
from PIL import Image

from winnow.images import DecodeLimits

LIMITS = DecodeLimits(max_bytes=50_000_000, max_pixels=50_000_000, timeout_s=20.0)


def packaged_photographs() -> dict[str, bytes]:
    """Photographs that ship inside PyPI packages, as files."""
    arrays = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "camera")}
    arrays |= {name: sklearn.datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    files = {}
    for name, array in arrays.items():
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "JPEG" if name in ("china", "flower", "rocket") else "PNG", quality=92)
        files[name] = stream.getvalue()
    return files
