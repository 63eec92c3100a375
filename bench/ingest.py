"""Rate and memory of `winnow ingest`: a Parquet manifest of 1,000,000 objects into a local warehouse, and again.

    python bench/ingest.py [--rows N …] [--labels]

Each ingest runs in a process of its own; its peak memory is that process's largest resident size. The objects do not
exist: ingest reads none.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CONFIG = """
[tasks.objects]
model = "torchvision/mobilenet_v2"
"""


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="rows of each manifest")
    parser.add_argument("--labels", action="store_true", help="the manifest also has labels and groups")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        step(options.step)
        return
    write = sys.stdout.write
    write("| rows | ingest | seconds | rows/s | peak memory | list · compare · write · publish, s |\n")
    write("|---|---|---|---|---|---|\n")
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="winnow-bench-") as name:
            folder = Path(name)
            (folder / "winnow.toml").write_text(CONFIG)
            write_manifest(folder / "manifest.parquet", num_rows, labels=options.labels)
            for title in ("first", "again"):
                found = json.loads(
                    subprocess.run(
                        [sys.executable, __file__, "--step", name], check=True, capture_output=True, text=True
                    ).stdout
                )
                seconds = found["seconds"]
                stages = " · ".join(f"{seconds.get(stage, 0):.1f}" for stage in ("list", "compare", "write", "publish"))
                rate = num_rows / found["wall_s"]
                write(
                    f"| {num_rows:,} | {title}: {found['verdict']} | {found['wall_s']:.1f} | {rate:,.0f} "
                    f"| {found['peak_bytes'] / 2**20:,.0f} MiB | {stages} |\n"
                )
                sys.stdout.flush()


def step(folder: Path) -> None:
    """One ingest in this process; prints what it took as JSON."""
    from winnow_jobs.workspace import Workspace

    workspace = Workspace(folder / "winnow.toml")
    workspace.init()
    started = time.monotonic()
    result = workspace.ingest([str(folder / "manifest.parquet")])
    sys.stdout.write(
        json.dumps(
            {
                "verdict": result.verdict,
                "seconds": dict(result.seconds),
                "wall_s": time.monotonic() - started,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def write_manifest(path: Path, num_rows: int, *, labels: bool) -> None:
    """Rows as an S3 Inventory with one column more has them."""
    random = np.random.default_rng(0)
    with pq.ParquetWriter(path, manifest_rows(0, 2, random, labels=labels).schema) as writer:
        for start in range(0, num_rows, 100_000):
            writer.write_table(manifest_rows(start, min(start + 100_000, num_rows), random, labels=labels))


def manifest_rows(start: int, stop: int, random: np.random.Generator, *, labels: bool) -> pa.Table:
    """Objects number ``start`` to ``stop``."""
    numbers = range(start, stop)
    times = pa.array(1_760_000_000_000_000 + np.arange(start, stop) * 1_000_000, pa.timestamp("us", tz="UTC"))
    columns = {
        "bucket": pa.array(["photographs"] * len(numbers)),
        "key": pa.array(
            [f"2026/{number // 10_000:04d}/camera-{number % 16:02d}/{number:09d}.jpg" for number in numbers]
        ),
        "size": pa.array(random.integers(20_000, 400_000, len(numbers))),
        "e_tag": pa.array([f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}" for number in numbers]),
        "last_modified_date": times,
        "camera": pa.array([f"camera-{number % 16:02d}" for number in numbers]),
    }
    if labels:
        columns["label"] = pa.array([f"class-{number % 10}" if number % 2 else None for number in numbers])
        columns["group"] = pa.array([f"visit-{number // 7}" for number in numbers])
    return pa.table(columns)


if __name__ == "__main__":
    main()
