"""What scaled decoding and the decoder processes cost: the numbers of docs/decoding.md.

    python bench/decoding.py [--images N]

Photographs are scikit-image's. Times are CPU milliseconds per image (median of the rounds), which other work on the
machine disturbs less than wall clock; for decoder processes, parent and child are counted together.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from winnow.decoders import DecoderPool
from winnow.images import DecodeLimits, View, attempt, decode

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry")
LIMITS = DecodeLimits(max_bytes=100_000_000, max_pixels=100_000_000, timeout_s=60.0)
VIEW = View(resize=256, crop=(224, 224))


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=240, help="images per measurement of the overhead (default: 240)")
    options = parser.parse_args()
    photographs = load_photographs()
    for table in (
        scaling_table(photographs),
        fingerprint_table(photographs),
        overhead_table(photographs, options.images),
    ):
        sys.stdout.write(table + "\n\n")
        sys.stdout.flush()


def load_photographs() -> dict[str, Image.Image]:
    """scikit-image's colour photographs by name; those that would need a download are left out."""
    import skimage.data

    folder = Path(skimage.data.__file__).parent
    paths = {path.stem: path for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".jpeg")}
    names = {"hubble_deep_field": "hubble_deep_field", "immunohistochemistry": "ihc"}
    found = {name: paths.get(names.get(name, name)) for name in PHOTOGRAPHS}
    return {name: Image.open(path).convert("RGB") for name, path in found.items() if path is not None}


def mosaic(photograph: Image.Image) -> Image.Image:
    """12 megapixels of the photograph at its own size, side by side: full of fine detail."""
    canvas = Image.new("RGB", (4000, 3000))
    for left in range(0, canvas.width, photograph.width):
        for top in range(0, canvas.height, photograph.height):
            canvas.paste(photograph, (left, top))
    return canvas


def jpeg(photograph: Image.Image, long_side: int, quality: int = 90) -> bytes:
    """The photograph as JPEG with 4:2:0 colour, its longer side ``long_side`` pixels."""
    scale = long_side / max(photograph.size)
    size = round(photograph.width * scale), round(photograph.height * scale)
    stream = io.BytesIO()
    photograph.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=quality, subsampling=2)
    return stream.getvalue()


def cpu_ms(function: Callable[[], object], rounds: int = 3) -> float:
    """Median CPU milliseconds of a call in this process."""
    times = []
    for _ in range(rounds):
        started = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - started))
    return statistics.median(times)


def scaling_table(photographs: dict[str, Image.Image]) -> str:
    """Speed of scaled decoding, and how far its pixels are from the exact ones, per source size and view."""
    lines = [
        "| JPEG, longer side | view | exact, CPU ms | scaled, CPU ms | mean difference | 99th percentile | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    views = (VIEW, View(232, (224, 224)), View(480, (480, 480)), View(236, (224, 224), "bicubic"))
    cases = [("4000, enlarged", 4000, view) for view in views] + [("4000, mosaic", 4000, view) for view in views]
    cases += [(f"{side}, enlarged", side, VIEW) for side in (2000, 1200, 700)]
    for name, long_side, view in cases:
        exact_ms, scaled_ms, differences = [], [], []
        for photograph in photographs.values():
            data = jpeg(mosaic(photograph) if "mosaic" in name else photograph, long_side)
            exact_ms.append(cpu_ms(lambda: decode(data, limits=LIMITS, views=(view,), scaled=False)))  # noqa: B023
            scaled_ms.append(cpu_ms(lambda: decode(data, limits=LIMITS, views=(view,), scaled=True)))  # noqa: B023
            exact = decode(data, limits=LIMITS, views=(view,), scaled=False).views[0].astype(np.int16)
            differences.append(np.abs(exact - decode(data, limits=LIMITS, views=(view,), scaled=True).views[0]).ravel())
        apart = np.concatenate(differences)
        assert view.crop is not None
        speed = f"{statistics.mean(exact_ms):.0f} | {statistics.mean(scaled_ms):.0f}"
        difference = f"{apart.mean():.2f} | {np.percentile(apart, 99):.0f} | {apart.max()}"
        lines.append(f"| {name} | {view.resize} → {view.crop[0]}, {view.interpolation} | {speed} | {difference} |")
    return "\n".join(lines)


def fingerprint_table(photographs: dict[str, Image.Image]) -> str:
    """What the hashes of the pixels cost beside decoding, by size of the source."""
    lines = [
        "| JPEG, longer side | decode, CPU ms | with fingerprints | scaled | scaled, with fingerprints |",
        "|---|---|---|---|---|",
    ]
    for long_side in (4000, 1200, 500):
        files = [jpeg(photograph, long_side) for photograph in photographs.values()]
        cells = []
        for scaled in (False, True):
            for fingerprints in (False, True):
                options: dict[str, Any] = {"scaled": scaled, "fingerprints": fingerprints}
                each = [cpu_ms(lambda: attempt(data, limits=LIMITS, views=(VIEW,), **options)) for data in files]  # noqa: B023
                cells.append(f"{statistics.mean(each):.1f}")
        lines.append(f"| {long_side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plain(data: bytes) -> np.ndarray:
    """What a plain script does: Pillow, nothing checked, nothing guarded."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = VIEW.target(*image.size)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    small = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(small.crop((left, top, left + 224, top + 224)))


def overhead_table(photographs: dict[str, Image.Image], num_images: int) -> str:
    """Cost of the checks and of the process border on photographs of 500 pixels."""
    files = [jpeg(photograph, 500) for photograph in photographs.values()]
    batch = (files * (num_images // len(files) + 1))[:num_images]
    rows = [("plain Pillow in a loop", measure(lambda: [plain(data) for data in batch]))]
    rows.append(("`decode` in a loop", measure(lambda: [decode(data, limits=LIMITS, views=(VIEW,)) for data in batch])))
    for processes in (1, 2):
        with DecoderPool(processes, limits=LIMITS, views=(VIEW,)) as pool:
            for future in [pool.submit(files[0]) for _ in range(4 * processes)]:
                future.result()

            def decode_all(pool: DecoderPool = pool) -> float:
                before = sum(cpu_s(pid) for pid in pool.pids)
                for future in [pool.submit(data) for data in batch]:
                    future.result()
                return sum(cpu_s(pid) for pid in pool.pids) - before

            rows.append((f"`DecoderPool({processes})`", measure(decode_all)))
    lines = [f"| {len(batch)} JPEGs of 500 pixels | CPU ms per image |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {1e3 * cpu / len(batch):.2f} |" for name, cpu in rows])


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, in ticks of a hundredth of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(function: Callable[[], object], rounds: int = 7) -> float:
    """Median CPU seconds; CPU seconds that the function returns (of other processes) are added."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        elsewhere = function()
        seconds.append(time.process_time() - started + (elsewhere if isinstance(elsewhere, float) else 0.0))
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
