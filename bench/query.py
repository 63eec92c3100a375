"""Time SQL over a million predictions, in Delta tables in a folder or on an S3 server started for it.

::

    python bench/query.py              # a temporary folder
    python bench/query.py --s3         # a local S3 server (the extra `local`)
    python bench/query.py --rows 100000 --repeat 5
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from winnow.config import StorageConfig
from winnow.schemas import TABLES
from winnow_connectors.object_store import ObjectStores
from winnow_connectors.query import QueryEngine
from winnow_connectors.tables import Tables
from winnow_jobs.export import export_results
from winnow_jobs.local_s3 import REGION, LocalS3

STATEMENTS = (
    "SELECT label, count(*) FROM predictions GROUP BY 1",
    "SELECT * FROM results LIMIT 10",
    "SELECT label, count(*) FROM results GROUP BY 1",
    "SELECT count(*) FROM current_images",
    "SELECT error, count(*) FROM failures GROUP BY 1",
)
CLASSES = pa.array([f"class {number}" for number in range(1000)])
NOW = datetime(2026, 1, 1, tzinfo=UTC)
FILE_ROWS = 20_000


def main() -> None:
    """Make the tables, time every statement, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--s3", action="store_true", help="on a local S3 server instead of a folder")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder,
        place(Path(folder), options.s3) as (stores, uri),
    ):
        tables = Tables(stores.at(uri))
        start = time.perf_counter()
        fill(tables, options.rows)
        say(f"{options.rows:,} images, outcomes and predictions at {uri} made in {time.perf_counter() - start:.1f} s")
        engine = QueryEngine(tables)
        for statement in STATEMENTS:
            seconds = [timed(engine, statement) for _ in range(options.repeat)]
            median = statistics.median(seconds)
            say(f"{statement}: first {seconds[0]:.2f} s, median {median:.2f} s, best {min(seconds):.2f} s")
        for format in ("parquet", "csv", "coco"):
            start = time.perf_counter()
            written = export_results(engine, str(Path(folder, f"out.{format}")), format, stores=stores)
            say(f"export {format}: {time.perf_counter() - start:.1f} s, {written.num_bytes / 1e6:.0f} MB")
        say(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def say(line: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def place(folder: Path, s3: bool) -> Iterator[tuple[ObjectStores, str]]:
    """Where the warehouse lies."""
    if not s3:
        yield ObjectStores({}, folder), str(folder / "warehouse")
        return
    server = LocalS3(folder / "s3")
    server.start()
    try:
        server.create_bucket("bench")
        os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = server.access_key, server.secret_key
        yield (
            ObjectStores({"s3://": StorageConfig(endpoint=server.endpoint, region=REGION)}, folder),
            "s3://bench/warehouse",
        )
    finally:
        server.stop()


def timed(engine: QueryEngine, statement: str) -> float:
    """Seconds of one statement, from opening the tables to the last row."""
    start = time.perf_counter()
    engine.sql(statement)
    return time.perf_counter() - start


def fill(tables: Tables, num_rows: int) -> None:
    """One ingest and one predict run over ``num_rows`` images; one in a thousand failed."""
    tables.create()
    rng = np.random.default_rng(0)
    fragments: dict[str, list[Any]] = {name: [] for name in ("images", "outcomes", "predictions")}
    for first in range(0, num_rows, FILE_ROWS):
        n = min(FILE_ROWS, num_rows - first)
        ids = pa.array([hashlib.blake2b(str(first + i).encode(), digest_size=16).hexdigest() for i in range(n)])
        failed = pa.array(rng.random(n) < 0.001)
        confidence = pa.array(rng.random(n, dtype=np.float32))
        rows = {
            "images": {
                "image_id": ids, "seen_at": NOW, "event": "added", "version": "etag", "source": "s3://photos/2026/",
                "uri": pa.array([f"s3://photos/2026/camera-7/{first + i:08d}.jpg" for i in range(n)]),
                "split": "train", "group": ids, "audit": False, "run": "ingest",
            },
            "outcomes": {
                "image_id": ids, "task": "kind", "model": "kind@1", "run": "predict", "at": NOW, "sha256": ids,
                "status": pc.if_else(failed, "failed", "answered"),
                "error": pc.if_else(failed, pa.scalar("corrupt"), pa.scalar(None, pa.string())),
                "width": 640, "height": 480,
            },
            "predictions": {
                "image_id": ids, "task": "kind", "model": "kind@1", "run": "predict", "at": NOW,
                "label": CLASSES.take(pa.array(rng.integers(0, 1000, n))),
                "confidence": confidence, "margin": confidence, "entropy": confidence, "top5": top5(rng, n),
            },
        }  # fmt: skip
        answered = pc.invert(failed)
        for name, columns in rows.items():
            table = pa.table(
                {
                    key: value
                    if isinstance(value, pa.Array)
                    else pa.repeat(pa.scalar(value, TABLES[name].field(key).type), n)
                    for key, value in columns.items()
                }
            )
            fragments[name].append(
                tables.write(name, table.filter(answered) if name == "predictions" else table, folder="bench")
            )
    runs = {"run_id": ["ingest", "predict"], "job": ["ingest", "predict"], "status": ["finished"] * 2}
    constants = {name: ["x"] * 2 for name in ("config", "digest", "code_version")}
    times = {name: [NOW] * 2 for name in ("started_at", "finished_at")}
    fragments["runs"] = [tables.write("runs", pa.table(runs | constants | times), folder="bench")]
    for name, files in fragments.items():
        tables.commit(name, files, app_id="bench")


def top5(rng: np.random.Generator, num_rows: int) -> pa.Array:
    """Five scored labels for each row."""
    entries = pa.StructArray.from_arrays(
        [
            CLASSES.take(pa.array(rng.integers(0, 1000, 5 * num_rows))),
            pa.array(rng.random(5 * num_rows, dtype=np.float32)),
        ],
        fields=list(TABLES["predictions"].field("top5").type.value_type),
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(0, 5 * num_rows + 1, 5, dtype=np.int32)), entries)


if __name__ == "__main__":
    main()
